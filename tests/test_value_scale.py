"""The statistics that a critic's targets are normalised by, against moments of explicit lists."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from agents import PPO, ValueHeadLM
from agents.value_head import ValueHead
from agents.value_scale import first_value_scale, update_value_scale
from tests import oracles
from tests.agent_fixtures import make_agent, make_env, small_config

MASK = torch.tensor([[True, True, True], [True, False, False]])
FIRST = torch.tensor([[1.0, 2.0, 4.0], [9.0, math.nan, math.nan]])
SECOND = torch.tensor([[-3.0, 0.5, 1.0], [30.0, math.nan, math.nan]])


def head(trained: bool = False) -> ValueHead:
    made = ValueHead(4)
    if trained:
        with torch.no_grad():
            made.linear.weight.copy_(torch.tensor([[0.3, -1.0, 0.5, 2.0]]))
            made.linear.bias.fill_(0.7)
    return made


def values(of: ValueHead) -> torch.Tensor:
    with torch.no_grad():
        return of.denormalize(of(torch.arange(12.0).view(3, 4)))


def test_the_first_returns_set_the_statistics_and_a_new_head_starts_at_their_mean() -> None:
    new = head()
    assert first_value_scale(new, FIRST, MASK)
    numbers = [1.0, 2.0, 4.0, 9.0]
    assert float(new.value_mean) == pytest.approx(oracles.mean(numbers))
    assert float(new.value_std) == pytest.approx(math.sqrt(oracles.variance(numbers, unbiased=False)))
    assert float(new.value_count) == 1
    assert values(new).tolist() == [pytest.approx(4.0)] * 3


def test_the_first_returns_leave_the_values_of_a_trained_head() -> None:
    trained = head(trained=True)
    before = values(trained)
    assert not first_value_scale(trained, FIRST, MASK)
    assert torch.allclose(values(trained), before, atol=1e-4)
    assert float(trained.value_mean) == 4.0


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_later_returns_move_them_to_the_moments_of_the_mixture(decay: float) -> None:
    trained = head(trained=True)
    first_value_scale(trained, FIRST, MASK)
    before = values(trained)
    update_value_scale(trained, SECOND, MASK, decay)
    # As if every old number were drawn with weight `decay` and every new one with the rest.
    old, new = [1.0, 2.0, 4.0, 9.0], [-3.0, 0.5, 1.0, 30.0]
    mean = decay * oracles.mean(old) + (1 - decay) * oracles.mean(new)
    square = decay * oracles.mean([x * x for x in old]) + (1 - decay) * oracles.mean([x * x for x in new])
    assert float(trained.value_mean) == pytest.approx(mean)
    assert float(trained.value_std) == pytest.approx(math.sqrt(square - mean * mean))
    assert torch.allclose(values(trained), before, atol=1e-4)
    assert float(trained.value_count) == 2


def test_constant_returns_are_scaled_by_their_size() -> None:
    constant = head()
    first_value_scale(constant, torch.full((2, 3), -5.0), MASK)
    assert (float(constant.value_mean), float(constant.value_std)) == (-5.0, 5.0)
    update_value_scale(constant, torch.full((2, 3), -5.0), MASK, 0.9)
    assert float(constant.value_std) > 0


def test_returns_of_zero_have_no_scale_and_the_next_ones_set_it() -> None:
    new = head()
    assert not first_value_scale(new, torch.zeros(2, 3), MASK)
    update_value_scale(new, torch.zeros(2, 3), MASK, 0.9)
    assert float(new.value_count) == 0
    update_value_scale(new, FIRST, MASK, 0.9)
    assert (float(new.value_mean), float(new.value_count)) == (4.0, 1)


def test_rewards_that_begin_with_zeros_are_scale_invariant_too() -> None:
    agents = []
    for scale in (1.0, 128.0):
        calls = [0]

        def score(prompt: object, response: list[int], calls: list[int] = calls) -> float:
            calls[0] += 1
            return 0.0 if calls[0] <= 8 else sum(token % 2 == 0 for token in response) / len(response)

        agent = make_agent(small_config(), score=score, scale=scale, kl_coef=0.0)
        agent.learn(3)
        agents.append(agent)
    one, other = (agent.policy.state_dict() for agent in agents)
    assert all(torch.equal(one[name], other[name]) for name in one if name.startswith("lm."))


def test_a_run_moves_them_by_the_returns_it_saw() -> None:
    agent = make_agent(small_config(value_stats_decay=0.5, learning_rate=0.0), kl_coef=0.0)
    rollout = agent.collect()
    first = (float(agent.policy.value_head.value_mean), float(agent.policy.value_head.value_std))
    # Undiscounted and without KL, the return of every token is the score of its row.
    numbers = [float(rollout.scores[row]) for row, n in enumerate(rollout.response_lengths.tolist()) for _ in range(n)]
    assert first == (
        pytest.approx(oracles.mean(numbers)),
        pytest.approx(math.sqrt(oracles.variance(numbers, unbiased=False))),
    )
    assert rollout.values[rollout.mask].tolist() == [pytest.approx(first[0])] * len(numbers)
    agent.update(rollout)
    assert float(agent.policy.value_head.value_count) == 2
    later = agent.collect()
    assert later.values[later.mask].tolist() == [pytest.approx(first[0])] * int(later.mask.sum())  # preserved


def test_a_critic_from_a_reward_model_keeps_its_values_in_the_first_rollout(
    tiny_lm_folder: Path, tiny_reward_folder: Path
) -> None:
    policy = ValueHeadLM.from_pretrained(tiny_lm_folder, critic=tiny_reward_folder)
    agent = PPO(policy, make_env(score=lambda *_: 100.0), small_config())
    rollout = agent.collect()
    with torch.no_grad():
        again = policy.evaluate(rollout.ids, rollout.prompt_lengths, rollout.response_lengths, temperature=1.0)
    assert float(rollout.values.abs().max()) < 50
    assert torch.allclose(rollout.values, again.values, atol=1e-3)  # the mean of the returns is 100
