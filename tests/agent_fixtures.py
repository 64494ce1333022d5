"""Tiny agents for tests: a policy, an environment over the same tiny model, and how two of them are compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from agents import PPO, Agent, PPOConfig, Rollout, TrainConfig, ValueHeadLM
from agents.algorithms import RECIPES, Algorithm, SequenceClipped
from agents.critic import build_critic
from tests.conftest import make_llama
from textenv import Shared, TextVectorEnv

STOPS = [1, *range(20, 30)]
PROMPTS = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [15, 16], [17]]


class IdsReward:
    """A score of token ids, from a plain function of (prompt, response)."""

    wants_ids = True

    def __init__(self, score: Callable[[Sequence[int], Sequence[int]], float]) -> None:
        self.score = score

    def __call__(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[float]:
        return [self.score(p, r) for p, r in zip(prompts, responses, strict=True)]


def even_share(prompt: Sequence[int], response: Sequence[int]) -> float:
    """The share of even ids, which any policy can learn to raise."""
    return sum(token % 2 == 0 for token in response) / len(response)


def distinct_tokens(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens a causal model must read of rows that begin alike: one for each prefix that there is."""
    return len({tuple(row[: n + 1]) for row in rows for n in range(len(row))})


def make_env(
    reference: Any = None, score: Callable[..., float] = even_share, scale: float = 1.0, **options: Any
) -> TextVectorEnv:
    """An environment over a tiny Llama; about half of the episodes stop early, so lengths are ragged."""
    defaults: dict[str, Any] = {
        "reference": reference if isinstance(reference, Shared) else Shared(reference or make_llama()),
        "prompts": PROMPTS,
        "reward": IdsReward(lambda p, r: scale * score(p, r)),
        "stop_token_ids": STOPS,
        "max_new_tokens": 6,
        "kl_coef": 0.1 * scale,
    }
    return TextVectorEnv(**{**defaults, **options})


def make_policy(lm: Any = None, critic: str = "shared") -> ValueHeadLM:
    """A policy on a tiny Llama, with a value head that is not zero where `critic` ends in `+`."""
    lm = make_llama() if lm is None else lm
    policy = ValueHeadLM(lm, build_critic(lm, critic.rstrip("+"))).train()
    if critic.endswith("+"):
        with torch.no_grad():
            generator = torch.Generator().manual_seed(7)
            policy.value_head.linear.weight.normal_(0, 0.1, generator=generator)
    return policy


def make_agent(
    config: PPOConfig | None = None, *, lm: Any = None, critic: str = "shared", envs: Any = None, **options: Any
) -> PPO:
    """An agent of a tiny policy and environment; the reference is a copy of the model."""
    lm = make_llama() if lm is None else lm
    envs = make_env(copy.deepcopy(lm), **options) if envs is None else envs
    return PPO(make_policy(lm, critic), envs, config or small_config())


def small_config(**changes: Any) -> PPOConfig:
    """Small batches, several steps, a rate at which things move."""
    defaults: dict[str, Any] = {"batch_episodes": 8, "epochs": 2, "minibatches": 2, "learning_rate": 1e-3}
    return PPOConfig(**{**defaults, **changes})


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all weights and buffers."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are the same bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference between two sets of finite weights."""
    assert a.keys() == b.keys()
    assert all(bool(tensor.isfinite().all()) for tensor in (*a.values(), *b.values()))
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def episodes(rollout: Rollout) -> list[tuple[int, int]]:
    """Row and length of each episode."""
    return list(enumerate(rollout.response_lengths.tolist()))


def small_algorithm(name: str, **changes: Any) -> Algorithm:
    """A recipe with small batches and groups, and a rate at which things move."""
    algorithm = RECIPES[name]()
    if isinstance(algorithm.objective, SequenceClipped):  # the recipe's trust region is that of long responses
        algorithm = replace(algorithm, objective=replace(algorithm.objective, clip_eps=0.1, clip_eps_high=0.1))
    epochs, minibatches = algorithm.defaults.epochs, min(2, algorithm.defaults.minibatches)
    loop = {"batch_episodes": 8, "epochs": epochs, "minibatches": minibatches, "learning_rate": 1e-3}
    settings: dict[str, Any] = {**loop, **changes}
    return replace(algorithm, group_size=min(4, algorithm.group_size), defaults=TrainConfig(**settings))


def make_algorithm_agent(
    algorithm: Algorithm | str, *, lm: Any = None, critic: str | None = None, envs: Any = None, **options: Any
) -> Agent:
    """An agent of a tiny policy and environment with any algorithm, a recipe's name for a small one."""
    algorithm = small_algorithm(algorithm) if isinstance(algorithm, str) else algorithm
    lm = make_llama() if lm is None else lm
    envs = make_env(copy.deepcopy(lm), **options) if envs is None else envs
    critic = critic if critic is not None else "shared" if algorithm.critic is None else "separate"
    return Agent(make_policy(lm, critic), envs, algorithm)
