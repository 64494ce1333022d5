"""What an agent does while it collects is undone if collecting fails."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch

if TYPE_CHECKING:
    from agents.agent import Agent

P = ParamSpec("P")
T = TypeVar("T")


def undone_on_failure(
    method: Callable[Concatenate[Any, P], T],
) -> Callable[Concatenate[Any, P], T]:
    """Let a method of an agent that raises leave prompts, counts and the critic's scale as they were.

    A rollout may fail after its prompts were taken, because of an engine or a reward, or when it is checked. Whoever
    saves the agent then, or tries again, goes on from where the rollout began.
    """

    @wraps(method)
    def attempt(agent: Agent, *args: P.args, **options: P.kwargs) -> T:
        prompts, collections = agent.prompts.state_dict(), agent.collections
        scale = [(buffer, buffer.clone()) for buffer in agent.policy.value_head.buffers()]
        try:
            return method(agent, *args, **options)
        except BaseException:
            agent.prompts.load_state_dict(prompts)
            agent.collections = collections
            with torch.no_grad():
                for buffer, before in scale:
                    buffer.copy_(before)
            raise

    return attempt
