"""What the single and the vector environment have in common: a task, and what may be asked of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
from torch import Tensor

import textenv.replay as replays
from textenv.core import TextCore
from textenv.prompts import Prompt
from textenv.task import Task
from textenv.types import ReplayRecord


class Tasked:
    """An environment that stands on a `TextCore`, until it is closed."""

    _core: TextCore | None

    @property
    def core(self) -> TextCore:
        """The rows."""
        if self._core is None:
            raise gym.error.ClosedEnvironmentError("The environment was closed, and its models with it; make it again.")
        return self._core

    @property
    def task(self) -> Task:
        """Models, prompts, limits and β."""
        return self.core.task

    @property
    def kl_source(self) -> str:
        """Who charges the KL: `agent`, `policy` or `reference`."""
        return self.task.kl_source

    def attach(self, policy: Callable[..., Tensor]) -> None:
        """Ask this live policy, `(input_ids, attention_mask) -> logits [B, V]`, for log π from now on."""
        self.core.attach(policy)

    def offer(self, k: int, always: Sequence[int] = ()) -> None:
        """Show the k most probable tokens of the reference in observations: what `textenv.wrappers.TopKActions` asks.

        Every row must be reset before the next step.
        """
        self.core.actions.offer(k, always)
        self.core.forget()
        self._describe()

    def constrain(self, constraint: Any) -> None:
        """Allow only what this constraint allows: what `textenv.wrappers.ActionMask` asks.

        Every row must be reset before the next step.
        """
        self.core.actions.constrain(constraint)
        self.core.forget()

    def show_action_mask(self) -> None:
        """Put `action_mask` into observations too."""
        self.core.actions.show_mask()
        self._describe()

    def _describe(self) -> None:
        """Say what observations look like now."""
        raise NotImplementedError

    def replay(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[int]],
        logprobs: Sequence[Sequence[float]] | Tensor | None = None,
        *,
        aborted: Sequence[bool] | None = None,
    ) -> ReplayRecord:
        """What `step` would have paid for whole responses; see `textenv.replay.replay`."""
        return replays.replay(self.task, prompts, responses, logprobs, aborted=aborted)
