"""Hidden states of rows that grow token by token, on a key/value cache that finds out by itself what is new."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from textenv.attention import plain_attention
from textenv.decoders import row_decoder
from textenv.models import backbone
from textenv.recompute import Decoder, RecomputeDecoder


class PrefixCache:
    """The rows of the last call with their keys and values.

    A row of the next call is cheap if all its tokens but the last are stored, in whatever place: it extends a stored
    row by one token, or is one, or a prefix of one in its own place. All other rows are read anew. A row is stored
    until the next call, which stores its own rows.

    A copy or a pickle of it is empty: what it holds can be computed again.
    """

    def __init__(self) -> None:
        """Hold nothing."""
        self._decoder: Decoder | None = None
        self._ids = np.zeros((0, 0), dtype=np.int64)  # on the host: deciding what is new must not wait for the device
        self._lengths = np.zeros(0, dtype=np.int64)
        self._hidden: Tensor | None = None
        self._width = 0  # up to which the decoder is known to be right

    def clear(self) -> None:
        """Forget everything."""
        PrefixCache.__init__(self)

    def known(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The stored row that each row needs one token more than, `[B]`; -1 where there is none.

        Args:
            ids: `[B, L]`, right-padded.
            lengths: `[B]`, at least 1.
        """
        sources = np.full(len(ids), -1)
        if self._hidden is None:
            return sources
        if len(ids) == len(self._ids):
            alike = _starts_alike(self._ids, self._lengths, ids, lengths - 1)
            sources[alike] = np.flatnonzero(alike)
        missing = np.flatnonzero(sources < 0)
        if len(missing):
            stored = {row[:n].tobytes(): i for i, (row, n) in enumerate(zip(self._ids, self._lengths, strict=True))}
            for b in missing:
                row, n = ids[b], lengths[b]
                whole = stored.get(row[:n].tobytes(), -1)
                sources[b] = stored.get(row[: n - 1].tobytes(), whole)
        return sources

    def hidden(self, model: Any, ids: np.ndarray, lengths: np.ndarray, sources: np.ndarray) -> Tensor:
        """Final hidden states at each row's last token, `[B, H]`; the rows are stored in place of those before.

        Args:
            model: A Hugging Face causal LM or the base of one, at the weights of the last call.
            ids: `[B, L]` int64, right-padded.
            lengths: `[B]`, at least 1.
            sources: What `known` said of them.
        """
        if self._same(ids, lengths):
            assert self._hidden is not None
            return self._hidden
        before, self._hidden = self._hidden, None  # whatever fails from here on leaves nothing half-written to read
        with torch.inference_mode():
            if before is None or (sources < 0).all() or not self._fits(model, ids.shape[1]):
                hidden = self._read(model, ids, lengths)
            else:
                hidden = self._extend(ids, lengths, sources)
        # An ordinary tensor, which may be written and differentiated through.
        with torch.inference_mode(False):
            self._hidden = hidden.clone()
        self._ids, self._lengths = ids.copy(), lengths.copy()
        return self._hidden

    def _fits(self, model: Any, width: int) -> bool:
        """Whether the decoder may go on: rows may outgrow an attention window that a short row did not feel."""
        cached = self._decoder is not None and not isinstance(self._decoder, RecomputeDecoder)
        if width > self._width and cached and not plain_attention(backbone(model), width):
            return False
        self._width = max(width, self._width)
        return True

    def _same(self, ids: np.ndarray, lengths: np.ndarray) -> bool:
        return (
            self._hidden is not None
            and np.array_equal(lengths, self._lengths)
            and bool(_starts_alike(self._ids, self._lengths, ids, lengths).all())
        )

    def _read(self, model: Any, ids: np.ndarray, lengths: np.ndarray) -> Tensor:
        """All rows anew; equal rows are read once."""
        first, place = distinct_rows(ids, lengths)
        decoder = self._decoder = row_decoder(model, len(first), ids.shape[1])
        self._width = ids.shape[1]
        hidden = decoder.prefill(None, torch.from_numpy(ids[first]), torch.from_numpy(lengths[first]))
        if len(first) < len(ids):
            places = torch.from_numpy(place)
            decoder.keep(places)
            hidden = hidden.index_select(0, places.to(hidden.device))
        return hidden

    def _extend(self, ids: np.ndarray, lengths: np.ndarray, sources: np.ndarray) -> Tensor:
        """Known rows move to their places, others are read but for their last tokens; then all take one token."""
        decoder, rows = self._decoder, len(ids)
        assert decoder is not None
        new = np.flatnonzero(sources < 0)
        before = lengths - 1
        if len(sources) != len(self._ids) or not np.array_equal(
            np.delete(sources, new), np.delete(np.arange(rows), new)
        ):
            decoder.keep(torch.from_numpy(np.where(sources < 0, 0, sources)))
        if len(new):
            first, place = distinct_rows(ids[new], before[new])
            chosen = new[first]
            decoder.prefill(torch.from_numpy(chosen), torch.from_numpy(ids[chosen]), torch.from_numpy(before[chosen]))
            if len(first) < len(new):
                places = np.arange(rows)
                places[new] = chosen[place]
                decoder.keep(torch.from_numpy(places))
        decoder.rewind(torch.from_numpy(before))
        return decoder.advance(torch.from_numpy(ids[np.arange(rows), before]))

    def __deepcopy__(self, memo: dict[int, Any]) -> PrefixCache:
        """An empty one."""
        return PrefixCache()

    def __reduce__(self) -> tuple[Any, ...]:
        """An empty one."""
        return PrefixCache, ()


def _starts_alike(stored: np.ndarray, held: np.ndarray, ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`[B]` bool: whether a stored row holds a row's first `counts` tokens."""
    width = min(stored.shape[1], ids.shape[1])
    equal = (stored[:, :width] == ids[:, :width]) | (np.arange(width) >= counts[:, None])
    return equal.all(1) & (counts <= held)


def distinct_rows(ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each distinct row first stands, and which of them each row is."""
    keys: dict[bytes, int] = {}
    place = np.array([keys.setdefault(row[:n].tobytes(), len(keys)) for row, n in zip(ids, lengths, strict=True)])
    first = np.full(len(keys), -1)
    for b in reversed(range(len(place))):
        first[place[b]] = b
    return first, place
