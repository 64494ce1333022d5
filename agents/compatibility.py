"""What fits together: a policy, an environment, an algorithm and the settings of the loop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from agents.algorithms.base import Algorithm, OnPolicy
from agents.algorithms.recipes import from_config
from agents.config import PPOConfig, TrainConfig
from agents.policy import ValueHeadLM
from textenv.env import TextEnv
from textenv.rewards.running import in_fixed_units
from textenv.task import Task
from textenv.vector_env import TextVectorEnv


def check_parts(policy: Any, envs: Any) -> None:
    """Raise unless the policy can learn in the environment.

    Raises:
        ValueError: Naming what is wrong.
    """
    if not isinstance(getattr(envs, "unwrapped", None), TextEnv | TextVectorEnv):
        raise ValueError(f"envs: expected gym.make or gym.make_vec of 'RLHF-Text-v0', got {type(envs).__name__}")
    check_policy(policy, envs.unwrapped.task)


def check_policy(policy: Any, task: Task) -> None:
    """Raise unless it is a policy over the environment's vocabulary and on its device.

    Raises:
        ValueError: Naming what is wrong.
    """
    if not isinstance(policy, ValueHeadLM):
        raise ValueError(f"policy: expected a ValueHeadLM (ValueHeadLM(model) makes one), got {type(policy).__name__}")
    if policy.vocab_size != task.vocab_size:
        raise ValueError(f"policy: expected the reference's vocabulary of {task.vocab_size}, got {policy.vocab_size}")
    if policy.device.type != task.device.type:
        raise ValueError(f"policy: expected it on the environment's {task.device}, got {policy.device}")


def check_settings(algorithm: Any, config: Any) -> TrainConfig:
    """The settings of the loop, `algorithm.defaults` if None, where every one acts and groups fit into a rollout.

    Raises:
        ValueError: Naming what is wrong.
    """
    if not isinstance(algorithm, Algorithm):
        raise ValueError(f"algorithm: expected an Algorithm, such as agents.algorithms.grpo(), got {algorithm!r}")
    config = algorithm.defaults if config is None else config
    if not isinstance(config, TrainConfig):
        raise ValueError(f"config: expected a TrainConfig, got {type(config).__name__}")
    if isinstance(config, PPOConfig) and not _acts(config, algorithm):
        raise ValueError(
            f"config: expected a TrainConfig, because the {algorithm.name} given has an estimator, an objective or a "
            "critic of its own, in whose place those settings of a PPOConfig would not act, got a PPOConfig"
        )
    once = isinstance(algorithm.objective, OnPolicy) and algorithm.objective.on_policy
    if once and config.epochs * config.minibatches > 1:
        raise ValueError(
            f"epochs, minibatches: expected 1 and 1, because {algorithm.objective!r} has no ratio and is right for one "
            f"step on a rollout, got {config.epochs} and {config.minibatches}"
        )
    if config.batch_episodes % algorithm.group_size:
        size = f"group_size={algorithm.group_size}"
        raise ValueError(f"batch_episodes: expected a multiple of {size}, got {config.batch_episodes}")
    for name, without in (("critic_warmup_updates", 0), ("critic_learning_rate", None)):
        value = getattr(config, name)
        if algorithm.critic is None and value != without:
            raise ValueError(f"{name}: expected {without}, because {algorithm.name} has no critic, got {value}")
    return config


def _acts(config: PPOConfig, algorithm: Algorithm) -> bool:
    """Whether the algorithm has the parts that the config describes; it may be grouped or averaged as it likes."""
    described = from_config(config)
    same = {"estimator": described.estimator, "objective": described.objective, "critic": described.critic}
    return algorithm == replace(algorithm, **same)


def check_evaluations(config: TrainConfig, task: Task) -> None:
    """Raise unless what is to be evaluated now and then has scores that compare.

    Raises:
        ValueError: If the reward has statistics of its own, and no units that they do not move.
    """
    if config.eval_every:
        with in_fixed_units(task.reward):
            pass


def check_best(config: TrainConfig, task: Task) -> None:
    """Raise unless a policy can be found best.

    Raises:
        ValueError: If none is evaluated, or what is optimised changes.
    """
    if not config.eval_every:
        raise ValueError("folder: expected None, because eval_every is 0 and nothing is found best, got a folder")
    if task.reward.learns:
        raise ValueError(
            "folder: expected None, because the reward's running statistics change what is optimised, and no objective "
            "holds throughout, got a folder; policies that are kept on the way can be compared afterwards"
        )


def check_actions(envs: Any) -> None:
    """Raise unless any token may be chosen.

    Raises:
        ValueError: If the environment offers candidates.
    """
    top_k = envs.unwrapped.core.actions.reference.top_k
    if top_k is not None:
        raise ValueError(
            "envs: expected no TopKActions, because the agent's sampler and its log-probs are of the whole vocabulary, "
            f"got one with k={top_k.k}"
        )


def refuse_reference(task: Task) -> None:
    """Raise where only a maximum-entropy algorithm would complete the KL.

    Raises:
        ValueError: Under `kl_source="reference"`.
    """
    if task.kl_source == "reference":
        raise ValueError(
            "kl_source: expected 'agent' or 'policy', got 'reference', which is for maximum-entropy algorithms; "
            "under PPO and its like it teaches short responses"
        )


def check_task(algorithm: Algorithm, task: Task) -> None:
    """Raise unless the environment pays what the algorithm reads.

    Raises:
        ValueError: Naming the option of the environment that is wrong.
    """
    refuse_reference(task)
    if task.constraint is not None:
        raise ValueError(
            "constraint: expected None, because the agent's sampler and its log-probs are of the whole vocabulary, got "
            f"{task.constraint!r}"
        )
    if algorithm.kl_loss is not None and task.kl_source != "agent":
        raise ValueError(
            f"kl_source: expected 'agent', because {algorithm.name} charges the KL in its loss, got {task.kl_source!r}"
        )
    if algorithm.critic is None and task.options.length_end == "truncate":
        raise ValueError(
            f"length_end: expected 'terminate', because {algorithm.name} has no critic to bootstrap a cut with, "
            "got 'truncate'"
        )
