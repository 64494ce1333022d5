"""`old_logprobs="sampler"`: the sampler's log-probs are π_old's, and the policy's forward over a rollout is spared."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from agents.agent import COMPARE_EVERY
from agents.mismatch import SamplerMismatch
from tests.agent_fixtures import distance, make_agent, make_algorithm_agent, make_policy, small_config, weights
from tests.test_sampler_sync import CopySampler
from tests.test_work import tokens_through


def both(**options: Any) -> tuple[Any, Any]:
    """An agent that spares the forward, past its first rollout, and one that does not."""
    made = [make_agent(small_config(old_logprobs=whose), **options) for whose in ("sampler", "forward")]
    for agent in made:
        agent.collections = 1
    return made[0], made[1]


@pytest.mark.parametrize("critic", ["shared+", "separate+"])
@pytest.mark.parametrize("length_end", ["terminate", "truncate"])
def test_a_rollout_is_the_same_but_for_rounding(critic: str, length_end: str) -> None:
    spared, full = both(critic=critic, length_end=length_end, temperature=0.7)
    ours, theirs = spared.collect(), full.collect()
    assert ours.old_logprobs is ours.behavior_logprobs
    assert torch.equal(ours.ids, theirs.ids)
    for name in ("old_logprobs", "values", "bootstrap_values", "rewards", "ref_logprobs"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=1e-5)
    # An estimate: −log π(a) of the token drawn, not the mean over all.
    torch.testing.assert_close(ours.entropy, -theirs.old_logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_it_learns_the_same(critic: str) -> None:
    spared, full = both(critic=critic, temperature=0.7)
    rows, expected = spared.learn(3), full.learn(3)
    assert [row["score/mean"] for row in rows] == [row["score/mean"] for row in expected]
    # Adam moves a weight by 1e-3 a step; rounding is below a hundredth of one.
    assert distance(weights(spared.policy), weights(full.policy)) < 1e-5


@pytest.mark.parametrize(("critic", "columns"), [("shared", 1), ("separate", 0)])
def test_the_policy_is_forwarded_for_a_shared_critic_alone(critic: str, columns: int) -> None:
    spared, full = both(critic=critic, stop_token_ids=[], prompts=[[5, 6, 7]])
    with tokens_through(spared.policy.lm) as seen:
        spared.collect()
    with tokens_through(full.policy.lm) as expected:
        full.collect()
    evaluating = 2  # microbatches
    assert seen == expected[: len(expected) - evaluating] + columns * expected[-evaluating:]


def test_without_a_critic_nothing_is_forwarded() -> None:
    agent = make_algorithm_agent("rloo", stop_token_ids=[], prompts=[[5, 6, 7]])
    agent.config = small_config(old_logprobs="sampler").loop
    agent.collections = 1
    with tokens_through(agent.policy.lm) as seen:
        agent.collect()
    assert len(seen) == 6  # the prompt and five steps


def test_the_first_rollout_and_every_sixteenth_are_compared() -> None:
    agent = make_agent(small_config(old_logprobs="sampler", epochs=1, minibatches=1))
    compared = ["sampler/kl" in row for row in agent.learn(COMPARE_EVERY + 2)]
    assert compared == [True, *[False] * (COMPARE_EVERY - 1), True, False]


@pytest.mark.parametrize("broken", ["another temperature", "NaN"])
def test_wrong_numbers_stop_the_first_rollout(broken: str) -> None:
    agent = make_agent(small_config(old_logprobs="sampler"), temperature=0.7)
    agent.sampler = CopySampler(agent.policy, broken)
    with pytest.raises(SamplerMismatch, match="nats per token"):
        agent.collect()


def test_a_push_that_was_skipped_stops_the_second() -> None:
    agent = make_agent(small_config(old_logprobs="sampler", learning_rate=1e-6), temperature=0.7)
    agent.sampler = CopySampler(agent.policy, "skipped")
    agent.learn(1)
    with pytest.raises(SamplerMismatch, match="version 0, the trainer has 1"):
        agent.learn(1)


def test_the_kl_is_charged_with_the_law_that_acted() -> None:
    agent = make_agent(small_config(old_logprobs="sampler"), temperature=0.7, kl_coef=0.5)
    agent.sampler = CopySampler(agent.policy, "another temperature")
    agent.collections = 1
    rollout = agent.collect()
    assert rollout.task_rewards is not None
    charged = rollout.task_rewards - rollout.rewards
    expected = 0.5 * (rollout.behavior_logprobs - rollout.ref_logprobs)
    torch.testing.assert_close(charged[rollout.mask], expected[rollout.mask], rtol=0, atol=1e-6)


def test_entropies_need_logprobs() -> None:
    ids, one = torch.tensor([[5, 6, 7]]), torch.tensor([1])
    with pytest.raises(ValueError, match="with_entropy: expected False, because with_logprobs is False, got True"):
        make_policy().evaluate(ids, one, one, temperature=1.0, with_logprobs=False, with_entropy=True)
