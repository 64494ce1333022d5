"""Where an algorithm would quietly do something else: rounding, equal scores, settings and environments that misfit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from agents import PPO, Agent, PPOConfig, Rollout, TrainConfig, algorithms
from agents.algorithms import Targets, description
from tests.agent_fixtures import (
    distance,
    identical,
    make_agent,
    make_algorithm_agent,
    make_env,
    make_policy,
    small_algorithm,
    small_config,
    weights,
)
from tests.conftest import make_llama
from textenv.wrappers import VectorTopKActions


def moved(lm: Any) -> Any:
    """The model with its weights shifted, so that it has a KL to what it was."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return lm


def rare(prompt: Sequence[int], response: Sequence[int]) -> float:
    """1 for every other first token, so that some groups of four have equal scores."""
    return float(response[0] % 2 == 0)


def constant(score: float) -> Callable[..., float]:
    return lambda prompt, response: score


ONE = {"epochs": 1, "minibatches": 1}


# Groups of equal scores.


@pytest.mark.parametrize("source", ["agent", "policy"])
@pytest.mark.parametrize("beta", [1e-4, 1.0])
@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_a_group_of_equal_scores_teaches_nothing_whatever_its_kl(name: str, beta: float, source: str) -> None:
    algorithm = small_algorithm(name, batch_episodes=64)
    envs = make_env(make_llama(), rare, kl_coef=beta)
    policy = make_policy(moved(make_llama()))
    if source == "policy":
        envs.attach(policy)
    assert envs.kl_source == source
    agent = Agent(policy, envs, algorithm)
    rollout = agent.collect()
    found = algorithm.estimator(rollout, 1.0).advantages[:, 0].view(-1, 4)
    scores, returns = rollout.scores.view(-1, 4), rollout.rewards.double().sum(1).view(-1, 4)
    equal = scores.max(1).values == scores.min(1).values
    assert 2 <= int(equal.sum()) <= len(equal) - 2
    assert bool((returns.std(1) > 1e-6).all()), "the KL differs in every group"
    assert not found[equal].any()
    for group, advantages in zip(returns[~equal].tolist(), found[~equal].tolist(), strict=True):
        mean = math.fsum(group) / 4
        sd = math.sqrt(math.fsum((x - mean) ** 2 for x in group) / 3)
        assert advantages == pytest.approx([(x - mean) / sd for x in group], rel=1e-4, abs=1e-6)


def test_a_penalty_that_differs_is_a_score_that_differs() -> None:
    agent = make_algorithm_agent("grpo", score=constant(0.5), missing_eos_penalty=1.0)
    rollout = agent.collect()
    finishes = rollout.finish_reasons.view(-1, 4)
    assert bool((finishes.max(1).values > finishes.min(1).values).any())
    found = agent.algorithm.estimator(rollout, 1.0).advantages[:, 0].view(-1, 4)
    assert torch.equal(found.any(1), finishes.max(1).values > finishes.min(1).values)


def test_without_equal_scores_beta_alone_decides_and_a_group_mean_keeps_the_kl() -> None:
    """Without the division the KL keeps its size, so it goes on being charged in groups of equal scores."""
    envs = make_env(make_llama(), constant(1.0), kl_coef=0.25)
    agent = Agent(make_policy(moved(make_llama())), envs, small_algorithm("dr_grpo"))
    rollout = agent.collect()
    found = algorithms.GroupNormalized(std=False)(rollout, 1.0).advantages[:, 0].view(-1, 4)
    charged = -0.25 * rollout.kl.sum(1).view(-1, 4)
    assert torch.allclose(found, charged - charged.mean(1, keepdim=True), atol=1e-6)
    assert bool(found.any())


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_microbatches_do_not_change_an_update_of_sparse_scores(name: str) -> None:
    """The policy is its reference: what KL there is, is rounding, which depends on the microbatch."""
    results = []
    for size in (None, 3):
        algorithm = small_algorithm(name, batch_episodes=32, microbatch_episodes=size, adam_eps=1e-3, **ONE)
        agent = make_algorithm_agent(algorithm, score=lambda prompt, response: float(7 in response or 11 in response))
        start = weights(agent.policy)
        rollout = agent.collect()
        results.append((agent.algorithm.estimator(rollout, 1.0).advantages[:, 0], weights(agent.policy)))
        agent.update(rollout)
        assert distance(start, weights(agent.policy)) > 1e-5
        results[-1] = (results[-1][0], weights(agent.policy))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    assert distance(results[0][1], results[1][1]) < 2e-6  # float32 sums in another order; a step is 1e-3


