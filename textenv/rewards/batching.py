"""Batches of similar lengths: little padding, and as many tokens in each as a forward may hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of rows, the longest first; one row at least is in each batch.

    >>> list(by_length([3, 9, 1, 8], 18))
    [[3, 1], [2, 0]]
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    while order:
        batch = order[-max(1, batch_tokens // max(1, lengths[order[-1]])) :]
        del order[-len(batch) :]
        yield batch


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids `[B, L]`, right-padded with 0, and lengths `[B]`."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(list(row), dtype=torch.long) for row in rows], batch_first=True)
    return ids.to(device), torch.tensor([len(row) for row in rows], device=device)


def check_lengths(lengths: Sequence[int], context: int | None) -> None:
    """Raise unless every row fits.

    Raises:
        ValueError: Naming the row.
    """
    for row, length in enumerate(lengths):
        if not length or (context is not None and length > context):
            raise ValueError(f"expected 1 to {context} tokens, got {length} in text {row}")
