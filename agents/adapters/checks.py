"""What every adapter asks before it learns: that environment and policy fit each other."""

from __future__ import annotations

from typing import Any

from gymnasium import spaces

from agents.compatibility import check_policy
from textenv.models import context_length, unwrap
from textenv.task import Task
from textenv.vector_env import TextVectorEnv


def text_vector_env(envs: Any) -> TextVectorEnv:
    """The batched environment inside its wrappers.

    Raises:
        ValueError: If there is none.
    """
    inner = getattr(envs, "unwrapped", None)
    if not isinstance(inner, TextVectorEnv):
        got = type(envs if inner is None else inner).__name__
        raise ValueError(f"envs: expected gym.make_vec of 'RLHF-Text-v0', got {got}")
    return inner


def check_learner(
    policy: Any, task: Task, actions: spaces.Space | None = None, temperature: float | None = None
) -> None:
    """Raise unless the policy can act and learn in the environment.

    Args:
        policy: What learns.
        task: The environment's.
        actions: A row's action space, as the outermost wrapper shows it; None: the tokens.
        temperature: Of the policy's law; None: the environment's.

    Raises:
        ValueError: If the vocabulary, the actions, the context length, the temperature or the device differ, or the
            reward has running statistics.
    """
    check_policy(policy, task)
    if task.reward.learns:
        raise ValueError(
            "reward: expected one without running statistics, which only the native agents update, got "
            f"{task.reward.function!r}"
        )
    if actions is not None and not (isinstance(actions, spaces.Discrete) and int(actions.n) == task.vocab_size):
        # A wrapper that renumbers the actions, as TopKActions does: the policy's logits are of tokens.
        raise ValueError(f"envs: expected the actions to be the tokens, Discrete({task.vocab_size}), got {actions}")
    needed = f"{task.max_prompt_tokens} + {task.options.max_new_tokens}"
    for name, model in (("policy", policy.lm), ("critic", policy.critic_backbone)):
        context = None if model is None else context_length(unwrap(model).config)
        if context is not None and task.columns > context:
            raise ValueError(
                f"max_new_tokens: expected max_prompt_tokens + max_new_tokens within the {name}'s context of "
                f"{context}, got {needed}"
            )
    if temperature is not None and temperature != task.options.temperature:
        raise ValueError(f"temperature: expected the environment's {task.options.temperature}, got {temperature}")
