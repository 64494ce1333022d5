"""`old_logprobs="sampler"`: the sampler's log-probs are π_old's, and the policy's forward over a rollout is spared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from agents.mismatch import SamplerMismatch
from agents.sampling.sync import COMPARE_EVERY
from tests.agent_fixtures import (
    distance,
    make_agent,
    make_algorithm_agent,
    make_env,
    make_policy,
    small_config,
    weights,
)
from tests.test_sampler_sync import CopySampler
from tests.test_work import tokens_through


def both(**options: Any) -> tuple[Any, Any]:
    """An agent that spares the forward, past the first rollout of its sampler, and one that does not."""
    made = [make_agent(small_config(old_logprobs=whose), **options) for whose in ("sampler", "forward")]
    for agent in made:
        agent.comparisons.passed(agent.sampler)
    return made[0], made[1]


@pytest.mark.parametrize("critic", ["shared+", "separate+"])
@pytest.mark.parametrize("length_end", ["terminate", "truncate"])
def test_a_rollout_is_the_same_but_for_rounding(critic: str, length_end: str) -> None:
    spared, full = both(critic=critic, length_end=length_end, temperature=0.7)
    ours, theirs = spared.collect(), full.collect()
    assert ours.old_logprobs is ours.behavior_logprobs and ours.trainer_logprobs is None
    assert theirs.trainer_logprobs is theirs.old_logprobs
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
    agent.comparisons.passed(agent.sampler)
    with tokens_through(agent.policy.lm) as seen:
        agent.collect()
    assert len(seen) == 6  # the prompt and five steps


def test_the_first_rollout_and_every_sixteenth_are_compared() -> None:
    agent = make_agent(small_config(old_logprobs="sampler", epochs=1, minibatches=1))
    compared = ["sampler/kl" in row for row in agent.learn(COMPARE_EVERY + 2)]
    assert compared == [True, *[False] * (COMPARE_EVERY - 1), True, False]


def test_what_is_compared_is_learnt_from_as_what_is_not() -> None:
    agent = make_agent(small_config(old_logprobs="sampler"))
    first = agent.collect()
    assert first.trainer_logprobs is not None and first.trainer_logprobs is not first.old_logprobs
    assert first.old_logprobs is first.behavior_logprobs and torch.equal(first.entropy, -first.behavior_logprobs)


def test_another_sampler_is_compared_at_once() -> None:
    agent = make_agent(small_config(old_logprobs="sampler"))
    agent.learn(2)
    agent.sampler = CopySampler(agent.policy)
    assert ["sampler/kl" in row for row in agent.learn(2)] == [True, False]


def test_a_sampler_that_says_nothing_of_its_weights_is_compared_each_time() -> None:
    agent = make_agent(small_config(old_logprobs="sampler", learning_rate=3e-2), temperature=0.7)
    agent.sampler = CopySampler(agent.policy, "silent")
    assert all("sampler/kl" in row for row in agent.learn(3))


def test_a_rollout_that_was_refused_does_not_count() -> None:
    agent = make_agent(small_config(old_logprobs="sampler"), temperature=0.7)
    agent.sampler = CopySampler(agent.policy, "another temperature")
    for _ in range(2):
        with pytest.raises(SamplerMismatch, match="nats per token"):
            agent.collect()


def test_a_run_that_is_resumed_goes_on_bit_for_bit(tmp_path: Path) -> None:
    # The new sampler is compared anew, where the uninterrupted run compares nothing: no number may hang on that.
    config = small_config(old_logprobs="sampler", lr_schedule="constant")
    whole, begun = make_agent(config), make_agent(config)
    whole.learn(3)
    begun.learn(2)
    begun.save(tmp_path / "checkpoint")
    resumed = type(begun).load(tmp_path / "checkpoint", make_env())
    resumed.learn(1)
    assert distance(weights(resumed.policy), weights(whole.policy)) == 0.0


def test_numbers_that_are_none_stop_any_rollout() -> None:
    agent = make_agent(small_config(old_logprobs="sampler"), temperature=0.7)
    agent.sampler = CopySampler(agent.policy, "NaN")
    agent.comparisons.passed(agent.sampler)
    with pytest.raises(ValueError, match="logprobs: expected finite numbers"):
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
    agent.comparisons.passed(agent.sampler)
    rollout = agent.collect()
    assert rollout.task_rewards is not None
    charged = rollout.task_rewards - rollout.rewards
    expected = 0.5 * (rollout.behavior_logprobs - rollout.ref_logprobs)
    torch.testing.assert_close(charged[rollout.mask], expected[rollout.mask], rtol=0, atol=1e-6)


def test_entropies_need_logprobs() -> None:
    ids, one = torch.tensor([[5, 6, 7]]), torch.tensor([1])
    with pytest.raises(ValueError, match="with_entropy: expected False, because with_logprobs is False, got True"):
        make_policy().evaluate(ids, one, one, temperature=1.0, with_logprobs=False, with_entropy=True)
