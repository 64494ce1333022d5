"""Aggregations: how a loss `[B, T]` becomes a number, by counts of the whole minibatch (`agents.losses.aggregate`)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from agents.checks import at_least
from agents.losses import aggregate


@dataclass(frozen=True)
class TokenMean:
    """Every token counts the same: Σ lossₜ / tokens of the minibatch."""

    def count(self, mask: Tensor, max_new_tokens: int) -> float:
        """Tokens."""
        return int(mask.sum())

    def __call__(self, loss: Tensor, mask: Tensor, count: float) -> Tensor:
        """Their share."""
        return aggregate(loss, mask, "token", count)


@dataclass(frozen=True)
class SequenceMean:
    """Every response counts the same: Σ_b (mean of its tokens) / responses of the minibatch.

    A token weighs 1 / length of its response, which turns the gradient away from that of the expected return.
    """

    def count(self, mask: Tensor, max_new_tokens: int) -> float:
        """Responses."""
        return int(mask.any(1).sum())

    def __call__(self, loss: Tensor, mask: Tensor, count: float) -> Tensor:
        """Their share."""
        return aggregate(loss, mask, "sequence", count)


@dataclass(frozen=True)
class FixedLength:
    """Every token counts the same, in every minibatch: Σ lossₜ / (responses · length) (Dr. GRPO, arXiv 2503.20783)."""

    length: int | None = None
    """The constant; None: the environment's `max_new_tokens`."""

    def __post_init__(self) -> None:
        """Check it."""
        if self.length is not None:
            at_least("length", self.length, 1)

    def count(self, mask: Tensor, max_new_tokens: int) -> float:
        """Responses times the constant."""
        return int(mask.any(1).sum()) * (self.length or max_new_tokens)

    def __call__(self, loss: Tensor, mask: Tensor, count: float) -> Tensor:
        """Their share."""
        return aggregate(loss, mask, "token", count)
