"""What every token of N rows earned and cost: the reward, its parts, and the log-probs behind them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

import textenv.kl as kl
from textenv.task import Task
from textenv.types import FinishReason

PARTS = ("score", "kl", "missing_eos")
"""What the reward is the sum of; each is told as `reward_parts/...`, beside those of the reward function."""


class Answers(NamedTuple):
    """What models and reward function said about one token of r rows."""

    earned: Tensor
    """`[r]`: what the reward function pays now: the score, or with dense rewards this token's value."""
    score: Tensor
    """`[r]`: the score of the whole response; 0 until it is due."""
    parts: Mapping[str, Tensor]
    """`[r]` each: what the reward function says that `earned` was made of."""
    logprobs: Tensor | None
    """`[r]`: log π of the token, where the environment knows it."""
    ref_logprobs: Tensor | None
    """`[r, 1]`: log π_ref of the token; or `[r, T]`, of the whole response of rows that end now and 0 elsewhere."""


class Payments:
    """The books of N rows: `latest` holds what each row was told last, `history` what its tokens were paid."""

    def __init__(self, task: Task, rows: int) -> None:
        """N rows, nothing paid."""
        self.task = task
        keys = ("score", "ref_logprob", "kl", *(f"reward_parts/{part}" for part in (*PARTS, *task.reward.names)))
        self.latest = {key: torch.zeros(rows, device=task.device) for key in keys}
        self.history = {
            key: torch.zeros(rows, task.options.max_new_tokens, device=task.device)
            for key in ("reward", "earned", "logprob", "ref_logprob")
        }

    def begin(self, rows: Tensor) -> None:
        """Forget some rows, `[r]`."""
        for tensor in (*self.latest.values(), *self.history.values()):
            tensor[rows] = 0.0

    @property
    def rewards(self) -> Tensor:
        """`[N]` float32: the reward of each row's last step."""
        return sum((self.latest[f"reward_parts/{part}"] for part in PARTS[1:]), self.latest["reward_parts/score"])

    def earned_before(self, rows: Tensor) -> Tensor:
        """`[r]`: the sum of what earlier tokens of these rows earned."""
        return self.history["earned"][rows].sum(1)

    def pay(self, rows: Tensor, steps: Tensor, reasons: Tensor, answers: Answers) -> None:
        """Book one token of some rows.

        Args:
            rows: `[r]` int64.
            steps: `[r]` int64, t of the token.
            reasons: `[r]` int8 of `FinishReason`, with the token.
            answers: What was said about it.
        """
        history = self.history
        if answers.logprobs is not None:
            history["logprob"][rows, steps] = answers.logprobs
        if answers.ref_logprobs is not None:
            self._book_reference(rows, steps, answers.ref_logprobs)
        ended = reasons != FinishReason.NONE
        ref_logprob, known, charge = self._kl(rows, steps, ended, answers)
        penalty = -self.task.options.missing_eos_penalty * (reasons == FinishReason.LENGTH).float()
        for key, amount in (
            ("score", answers.score),
            ("ref_logprob", ref_logprob),
            ("kl", known),
            ("reward_parts/score", answers.earned),
            ("reward_parts/kl", charge),
            ("reward_parts/missing_eos", penalty),
            *((f"reward_parts/{part}", amount) for part, amount in answers.parts.items()),
        ):
            self.latest[key][rows] = amount
        history["earned"][rows, steps] = answers.earned
        history["reward"][rows, steps] = answers.earned + charge + penalty

    def _book_reference(self, rows: Tensor, steps: Tensor, ref_logprobs: Tensor) -> None:
        if self.task.options.kl_credit == "token":
            self.history["ref_logprob"][rows, steps] = ref_logprobs[:, 0]
        else:
            self.history["ref_logprob"][rows, : ref_logprobs.shape[1]] = ref_logprobs

    def _kl(self, rows: Tensor, steps: Tensor, ended: Tensor, answers: Answers) -> tuple[Tensor, Tensor, Tensor]:
        """`[r]` each: log π_ref of the token and its k1, as far as they are known, and what is charged now."""
        zeros = torch.zeros_like(answers.earned)
        if self.task.reference is None:
            return zeros, zeros, zeros
        sequence = self.task.options.kl_credit == "sequence"
        if sequence and not bool(ended.any()):
            return zeros, zeros, zeros
        told = rows if sequence else (rows, steps)
        refs, logprobs = self.history["ref_logprob"][told], self.history["logprob"][told]
        charges = kl.token_charges(logprobs, refs, kl_coef=self.task.kl_coef, kl_source=self.task.kl_source)
        ref = refs.gather(1, steps[:, None])[:, 0] if sequence else refs
        known = zeros if answers.logprobs is None else answers.logprobs - ref
        if not sequence:
            return ref, known, charges
        # The reference speaks at the end. Both histories are 0 past it, so the sum is that of the response.
        due = ended.float()
        return ref * due, known * due, charges.sum(1) * due
