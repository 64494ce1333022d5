"""What the reference says while N rows are stepped: one token's log-prob, a whole response's, or candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from textenv.candidates import Offer, TopK
from textenv.dynamics import TokenState
from textenv.reference import ReferenceLaws, ReferenceStepper
from textenv.task import Task
from textenv.types import FinishReason


class RowReference:
    """The reference beside N rows.

    With `kl_credit="token"` it keeps a cache one token behind the text. With `"sequence"` it scores each response when
    it ends. With candidates it keeps the law of each present state, whatever `kl_credit` is: one forward a step, and
    the responses need no other.
    """

    def __init__(self, task: Task, rows: int) -> None:
        """Nothing is computed before the first `begin`."""
        self._task, self._rows = task, rows
        self._stepper: ReferenceStepper | None = None
        self._laws: ReferenceLaws | None = None
        self._spoken: Tensor | None = None  # [N, T]: with candidates, log π_ref of the tokens so far
        self.top_k: TopK | None = None
        """Which candidates are offered; None: none."""
        self.offered: Offer | None = None
        """The candidates at the present state of each row, from the first `begin` on."""

    def offer(self, top_k: TopK) -> None:
        """Offer candidates from the next `begin` on, which must be of all rows."""
        self.top_k, self._stepper = top_k, None

    def begin(self, rows: Tensor, ids: Tensor, lengths: Tensor, allowed: Tensor | None) -> None:
        """Read the prompts of rows that begin: ids `[r, P]`, right-padded; lengths `[r]`; what they allow, `[r, V]`."""
        task = self._task
        if task.reference is None:
            return
        if self.top_k is not None:
            if self._laws is None:
                self._laws = ReferenceLaws(task.reference, self._rows, task.columns, task.vocab_size)
                self._spoken = torch.zeros(self._rows, task.options.max_new_tokens, device=task.device)
                self.offered = self._blank(self.top_k.k)
            assert self._spoken is not None
            self._spoken[rows] = 0.0
            self._laws.begin(rows, ids, lengths, allowed)
            self._pick(rows)
        elif task.options.kl_credit == "token":
            if self._stepper is None:
                self._stepper = ReferenceStepper(task.reference, self._rows, task.columns)
            self._stepper.begin(rows, ids, lengths)

    def speak(
        self,
        before: TokenState,
        after: TokenState,
        actions: Tensor,
        rows: Tensor,
        allowed: tuple[Tensor | None, Tensor | None],
    ) -> Tensor | None:
        """Answer for one step of some rows, `[r]`.

        Args:
            before: s_t of all rows.
            after: s_{t+1}.
            actions: `[r]`.
            rows: `[r]`.
            allowed: What s_t and s_{t+1} allow, `[r, V]` bool each; None: everything.

        Returns:
            `[r, 1]`, log π_ref of this token; with `kl_credit="sequence"` `[r, T]`, that of the responses that end
            now; None if there is nothing to say.
        """
        reference, sequence = self._task.reference, self._task.options.kl_credit == "sequence"
        if reference is None:
            return None
        if self._stepper is not None:
            last = before.ids[rows, before.lengths[rows] - 1]
            return self._stepper.step(last, actions, None if len(rows) == self._rows else rows, allowed[0])[:, None]
        ended = after.finish_reasons[rows] != FinishReason.NONE
        due = rows[ended]
        if self._laws is not None:
            spoken = self._speak_and_offer(before, actions, rows, allowed[1])
            return spoken[rows] * ended[:, None] if sequence else spoken[rows, before.response_lengths[rows]][:, None]
        if not len(due):
            return None
        constraint = self._task.constraint
        grid = None if constraint is None else constraint.grid(*after.id_lists(due))
        told = reference.logprobs(after.ids[due], after.prompt_lengths[due], after.response_lengths[due], grid)
        answers = told.new_zeros(len(rows), told.shape[1])
        answers[ended] = told
        return answers

    def _speak_and_offer(self, before: TokenState, actions: Tensor, rows: Tensor, allowed: Tensor | None) -> Tensor:
        assert self._laws is not None and self._spoken is not None
        self._spoken[rows, before.response_lengths[rows]] = self._laws.step(actions, rows, allowed)
        self._pick(rows)
        return self._spoken

    def _pick(self, rows: Tensor) -> None:
        assert self.top_k is not None and self._laws is not None and self.offered is not None
        for held, new in zip(self.offered, self.top_k(self._laws.logprobs[rows]), strict=True):
            held[rows] = new

    def _blank(self, k: int) -> Offer:
        shape, device = (self._rows, k), self._task.device
        return Offer(
            torch.zeros(shape, dtype=torch.int64, device=device),
            torch.zeros(shape, device=device),
            torch.zeros(shape, dtype=torch.bool, device=device),
        )
