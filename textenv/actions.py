"""What may be chosen in N rows: tokens, the allowed ones among them, or candidates by their index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from textenv.candidates import TopK
from textenv.constraints.rows import AllowedRows
from textenv.row_reference import RowReference
from textenv.task import Task

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Actions:
    """The actions of N rows: A of them in each state, V tokens or k candidates."""

    def __init__(self, task: Task, rows: int) -> None:
        """The task's constraint, and no candidates."""
        self._task, self._rows = task, rows
        self.reference = RowReference(task, rows)
        """What the reference says; it picks the candidates."""
        self.allowed = AllowedRows(task.constraint, rows)
        """What the constraint allows."""
        self.mask_in_obs = False
        """Whether observations carry `action_mask`."""

    @property
    def count(self) -> int:
        """A: V, or k where candidates are offered."""
        return self._task.vocab_size if self.reference.top_k is None else self.reference.top_k.k

    def offer(self, k: int, always: Sequence[int]) -> None:
        """Offer the k most probable tokens of the reference, from the next reset of all rows on.

        Raises:
            ValueError: Without a reference, if the environment asks a policy, or if candidates are offered already.
        """
        if self.reference.top_k is not None:
            raise ValueError(f"k: expected one TopKActions, got a second, with k={k}")
        if self._task.reference is None:
            raise ValueError("kl_coef: expected > 0 or a controller, for the reference gives the candidates, got 0")
        if self._task.kl_source == "policy":
            raise ValueError(
                "kl_source: expected 'agent' or 'reference', because the learner's law is over k tokens and the "
                "environment would ask for one over all, got 'policy'"
            )
        self.reference.offer(TopK.of(k, always, self._task.vocab_size))

    def constrain(self, constraint: Any) -> None:
        """Allow only what this allows, from the next reset of all rows on.

        Raises:
            ValueError: If it is no constraint, does not fit, or there is one already.
        """
        self._task.constrain(constraint)
        self.allowed = AllowedRows(self._task.constraint, self._rows)

    def show_mask(self) -> None:
        """Put `action_mask` into observations.

        Raises:
            ValueError: Without a constraint.
        """
        if self._task.constraint is None:
            raise ValueError("constraint: expected one, whose mask the observation would show, got None")
        self.mask_in_obs = True

    def check(self, tokens: Any) -> Tensor:
        """One token a row, `[N]` on the device.

        Raises:
            gymnasium.error.InvalidAction: If the shape, the type or a value is not that of `Discrete(V)`.
        """
        limit = self._task.vocab_size
        expected = f"actions: expected {self._rows} integers in [0, {limit}), one a row"
        return self._integers(tokens, expected, limit, np.ones(self._rows, dtype=bool))

    def chosen(self, indices: Any, running: np.ndarray) -> Tensor:
        """`[N]`: the tokens of indices into the candidates; 0 in rows that are not `running`, `[N]` bool.

        Raises:
            gymnasium.error.InvalidAction: If the shape, the type or a value is not that of `Discrete(k)`.
        """
        offered = self.reference.offered
        if offered is None:
            return torch.zeros(self._rows, dtype=torch.int64, device=self._task.device)
        limit = offered.ids.shape[1]
        expected = f"actions: expected {self._rows} indices in [0, {limit}), one a row"
        places = self._integers(indices, expected, limit, running)
        counts = torch.as_tensor(running, device=self._task.device)
        return torch.where(counts, offered.ids.gather(1, places[:, None])[:, 0], 0)

    def _integers(self, given: Any, expected: str, limit: int, counted: np.ndarray) -> Tensor:
        """`[N]` int64 in [0, limit); what stands in rows that do not count means nothing and becomes 0."""
        array = given if isinstance(given, Tensor) else np.asarray(given)
        integers = array.dtype in _INTEGERS if isinstance(array, Tensor) else np.issubdtype(array.dtype, np.integer)
        if not integers or array.shape != (self._rows,):
            raise gym.error.InvalidAction(f"{expected}, got shape {tuple(array.shape)} of {array.dtype}")
        device = self._task.device
        numbers = torch.as_tensor(array, dtype=torch.int64, device=device)
        if not counted.all():
            numbers = torch.where(torch.as_tensor(counted, device=device), numbers, 0)
        if ((numbers < 0) | (numbers >= limit)).any():
            raise gym.error.InvalidAction(f"{expected}, got {numbers.tolist()}")
        return numbers

    def mask(self) -> Tensor:
        """`[N, A]` bool, fresh: which actions may be chosen now."""
        if self.reference.offered is not None:
            return self.reference.offered.distinct.clone()
        if self.allowed.table is not None and self.reference.top_k is None:
            return self.allowed.table.clone()
        return torch.ones(self._rows, self.count, dtype=torch.bool, device=self._task.device)

    def observation(self) -> dict[str, Tensor]:
        """What observations say about actions, fresh: candidates and the mask, if they were asked for."""
        told: dict[str, Tensor] = {}
        if self.reference.offered is not None:
            told["candidates"] = self.reference.offered.ids.clone()
            told["candidate_logprobs"] = self.reference.offered.logprobs.clone()
        if self.mask_in_obs:
            told["action_mask"] = self.mask().to(torch.int8)
        return told

    def info(self) -> dict[str, Tensor]:
        """What infos say about actions, fresh: the mask, if there is a constraint."""
        return {} if self._task.constraint is None else {"action_mask": self.mask().to(torch.int8)}