@pytest.mark.parametrize("name", ["grpo", "gspo", "rloo", "dr_grpo", "reinforce"])
def test_constant_scores_without_a_kl_give_no_advantage(name: str) -> None:
    algorithm = small_algorithm(name, batch_episodes=12)
    if algorithm.group_size > 1:
        algorithm = replace(algorithm, group_size=6)
    agent = make_algorithm_agent(algorithm, score=constant(0.1), kl_coef=0.0)
    rollout = agent.collect()
    for memory in ({}, {"baseline": 0.1}):
        assert not algorithm.estimator(replace(rollout, memory=memory), 1.0).advantages.any()
    start = weights(agent.policy)
    agent.update(rollout)
    assert identical(start, weights(agent.policy))


def test_a_mean_of_six_that_rounds_is_no_difference() -> None:
    """Six times 0.1 over six is not 0.1 in float64."""
    rollout = make_algorithm_agent("rloo", score=constant(1.0), kl_coef=0.0).collect([[5]] * 3)
    groups = torch.arange(12) // 6
    rollout = replace(rollout, rewards=rollout.rewards.double() * 0.1, groups=groups)
    for name in ("rloo", "dr_grpo", "grpo"):
        assert not algorithms.RECIPES[name]().estimator(rollout, 1.0).advantages.any()


def test_scaled_takes_rounding_of_any_estimator_for_nothing() -> None:
    rollout = make_algorithm_agent("reinforce", score=constant(0.1), kl_coef=0.0).collect()

    def off(by: float) -> Tensor:
        inner = lambda r, g: Targets(torch.where(r.mask, by, 0.0))  # noqa: E731
        return algorithms.Scaled(inner)(rollout, 1.0).advantages[rollout.mask]

    assert not off(1e-8).any()
    assert torch.allclose(off(-1e-5), torch.tensor(-1.0))


# PPO in parts.


def test_a_changed_ppo_is_an_algorithm_like_any_other() -> None:
    loop = {"batch_episodes": 8, "learning_rate": 1e-3}
    ppo, one = algorithms.ppo(), TrainConfig(**loop, **ONE)
    assert type(ppo.defaults) is TrainConfig
    assert ppo.defaults == PPOConfig().loop
    grouped = Agent(make_policy(), make_env(), replace(ppo, group_size=4))
    assert type(grouped.config) is TrainConfig
    Agent(make_policy(), make_env(), replace(ppo, objective=algorithms.PolicyGradient()), one).learn(1)
    Agent(make_policy(), make_env(), ppo, replace(ppo.defaults, learning_rate=1e-4))
    Agent(make_policy(), make_env(), replace(ppo, group_size=4), PPOConfig(**loop)).learn(1)
    with pytest.raises(ValueError, match="config: expected a TrainConfig, because the ppo given has an estimator"):
        Agent(make_policy(), make_env(), ppo, PPOConfig(clip_eps=0.1))
    with pytest.raises(ValueError, match="config: expected a TrainConfig, because the ppo given"):
        Agent(make_policy(), make_env(), replace(ppo, objective=algorithms.PolicyGradient()), PPOConfig(**loop, **ONE))


def test_a_grouped_ppo_is_saved_and_loaded(tmp_path: Any) -> None:
    algorithm = replace(algorithms.from_config(small_config()), group_size=4)
    for config in (None, small_config(schedule_updates=3)):
        agent = Agent(make_policy(), make_env(), algorithm, config)
        agent.learn(1)
        agent.save(tmp_path / "checkpoint")
        resumed = Agent.load(tmp_path / "checkpoint", make_env())
        assert resumed.algorithm == replace(algorithm, defaults=agent.config.loop)
        assert resumed.config == agent.config
    with pytest.raises(ValueError, match=r"algorithm.group_size: expected what was saved, 4, got 1"):
        PPO.load(tmp_path / "checkpoint", make_env())


# What does not fit.


def test_candidates_are_refused_before_and_after() -> None:
    message = re.escape("envs: expected no TopKActions, because the agent's sampler and its log-probs are of the whole")
    with pytest.raises(ValueError, match=message):
        make_agent(envs=VectorTopKActions(make_env(), 4))
    agent = make_agent()
    VectorTopKActions(agent.envs, 4)
    with pytest.raises(ValueError, match=message):
        agent.collect()


