"""The allowed sets of N rows that are stepped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import torch
from torch import Tensor

import textenv.dynamics as dynamics
from textenv.constraints.base import BoundConstraint
from textenv.dynamics import TokenState
from textenv.options import LengthEnd
from textenv.types import FinishReason


class Moved(NamedTuple):
    """Where r rows come to; nothing has moved before it is committed."""

    rows: Tensor
    """`[r]` int64."""
    states: list[Any]
    """One a row; nothing without a constraint."""
    allowed: Tensor | None
    """`[r, V]` bool; None without a constraint."""


class AllowedRows:
    """Which tokens each row may choose now; without a constraint, all of them, and nothing is kept.

    Where an episode has ended nothing is chosen and all is allowed, except at a cut (`truncated`), from whose state a
    learner bootstraps.
    """

    def __init__(self, constraint: BoundConstraint | None, rows: int) -> None:
        """N rows, none of them started."""
        self.constraint = constraint
        self._states: list[Any] = [None] * rows
        self.table: Tensor | None = None
        """`[N, V]` bool."""
        if constraint is not None:
            shape = (rows, constraint.vocabulary.size)
            self.table = torch.ones(shape, dtype=torch.bool, device=constraint.device)

    def now(self, rows: Tensor) -> Tensor | None:
        """`[r, V]` bool: what rows `[r]` may choose."""
        return None if self.table is None else self.table[rows]

    def begin(self, rows: Tensor, prompts: Sequence[Sequence[int]]) -> Moved:
        """Where rows begin, `[r]`.

        Raises:
            ValueError: If nothing may be chosen there.
        """
        if self.constraint is None:
            return Moved(rows, [], None)
        states = [self.constraint.start(prompt) for prompt in prompts]
        allowed = self.constraint.masks(states)
        dead = ~allowed.any(1)
        if dead.any():
            place = int(dead.nonzero()[0])
            raise ValueError(
                f"constraint: expected an allowed token in every state, got none at the beginning of row "
                f"{int(rows[place])}, prompt {list(prompts[place])}"
            )
        return Moved(rows, states, allowed)

    def check(self, actions: Tensor, rows: Tensor) -> None:
        """Hold actions `[r]` of rows `[r]` to what they may choose.

        Raises:
            gymnasium.error.InvalidAction: Naming row and token.
        """
        if self.table is None:
            return
        legal = self.table[rows, actions]
        if not legal.all():
            place = int((~legal).nonzero()[0])
            raise gym.error.InvalidAction(
                f"actions: expected tokens that the constraint allows (info['action_mask']), got {int(actions[place])} "
                f"in row {int(rows[place])}"
            )

    def after(self, rows: Tensor, actions: Tensor, state: TokenState, *, length_end: LengthEnd) -> Moved:
        """Where rows `[r]` come to with actions `[r]`, which lead to `state`.

        Raises:
            ValueError: If nothing may be chosen there.
        """
        if self.constraint is None or self.table is None:
            return Moved(rows, [], None)
        reasons = state.finish_reasons[rows]
        goes_on = reasons == FinishReason.NONE
        living = goes_on | dynamics.endings(reasons, length_end=length_end)[1]
        states: list[Any] = [
            self.constraint.advance(self._states[row], token) if lives else None
            for row, token, lives in zip(rows.tolist(), actions.tolist(), living.tolist(), strict=True)
        ]
        allowed = torch.ones(len(states), self.table.shape[1], dtype=torch.bool, device=self.table.device)
        places = living.nonzero()[:, 0]
        if len(places):
            allowed[places] = self.constraint.masks([states[place] for place in places.tolist()])
        dead = ~allowed.any(1)
        if (dead & goes_on).any():
            place = int((dead & goes_on).nonzero()[0])
            _, [response] = state.id_lists(rows[place : place + 1])
            raise ValueError(
                f"constraint: expected an allowed token in every state, got none in row {int(rows[place])} after the "
                f"response {response}"
            )
        allowed[dead] = True
        return Moved(rows, states, allowed)

    def commit(self, moved: Moved) -> None:
        """Go there."""
        if self.table is None or moved.allowed is None:
            return
        self.table[moved.rows] = moved.allowed
        for row, state in zip(moved.rows.tolist(), moved.states, strict=True):
            self._states[row] = state
