"""Making a reward function ready for an environment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from textenv.rewards.base import RewardContext, check_names
from textenv.rewards.folders import load_reward
from textenv.rewards.reward import Reward


def bind_reward(function: Any, context: RewardContext) -> Reward:
    """Prepare a reward function, and what it is composed of.

    Args:
        function: A callable `(prompts, responses) -> scores`, an object with `bind(context)` that returns one, or the
            folder or hub name of a reward model.
        context: The environment's; its `place` is what errors call the function.

    Raises:
        ValueError: If it is none of these, wants strings without a tokenizer, or is per token without ids.
    """
    label = context.place
    if isinstance(function, str | Path):
        function = load_reward(
            function,
            argument=label,
            device=context.device,
            dtype=context.dtype,
            trust_remote_code=context.trust_remote_code,
        )
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
    function: Any,
    *,
    tokenizer: Any,
    stop_token_ids: Sequence[int],
    max_new_tokens: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> Reward:
    """Prepare the reward function of an environment.

    Args:
        function: A callable, a reward object, or the folder or hub name of a reward model; an object may be made of any
            of them.
        tokenizer: Decodes for functions that want strings; may be None for those that want ids.
        stop_token_ids: Cut off the end of the strings.
        max_new_tokens: Longest response.
        device: Where models that are named by their folder run.
        dtype: Their floating-point type.
        trust_remote_code: Whether the folders may bring Python code.

    Raises:
        ValueError: As `bind_reward`, or if a part has the name of one of the environment's own.
    """
    context = RewardContext(
        tokenizer=tokenizer,
        stop_token_ids=frozenset(stop_token_ids),
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    reward = bind_reward(function, context)
    check_names(reward.names, argument="reward, part_names", reserved=True)
    return reward


def response_level(function: Any, context: RewardContext, *, label: str, by: str) -> Reward:
    """Bind what must give one number a response.

    Raises:
        ValueError: If it gives one value per token.
    """
    reward = bind_reward(function, context.within(label))
    if reward.per_token:
        raise ValueError(
            f"{reward.label}: expected one number a response in {by}, got one value per token; "
            "TokenAggregate makes it one"
        )
    return reward


def per_token(function: Any, context: RewardContext, *, label: str, by: str) -> Reward:
    """Bind what must give one value per token, and no more than that.

    Raises:
        ValueError: If it gives one number a response, or has an outcome.
    """
    reward = bind_reward(function, context.within(label))
    if not reward.per_token or reward.outcome is not None:
        got = "also a score at the end" if reward.per_token else "one number a response"
        raise ValueError(f"{reward.label}: expected one value per token in {by}, got {got}")
    return reward