@pytest.mark.parametrize(("epochs", "minibatches"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("name", ["a2c", "reinforce", "reinforce_baseline", "remax"])
def test_an_objective_without_a_ratio_takes_one_step(name: str, epochs: int, minibatches: int) -> None:
    message = f"epochs, minibatches: expected 1 and 1, because PolicyGradient.. has .*, got {epochs} and {minibatches}"
    with pytest.raises(ValueError, match=message):
        Agent(
            make_policy(), make_env(), algorithms.RECIPES[name](), TrainConfig(epochs=epochs, minibatches=minibatches)
        )


def test_an_objective_of_ones_own_may_declare_itself() -> None:
    @dataclass(frozen=True)
    class Mine:
        on_policy: bool

        def __call__(self, logprobs: Tensor, rollout: Rollout, advantages: Tensor) -> Tensor:
            return torch.where(rollout.mask, -advantages * logprobs, 0.0)

    config = TrainConfig(batch_episodes=8, epochs=2, minibatches=2)
    make_algorithm_agent(replace(algorithms.reinforce(), objective=Mine(False), defaults=config))
    with pytest.raises(ValueError, match=r"epochs, minibatches: expected 1 and 1, because .*Mine"):
        make_algorithm_agent(replace(algorithms.reinforce(), objective=Mine(True), defaults=config))


@pytest.mark.parametrize("memory", [{"b": torch.ones(())}, {"b": True}, {"b": "x"}, {1: 1.0}])
def test_a_memory_that_no_checkpoint_keeps_is_refused_at_once(memory: Any) -> None:
    estimator = lambda rollout, gamma: Targets(rollout.rewards, memory=memory)  # noqa: E731
    agent = make_algorithm_agent(replace(small_algorithm("reinforce"), estimator=estimator))
    start = weights(agent.policy)
    with pytest.raises(ValueError, match="estimator: expected Targets with a memory of numbers by name, got"):
        agent.learn(1)
    assert identical(start, weights(agent.policy))


# Descriptions.


@dataclass(frozen=True)
class Mine:
    """A component of one's own."""

    weights: Any = (1, 2)

    def __call__(self, rollout: Rollout, gamma: float) -> Targets:
        return Targets(rollout.rewards)


def estimator(rollout: Rollout, gamma: float, scale: float = 1.0) -> Targets:
    return Targets(scale * rollout.rewards)


@pytest.mark.parametrize(
    ("now", "was", "where"),
    [
        (Mine((1, 2)), Mine((1, 3)), ("e.weights.1", 3, 2)),
        (Mine((1, 2)), Mine((1,)), ("e.weights.1", None, 2)),
        (Mine([0, (1, 2)]), Mine([0, (1, 4)]), ("e.weights.1.1", 4, 2)),
        (Mine((1, 2)), Mine([1, 2]), ("e.weights", "list", "tuple")),
        (partial(estimator, scale=2.0), partial(estimator, scale=3.0), ("e.scale=", 3.0, 2.0)),
        (partial(max, 1), partial(max, 2), ("e.args.0", 2, 1)),
        (partial(max), partial(min), ("e.function", "builtins.min", "builtins.max")),
    ],
)
def test_a_description_goes_into_sequences_and_partials(now: Any, was: Any, where: tuple[str, Any, Any]) -> None:
    assert description.difference(description.describe(now), description.describe(was), "e") == where
    assert description.difference(description.describe(now), description.describe(now), "e") is None


def test_sequences_and_partials_of_ours_are_made_again() -> None:
    for part in ((1, (2, "x")), [algorithms.GAE(0.9)]):
        assert description.make(description.describe(part)) == part
    again = description.make(description.describe(partial(algorithms.GAE(0.9), gamma=0.5)))
    assert (again.func, again.args, again.keywords) == (algorithms.GAE(0.9), (), {"gamma": 0.5})
    with pytest.raises(ValueError, match=r"because .*\.estimator in it is not ours"):
        description.make(description.describe(partial(estimator, scale=2.0)))


# The clip fraction, and the precision of the reference.


def test_the_clip_fraction_counts_the_tokens_that_the_clip_takes_the_gradient_of() -> None:
    """By autograd: tokens with a gradient of 0."""
    generator = torch.Generator().manual_seed(0)
    rollout = make_agent(small_config(batch_episodes=16)).collect()
    shape = rollout.mask.shape
    logprobs = (rollout.old_logprobs + 1.5 * torch.randn(shape, generator=generator)).requires_grad_()
    advantages = torch.randn(shape, generator=generator)
    shares = []
    for dual in (None, 1.5):
        objective = algorithms.Clipped(0.2, 0.3, dual)
        (gradient,) = torch.autograd.grad(objective(logprobs, rollout, advantages)[rollout.mask].sum(), logprobs)
        shares.append(float((gradient[rollout.mask] == 0).float().mean()))
        assert float(objective.clip_fraction(logprobs, rollout, advantages)) == pytest.approx(shares[-1], abs=1e-6)
    assert shares[1] > shares[0] + 0.05


@pytest.mark.parametrize("microbatch", [None, 3])
def test_the_reference_is_computed_in_the_precision_of_the_policy(microbatch: int | None) -> None:
    agent = make_agent(small_config(bf16=True, microbatch_episodes=microbatch))
    rollout = agent.collect()
    assert float(rollout.kl.abs().max()) <= 1e-6
    exact = make_agent(small_config(bf16=False)).collect([[5, 6, 7]] * 8)
    assert not torch.equal(exact.old_logprobs, agent.collect([[5, 6, 7]] * 8).old_logprobs), "autocast acts"


def test_the_reward_stays_in_its_own_precision() -> None:
    seen = []

    def score(prompt: Sequence[int], response: Sequence[int]) -> float:
        seen.append(torch.is_autocast_enabled("cpu"))
        return 0.0

    make_agent(small_config(bf16=True), score=score).collect()
    assert seen and not any(seen)
