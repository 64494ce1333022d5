"""Making a reward function ready for an environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from textenv.rewards.base import RewardContext, check_names
from textenv.rewards.reward import Reward


def bind_reward(function: Any, context: RewardContext, *, label: str = "reward") -> Reward:
    """Prepare a reward function, and what it is composed of.

    Args:
        function: A callable `(prompts, responses) -> scores`, or an object with `bind(context)` that returns one.
        context: The environment's.
        label: What errors call it.

    Raises:
        ValueError: If it is neither, wants strings without a tokenizer, or is per token without ids.
    """
    if isinstance(function, torch.nn.Module):
        raise ValueError(f"{label}: expected live modules to be wrapped, textenv.Shared(...), got {type(function)}")
    bind = getattr(function, "bind", None)
    if callable(bind):
        function = bind(context)
    if not callable(function):
        raise ValueError(
            f"{label}: expected a folder, a hub name or a callable (prompts, responses) -> scores, got {function!r}"
        )
    wants_ids = bool(getattr(function, "wants_ids", False))
    per_token = bool(getattr(function, "per_token", False))
    outcome = getattr(function, "outcome", None)
    if per_token and not wants_ids:
        raise ValueError(f"{label}: expected wants_ids = True with per_token = True (text has no tokens), got False")
    return Reward(
        function,
        decoder=None if wants_ids else context.decoder,
        per_token=per_token,
        part_names=check_names(getattr(function, "part_names", ()), argument=f"{label}, part_names"),
        outcome=outcome if isinstance(outcome, Reward) else None,
        label=label,
    )


def as_reward(
    function: Any, *, tokenizer: Any, stop_token_ids: Sequence[int], max_new_tokens: int | None = None
) -> Reward:
    """Prepare the reward function of an environment.

    Args:
        function: A callable or reward object.
        tokenizer: Decodes for functions that want strings; may be None for those that want ids.
        stop_token_ids: Cut off the end of the strings.
        max_new_tokens: Longest response.

    Raises:
        ValueError: As `bind_reward`, or if a part has the name of one of the environment's own.
    """
    reward = bind_reward(function, RewardContext(tokenizer, frozenset(stop_token_ids), max_new_tokens))
    check_names(reward.names, argument="reward, part_names", reserved=True)
    return reward


def response_level(function: Any, context: RewardContext, *, label: str, by: str) -> Reward:
    """Bind what must give one number a response.

    Raises:
        ValueError: If it gives one value per token.
    """
    reward = bind_reward(function, context, label=label)
    if reward.per_token:
        raise ValueError(
            f"{label}: expected one number a response in {by}, got one value per token; TokenAggregate makes it one"
        )
    return reward


def per_token(function: Any, context: RewardContext, *, label: str, by: str) -> Reward:
    """Bind what must give one value per token, and no more than that.

    Raises:
        ValueError: If it gives one number a response, or has an outcome.
    """
    reward = bind_reward(function, context, label=label)
    if not reward.per_token or reward.outcome is not None:
        got = "also a score at the end" if reward.per_token else "one number a response"
        raise ValueError(f"{label}: expected one value per token in {by}, got {got}")
    return reward
