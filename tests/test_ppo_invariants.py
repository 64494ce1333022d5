"""What separates PPO that is right from PPO that is almost right: ratios, batches, scale, endings."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from agents import PPO, PPOConfig, Rollout, update
from agents.algorithms import from_config
from agents.update import targets
from tests.agent_fixtures import (
    distance,
    episodes,
    even_share,
    identical,
    make_agent,
    make_env,
    make_policy,
    small_config,
    weights,
)
from tests.conftest import MAKERS, make_gpt2, make_llama

# The ratio is 1 before the first step.


@pytest.fixture
def log_ratios(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The largest |log ratio| of every microbatch, in order."""
    seen: list[float] = []
    real = update.importance_ratios

    def spy(logprobs: torch.Tensor, old_logprobs: torch.Tensor, *, mask: torch.Tensor) -> Any:
        seen.append(float((logprobs - old_logprobs)[mask].abs().max()))
        return real(logprobs, old_logprobs, mask=mask)

    monkeypatch.setattr(update, "importance_ratios", spy)
    return seen


@pytest.mark.parametrize("microbatch", [None, 1, 3])
@pytest.mark.parametrize("family", sorted(MAKERS))
def test_ratio_is_one_in_the_first_minibatch(log_ratios: list[float], family: str, microbatch: int | None) -> None:
    config = small_config(microbatch_episodes=microbatch, learning_rate=1e-2)
    agent = make_agent(config, lm=MAKERS[family]().train(), temperature=0.7)
    agent.learn(1)
    first = {None: 1, 1: 4, 3: 2}[microbatch]  # microbatches of the first minibatch, which has four episodes
    assert max(log_ratios[:first]) < 1e-4
    assert max(log_ratios[first:]) > 1e-2, "the policy must have moved after it"


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_ratio_is_always_one_at_rate_zero(log_ratios: list[float], critic: str) -> None:
    config = small_config(learning_rate=0.0, critic_learning_rate=0.1, microbatch_episodes=3, seed=1)
    agent = make_agent(config, lm=make_gpt2().train(), critic=critic, temperature=0.7)
    before = weights(agent.policy.lm)
    history = agent.learn(3)
    assert len(log_ratios) == 3 * 2 * 2 * 2  # updates × epochs × minibatches × microbatches
    assert max(log_ratios) < 1e-4
    assert identical(before, weights(agent.policy.lm))
    assert all(abs(row["kl/sequence"]) < 1e-4 for row in history)


def test_sampled_and_recomputed_logprobs_agree_before_and_after_a_large_update() -> None:
    agent = make_agent(small_config(learning_rate=3e-2), lm=make_gpt2(), temperature=0.7)
    gaps = [row["sampler/logprob_gap"] for row in agent.learn(3)]
    assert max(gaps) < 1e-5


# How episodes are batched changes nothing.


def one_update(config: PPOConfig, rollout: Rollout | None = None, **options: Any) -> tuple[PPO, Rollout]:
    agent = make_agent(config, **options)
    rollout = agent.collect() if rollout is None else rollout
    agent.update(rollout)
    return agent, rollout


