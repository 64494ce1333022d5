"""What a token-by-token decoder does, and the one that does it without a cache, for any model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from textenv.models import backbone, hidden_states


class Decoder(Protocol):
    """What `RowDecoder` and `RecomputeDecoder` have in common."""

    @property
    def lengths(self) -> Tensor:
        """How many tokens each row holds: `[rows]` int64."""
        ...

    def prefill(self, rows: Tensor | None, ids: Tensor, lengths: Tensor) -> Tensor:
        """Forget some rows and read new tokens into them; the hidden state of each one's last token `[n, H]`."""
        ...

    def advance(self, tokens: Tensor, rows: Tensor | None = None) -> Tensor:
        """Append one token to some rows; the final hidden state at it `[n, H]`."""
        ...

    def rewind(self, lengths: Tensor) -> None:
        """Forget the last tokens of each row, down to `lengths [rows]`."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these, which become rows 0, 1, ...; a row named twice becomes two."""
        ...


class RecomputeDecoder:
    """The same interface without a cache: the whole rows are forwarded at each step. Slow, and right for any model."""

    def __init__(self, model: Any, rows: int, columns: int) -> None:
        """Make room for `rows` rows of `columns` tokens (it grows when a row gets longer)."""
        check_size(rows, columns)
        self._model = model
        self._checkpointing = [m for m in backbone(model).modules() if can_checkpoint(m)]
        self._device = next(backbone(model).parameters()).device
        self._ids = torch.zeros(rows, columns, dtype=torch.long, device=self._device)
        self._lengths = np.zeros(rows, dtype=np.int64)

    @property
    def lengths(self) -> Tensor:
        """How many tokens each row holds: `[rows]` int64 on the model's device."""
        return torch.from_numpy(self._lengths.copy()).to(self._device)

    def prefill(self, rows: Tensor | None, ids: Tensor, lengths: Tensor) -> Tensor:
        """Forget some rows and read new tokens into them; see `RowDecoder.prefill`."""
        index, counts = check_prefill(rows, ids, lengths, len(self._lengths))
        self._reserve(ids.shape[1])
        self._lengths[index] = counts
        self._ids[index, : ids.shape[1]] = ids.to(self._device)
        return self._hidden(index)

    def advance(self, tokens: Tensor, rows: Tensor | None = None) -> Tensor:
        """Append one token to some rows; see `RowDecoder.advance`."""
        index = np.arange(len(self._lengths)) if rows is None else rows.cpu().numpy()
        if tokens.shape != index.shape:
            raise ValueError(f"tokens must be one per row, {len(index)} in all; got shape {tuple(tokens.shape)}")
        self._reserve(int(self._lengths[index].max()) + 1)
        self._ids[index, self._lengths[index]] = tokens.to(self._device)
        self._lengths[index] += 1
        return self._hidden(index)

    def rewind(self, lengths: Tensor) -> None:
        """Forget the last tokens of each row; see `RowDecoder.rewind`."""
        self._lengths = check_rewind(self._lengths, lengths)

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but `rows`, which become rows 0, 1, ...; a row named twice becomes two."""
        index = rows.cpu().numpy()
        self._ids, self._lengths = self._ids[index], self._lengths[index]

    @torch.no_grad()
    def _hidden(self, index: np.ndarray) -> Tensor:
        counts = self._lengths[index]
        ids = self._ids[index, : max(1, int(counts.max()))]
        with checkpointing_off(self._checkpointing):
            hidden = hidden_states(self._model, ids)
        last = torch.from_numpy(np.maximum(counts - 1, 0)).to(self._device)
        return hidden[torch.arange(len(last), device=self._device), last]

    def _reserve(self, columns: int) -> None:
        if columns > self._ids.shape[1]:
            more = self._ids.new_zeros(len(self._ids), max(columns, 2 * self._ids.shape[1]) - self._ids.shape[1])
            self._ids = torch.cat([self._ids, more], dim=1)


def can_checkpoint(module: torch.nn.Module) -> bool:
    """Whether a module has transformers' gradient-checkpointing switch."""
    return isinstance(getattr(module, "gradient_checkpointing", None), bool)


@contextmanager
def checkpointing_off(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Switch gradient checkpointing off for a while: in train mode transformers would silently drop the cache."""
    active = [module for module in modules if module.gradient_checkpointing]
    for module in active:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in active:
            module.gradient_checkpointing = True  # type: ignore[assignment]


def check_size(rows: int, columns: int) -> None:
    """Refuse a decoder without room.

    Raises:
        ValueError: If `rows` or `columns` is not positive.
    """
    if rows < 1 or columns < 1:
        raise ValueError(f"rows and columns must be positive; got {rows} and {columns}")


def check_prefill(rows: Tensor | None, ids: Tensor, lengths: Tensor, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers and lengths of a prefill, on the host.

    Raises:
        ValueError: If shapes or lengths do not fit.
    """
    index = np.arange(total) if rows is None else rows.cpu().numpy()
    counts = lengths.cpu().numpy()
    if ids.ndim != 2 or len(ids) != len(index) or counts.shape != index.shape:
        raise ValueError(
            f"ids must be [n, P] and lengths [n] with n = {len(index)} rows; got {tuple(ids.shape)} and {counts.shape}"
        )
    if len(counts) and (counts.min() < 0 or counts.max() > ids.shape[1]):
        raise ValueError(f"lengths must be between 0 and {ids.shape[1]}; got {counts.min()} to {counts.max()}")
    return index, counts


def check_rewind(held: np.ndarray, lengths: Tensor) -> np.ndarray:
    """New lengths of all rows, on the host.

    Raises:
        ValueError: If they are not one per row, each from 0 to what the row holds.
    """
    counts = lengths.cpu().numpy().astype(np.int64)
    if counts.shape != held.shape or (counts < 0).any() or (counts > held).any():
        raise ValueError(
            f"lengths: expected one per row, from 0 to what it holds, {held.tolist()}; got {lengths.tolist()}"
        )
    return counts
