"""The k most probable next tokens under the reference, offered to learners that cannot choose among all V."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

LOWEST = float(torch.finfo(torch.float32).min)
"""What stands for log 0 in an observation, whose space is bounded."""


class Offer(NamedTuple):
    """k candidates of n rows, most probable first, ties by id."""

    ids: Tensor
    """`[n, k]` int64."""
    logprobs: Tensor
    """`[n, k]` float32: log π_ref of each, under the full law."""
    distinct: Tensor
    """`[n, k]` bool: false in slots that repeat the first candidate, because fewer than k tokens are allowed."""


@dataclass(frozen=True)
class TopK:
    """Which tokens are offered."""

    k: int
    """How many."""
    always: tuple[int, ...] = ()
    """Ids that are among them however improbable, where the constraint allows them."""

    @classmethod
    def of(cls, k: int, always: Sequence[int], vocab_size: int) -> TopK:
        """Checked.

        Raises:
            ValueError: If `k` is not in [1, V], or `always` holds more than k ids or one that is none.
        """
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= vocab_size:
            raise ValueError(f"k: expected an integer in [1, {vocab_size}], got {k!r}")
        ids: tuple[Any, ...] = tuple(always) if isinstance(always, Sequence) else (None,)
        if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab_size for i in ids):
            raise ValueError(f"always: expected token ids in [0, {vocab_size}), got {always!r}")
        ids = tuple(dict.fromkeys(ids))
        if len(ids) > k:
            raise ValueError(f"always: expected at most k={k} ids, got {len(ids)}")
        return cls(k, ids)

    def __call__(self, logprobs: Tensor) -> Offer:
        """The offer in each of n states.

        Args:
            logprobs: `[n, V]`, −inf where a token may not be chosen; at least one a row may.

        >>> TopK(2)(torch.tensor([[0.2, 0.5, 0.2, 0.1]]).log()).ids.tolist()
        [[1, 0]]
        >>> TopK(2, always=(3,))(torch.tensor([[0.2, 0.5, 0.2, 0.1]]).log()).ids.tolist()
        [[1, 3]]
        """
        ranks = logprobs
        if self.always:
            columns = list(self.always)
            ranks = logprobs.clone()
            # Above every log-probability, except where it is −inf: what is not allowed is not offered.
            ranks[:, columns] += torch.where(logprobs[:, columns] > -torch.inf, 1 - logprobs[:, columns], 0.0)
        ids = top_ids(ranks, self.k).sort(dim=1).values
        values = logprobs.gather(1, ids)
        values, order = values.sort(dim=1, descending=True, stable=True)
        ids = ids.gather(1, order)
        distinct = values > -torch.inf
        distinct[:, 0] = True
        ids = torch.where(distinct, ids, ids[:, :1])
        return Offer(ids, torch.where(distinct, values, values[:, :1]).clamp(min=LOWEST), distinct)


def top_ids(values: Tensor, k: int) -> Tensor:
    """`[n, k]`: where the k largest of each row of `[n, V]` are, in no order; of equal ones the first.

    `torch.topk` leaves open which of equal values it takes.

    >>> top_ids(torch.tensor([[1.0, 3.0, 1.0, 1.0]]), 2).sort().values.tolist()
    [[0, 1]]
    """
    top, ids = values.topk(k, dim=1)
    least = top[:, -1:]
    wanted = (top == least).sum(1)
    equal = (values == least).sum(1)
    # Where even −inf is among the k, which one it is does not matter: the slot is not distinct.
    for row in ((equal > wanted) & (least[:, 0] > -torch.inf)).nonzero()[:, 0].tolist():
        above = (values[row] > least[row]).nonzero()[:, 0]
        ids[row] = torch.cat([above, (values[row] == least[row]).nonzero()[: int(wanted[row]), 0]])
    return ids