@pytest.mark.parametrize("critic", ["shared+", "separate+"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_microbatches_do_not_change_an_update(critic: str, family: str) -> None:
    results = []
    for size in (None, 1, 3):
        # Large enough a rate to see a wrong weight; entropy on, so that every term of the loss is summed.
        config = small_config(microbatch_episodes=size, entropy_coef=0.1, learning_rate=1e-3)
        agent, rollout = one_update(config, lm=MAKERS[family](), critic=critic)
        assert len(set(rollout.response_lengths.tolist())) > 2, "lengths must be ragged"
        results.append(weights(agent.policy))
    start = weights(make_agent(critic=critic, lm=MAKERS[family]()).policy)
    assert distance(start, results[0]) > 1e-3
    assert distance(results[0], results[1]) < 5e-6  # float32 sums in another order; a step is 1e-3
    assert distance(results[0], results[2]) < 5e-6


def test_num_envs_does_not_matter() -> None:
    agents = [make_agent(num_envs=n) for n in (1, 5)]
    for agent in agents:
        agent.learn(2)
    assert identical(weights(agents[0].policy), weights(agents[1].policy))


def test_padding_of_the_rollout_changes_nothing() -> None:
    agents = [make_agent() for _ in range(2)]
    rollouts = [agent.collect() for agent in agents]
    padded = {}
    laws = ("old_logprobs", "behavior_logprobs", "trainer_logprobs", "ref_logprobs")
    for name in ("mask", "rewards", *laws, "entropy", "values", "ids"):
        tensor = getattr(rollouts[1], name)
        fill = {"mask": False, "ids": 3}.get(name, float("nan"))
        padded[name] = torch.nn.functional.pad(tensor, (0, 4), value=fill)
        if name not in ("mask", "ids"):
            padded[name] = torch.where(padded["mask"], padded[name], float("nan"))
    metrics = [agents[0].update(rollouts[0]), agents[1].update(replace(rollouts[1], **padded))]
    # Not to the bit: sums over more slots are added up in another order.
    assert distance(weights(agents[0].policy), weights(agents[1].policy)) < 2e-6
    clocks = ("time/", "speed/")
    for name, value in metrics[0].items():
        if not name.startswith(clocks):
            # Absolute: the explained variance is 1 minus a quotient near 1, whose last float32 digit is 1.2e-7.
            assert metrics[1][name] == pytest.approx(value, rel=1e-5, abs=5e-7), name


# The unit of the rewards does not matter.


def three_iterations(scale: float, critic: str, **changes: Any) -> tuple[list[torch.Tensor], PPO]:
    agent = make_agent(
        small_config(**changes), critic=critic, scale=scale, kl_coef=0.1 * scale, missing_eos_penalty=0.3 * scale
    )
    tokens: list[torch.Tensor] = []
    lengths: set[int] = set()
    for _ in range(3):
        rollout = agent.collect()
        lengths.update(rollout.response_lengths.tolist())
        tokens.append(rollout.ids)
        agent.update(rollout)
    assert len(lengths) > 2, "lengths must be ragged"
    return tokens, agent


@pytest.mark.parametrize("power", [7, -7])
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_powers_of_two_change_no_bit(critic: str, power: int) -> None:
    tokens, agent = three_iterations(1.0, critic)
    scaled_tokens, scaled = three_iterations(2.0**power, critic)
    assert all(torch.equal(a, b) for a, b in zip(tokens, scaled_tokens, strict=True))
    ours, theirs = weights(agent.policy), weights(scaled.policy)
    for name in ("value_head.value_mean", "value_head.value_std"):
        assert ours.pop(name) * 2.0**power == theirs.pop(name)
    assert identical(ours, theirs)


def scaled_rollout(rollout: Rollout, scale: float) -> Rollout:
    names = ("rewards", "values", "bootstrap_values", "scores")
    return replace(rollout, **{name: getattr(rollout, name) * scale for name in names})


@pytest.mark.parametrize("scale", [100.0, 0.01])
@pytest.mark.parametrize("critic", ["shared+", "separate+"])
def test_any_scale_gives_one_update_from_one_rollout(critic: str, scale: float) -> None:
    agents = [make_agent(critic=critic) for _ in range(2)]
    rollout = agents[0].collect()
    head = agents[0].policy.value_head
    other = agents[1].policy.value_head
    other.rescale_values(float(head.value_mean) * scale, float(head.value_std) * scale, preserve=False)
    other.linear.load_state_dict(head.linear.state_dict())
    other.value_count.copy_(head.value_count)
    start = weights(agents[0].policy.lm)
    agents[0].update(rollout)
    agents[1].update(scaled_rollout(rollout, scale))
    ours, theirs = (weights(agent.policy) for agent in agents)
    for name in ("value_head.value_mean", "value_head.value_std"):
        assert float(theirs.pop(name)) == pytest.approx(float(ours.pop(name)) * scale, rel=1e-5)
    assert distance(ours, theirs) < 1e-5
    assert distance(start, weights(agents[0].policy.lm)) > 1e-3


@pytest.mark.parametrize("changes", [{"score_clip": 0.5}, {"whiten_rewards": True}])
def test_clipped_scores_and_whitened_rewards_give_the_invariance_up(changes: dict[str, Any]) -> None:
    _, agent = three_iterations(1.0, "shared", **changes)
    _, scaled = three_iterations(128.0, "shared", **changes)
    assert distance(weights(agent.policy.lm), weights(scaled.policy.lm)) > 1e-4


# How an episode ends.


def test_the_score_sits_on_the_last_token_and_nothing_is_worth_anything_after_it() -> None:
    agent = make_agent(critic="shared+", kl_coef=0.0)
    rollout = agent.collect()
    config = small_config(gae_lambda=0.0, whiten_advantages=False, gamma=0.9)
    target = targets(rollout, from_config(config), config)
    for row, length in episodes(rollout):
        response = rollout.ids[row, int(rollout.prompt_lengths[row]) :][:length].tolist()
        assert rollout.rewards[row, :length].tolist() == pytest.approx(
            [0.0] * (length - 1) + [even_share([], response)]
        )
        values = rollout.values[row].tolist()
        # λ = 0: Â_t = r_t + γ·V_{t+1} − V_t, with 0 for V after the end.
        expected = [0.9 * values[t + 1] - values[t] for t in range(length - 1)]
        expected.append(even_share([], response) - values[length - 1])
        assert target.advantages[row, :length].tolist() == pytest.approx(expected, abs=1e-6)
        assert values[0] != 0.0


@pytest.mark.parametrize("critic", ["shared+", "separate+"])
def test_a_truncated_response_is_unscored_and_bootstraps_from_the_state_after_it(critic: str) -> None:
    agent = make_agent(critic=critic, length_end="truncate")
    agent.learn(1)  # so that the values are in some unit of their own
    rollout = agent.collect()
    config = small_config(gae_lambda=0.5, whiten_advantages=False, gamma=0.9)
    target = targets(rollout, from_config(config), config)
    assert 0 < int(rollout.truncated.sum()) < len(rollout.ids), "both endings are needed"
    for row, length in episodes(rollout):
        total = int(rollout.prompt_lengths[row]) + length
        with torch.no_grad():
            after = agent.policy(rollout.ids[row : row + 1, :total]).values[0, -1]
        cut = bool(rollout.truncated[row])
        assert cut == (rollout.finish_reasons[row] == 2)
        if cut:
            assert float(rollout.bootstrap_values[row]) == pytest.approx(float(after), abs=1e-5)
            assert float(rollout.scores[row]) == 0.0
            assert abs(float(rollout.rewards[row].sum())) < 0.2  # KL alone
        following = 0.9 * float(after) if cut else 0.0
        expected = float(rollout.rewards[row, length - 1]) + following - float(rollout.values[row, length - 1])
        assert float(target.advantages[row, length - 1]) == pytest.approx(expected, abs=1e-5)


# Randomness is the agent's own.


def test_global_random_states_are_left_alone() -> None:
    import random

    import numpy as np

    agent = make_agent(small_config(), lm=make_gpt2().train())

    def states() -> tuple[Any, Any, Any]:
        numpy_state: Any = np.random.get_state()
        return torch.get_rng_state().tolist(), numpy_state[1].tolist(), random.getstate()

    before = states()
    agent.update(agent.collect())
    agent.evaluate([[5, 6]])
    assert states() == before
    torch.manual_seed(99)  # and they have no influence
    random.seed(99)
    other = make_agent(small_config(), lm=make_gpt2().train())
    other.learn(1)
    assert identical(weights(agent.policy), weights(other.policy))


def test_the_seed_decides() -> None:
    def tokens(seed: int) -> list[Sequence[int]]:
        return make_agent(small_config(seed=seed)).collect().ids.tolist()

    assert tokens(0) == tokens(0) != tokens(1)


def test_updates_draw_anew() -> None:
    agent = make_agent(small_config(learning_rate=0.0))
    first = agent.collect([[5, 6]] * 4)
    agent.update(first)
    assert agent.collect([[5, 6]] * 4).ids.tolist() != first.ids.tolist()


def test_a_loop_of_ones_own_equals_learn() -> None:
    learnt, looped = make_agent(small_config(lr_schedule="constant")), make_agent(small_config(lr_schedule="constant"))
    learnt.learn(3)
    for _ in range(3):
        looped.update(looped.collect())
    assert identical(weights(learnt.policy), weights(looped.policy))
    assert learnt.updates == looped.updates == 3


# Memory and precision.


def test_gradient_checkpointing_gives_the_same_update() -> None:
    results = []
    for checkpointing in (False, True):
        agent = make_agent(critic="separate")
        if checkpointing:
            models: tuple[Any, Any] = agent.policy.lm, agent.policy.critic_backbone
            for model in models:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        agent.learn(2)
        results.append(weights(agent.policy))
    assert distance(*results) < 1e-6


def test_bfloat16_autocast_changes_the_numbers_a_little_and_the_weights_stay_float32() -> None:
    results = []
    for bf16 in (False, True):
        agent = make_agent(small_config(bf16=bf16, learning_rate=1e-4))
        metrics = agent.learn(2)[-1]
        assert all(p.dtype == torch.float32 for p in agent.policy.parameters())
        assert metrics["kl/sequence"] == pytest.approx(0.0, abs=0.2)
        results.append(weights(agent.policy.lm))
    assert 1e-7 < distance(*results) < 5e-3


def test_nothing_of_the_reference_learns() -> None:
    lm = make_llama()
    reference = copy.deepcopy(lm)
    before = weights(reference)
    agent = PPO(make_policy(lm), make_env(reference), small_config())
    agent.learn(2)
    assert identical(before, weights(reference))
    assert distance(before, weights(lm)) > 1e-3
