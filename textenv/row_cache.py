"""Token-by-token forwards on a key/value cache whose rows start, grow and restart independently."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from textenv.attention import can_attend, one_token_attention, one_token_mask, plain_attention
from textenv.models import Shared, backbone, unwrap
from textenv.recompute import (
    can_checkpoint,
    check_prefill,
    check_rewind,
    check_size,
    checkpointing_off,
)


class _Plan:
    """Where the current forward writes, set by the decoder and read by every layer."""

    def __init__(self, every: Tensor) -> None:
        self.every = every  # the numbers of all rows
        self.rows: Tensor | None = None  # None: all rows, in order
        self.start = 0  # the shared write position, where there is one
        self.positions: Tensor | None = None  # one write position per row, where they differ
        self.width = 0  # columns that attention looks at


class _RowLayer(CacheLayerMixin):
    """Keys and values of one layer: `[rows, heads, columns, dim]`, rows left-aligned."""

    is_sliding = False

    def __init__(self, plan: _Plan, rows: int, columns: int) -> None:
        super().__init__()
        self.plan, self.rows, self.columns = plan, rows, columns

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def empty(like: Tensor) -> Tensor:
            # Zeros: a masked cell still multiplies its value by 0, and 0 times garbage may be NaN.
            return like.new_zeros(self.rows, like.shape[1], self.columns, like.shape[3])

        self.keys, self.values = empty(key_states), empty(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        plan = self.plan
        return self._write(self.keys, key_states, plan), self._write(self.values, value_states, plan)  # type: ignore[arg-type]

    @staticmethod
    def _write(store: Tensor, new: Tensor, plan: _Plan) -> Tensor:
        rows, count = plan.rows, new.shape[2]
        if plan.positions is not None:
            store[plan.every if rows is None else rows, :, plan.positions] = new[:, :, 0]
        elif rows is None:
            store[:, :, plan.start : plan.start + count] = new
        else:
            store[rows, :, plan.start : plan.start + count] = new
        if plan.start == 0 and plan.width == count and plan.positions is None:
            return new  # a prefill attends to what it brings
        return store[:, :, : plan.width] if rows is None else store[:, :, : plan.width].index_select(0, rows)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.plan.width, 0

    def get_seq_length(self) -> int:
        return self.plan.start

    def get_max_length(self) -> int:
        return -1

    def grow(self, columns: int) -> None:
        if self.is_initialized:
            old = self.keys, self.values
            self.columns = columns
            self.lazy_initialization(*old)  # type: ignore[arg-type]
            self.keys[:, :, : old[0].shape[2]] = old[0]  # type: ignore[index]
            self.values[:, :, : old[1].shape[2]] = old[1]  # type: ignore[index]
        self.columns = columns

    def keep(self, rows: Tensor) -> None:
        self.rows = len(rows)
        if self.is_initialized:
            self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)  # type: ignore[union-attr]


class RowDecoder:
    """One-token forwards on keys and values kept per row, each row with its own length.

    While all rows have the same length a step writes one slice, needs no mask and has one position for all; otherwise
    each row writes at its own place and a 2D mask hides what lies beyond it. No gradients. The model's weights must
    not change between a `prefill` and the `advance`s that build on it.
    """

    def __init__(self, model: Any, rows: int, columns: int) -> None:
        """Make room for `rows` rows of `columns` tokens (it grows when a row gets longer).

        Args:
            model: A Hugging Face causal LM, or a `Shared` one.
            rows: Number of rows.
            columns: Tokens per row to make room for.
        """
        check_size(rows, columns)
        self._shared = model if isinstance(model, Shared) else Shared(model)
        self._backbone = backbone(model)
        self._device = next(self._backbone.parameters()).device
        self._plan = _Plan(torch.arange(rows, device=self._device))
        self._config = unwrap(model).config.get_text_config()
        self._layers = [_RowLayer(self._plan, rows, columns) for _ in range(self._config.num_hidden_layers)]
        self._cache = Cache(layers=list(self._layers))
        self._lengths = np.zeros(rows, dtype=np.int64)  # on the host: choosing the path must not wait for the device
        self._columns = columns
        self._position_ids = torch.arange(columns, device=self._device)
        self._attention_by_name = can_attend(self._backbone)
        # A compiled forward is for the shapes of learning; each step of decoding has another, and would compile anew.
        compiled = getattr(self._backbone, "_compiled_call_impl", None) is not None
        self._call: Any = self._backbone._call_impl if compiled else self._backbone  # type: ignore[union-attr]
        self._checkpointing = [m for m in self._backbone.modules() if can_checkpoint(m)]

    @property
    def lengths(self) -> Tensor:
        """How many tokens each row holds: `[rows]` int64 on the model's device."""
        return torch.from_numpy(self._lengths.copy()).to(self._device)

    @torch.no_grad()
    def prefill(self, rows: Tensor | None, ids: Tensor, lengths: Tensor) -> Tensor:
        """Forget some rows and read new tokens into them.

        Args:
            rows: Distinct row numbers `[n]`, None for all.
            ids: Token ids `[n, P]`, right-padded with any legal id.
            lengths: How many of them count, `[n]`; 0 leaves an empty row.

        Returns:
            Final hidden state at each row's last token `[n, H]`; of no meaning for a row of length 0. Callers that keep
            the last token back for `advance` ignore it.

        Raises:
            ValueError: If shapes or lengths do not fit.
        """
        index, counts = check_prefill(rows, ids, lengths, len(self._lengths))
        width = int(counts.max(initial=0))
        self._lengths[index] = counts
        if width == 0:
            return torch.zeros(
                len(ids), self._hidden_size, dtype=next(self._backbone.parameters()).dtype, device=self._device
            )
        self._reserve(width)
        plan = self._plan
        plan.rows = None if rows is None else rows.to(self._device)
        plan.start, plan.positions, plan.width = 0, None, width
        hidden = self._forward(ids[:, :width].to(self._device), None, self._position_ids[None, :width])
        if (counts == width).all():
            return hidden[:, -1]
        last = torch.from_numpy(np.maximum(counts - 1, 0)).to(self._device)
        return hidden[torch.arange(len(last), device=self._device), last]

    @torch.no_grad()
    def advance(self, tokens: Tensor, rows: Tensor | None = None) -> Tensor:
        """Append one token to some rows.

        Args:
            tokens: Token ids `[n]`.
            rows: Distinct row numbers `[n]`, None for all rows in order.

        Returns:
            Final hidden state at the new tokens `[n, H]`.

        Raises:
            ValueError: If `tokens` and `rows` do not fit.
        """
        index = slice(None) if rows is None else rows.cpu().numpy()
        old = self._lengths[index]
        if tokens.shape != old.shape:
            raise ValueError(f"tokens must be one per row, {len(old)} in all; got shape {tuple(tokens.shape)}")
        longest = int(old.max())
        self._reserve(longest + 1)
        plan = self._plan
        plan.rows = None if rows is None else rows.to(self._device)
        plan.start, plan.width = longest, longest + 1
        if int(old.min()) == longest:
            plan.positions, mask = None, None
            position_ids = self._position_ids[None, longest : longest + 1]
        else:
            plan.positions = torch.from_numpy(old.copy()).to(self._device)
            position_ids = plan.positions[:, None]
            mask = self._position_ids[None, : longest + 1] <= position_ids
            if self._attention_by_name:
                mask = one_token_mask(self._config, mask)
        hidden = self._one_token(tokens.to(self._device), mask, position_ids)
        self._lengths[index] += 1
        return hidden

    def fixed_step(self) -> Callable[[Tensor], Tensor]:
        """What appends one token to every row, as `advance(tokens)` does, with shapes and addresses that never change.

        Nothing of it waits for the host, so a CUDA graph can hold it. Attention looks at all reserved columns. As long
        as it is used, the decoder must not be used otherwise; afterwards `lengths` are those from before.

        Raises:
            ValueError: If the model does not attend by "sdpa": others would add the mask, of bools, to their scores.
        """
        if self._config._attn_implementation != "sdpa":
            raise ValueError(f'attention: expected "sdpa", got {self._config._attn_implementation!r}')
        positions = self.lengths
        columns = self._position_ids[: self._columns]

        @torch.no_grad()
        def step(tokens: Tensor) -> Tensor:
            plan = self._plan
            plan.rows, plan.start, plan.width, plan.positions = None, 1, self._columns, positions
            shown = (columns <= positions[:, None])[:, None, None]
            hidden = self._one_token(tokens, shown, positions[:, None])
            positions.add_(1)
            return hidden

        return step

    def rewind(self, lengths: Tensor) -> None:
        """Forget the last tokens of each row, whose places are then written anew.

        Args:
            lengths: How many tokens stay, one per row, `[rows]`.

        Raises:
            ValueError: If a row does not hold so many.
        """
        self._lengths = check_rewind(self._lengths, lengths)

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but `rows`, which become rows 0, 1, ...; a row named twice becomes two."""
        index = rows.to(self._device)
        for layer in self._layers:
            layer.keep(index)
        self._plan.every = torch.arange(len(index), device=self._device)
        self._lengths = self._lengths[rows.cpu().numpy()]

    @property
    def _hidden_size(self) -> int:
        return self._config.hidden_size

    def _one_token(self, tokens: Tensor, mask: Tensor | None, position_ids: Tensor) -> Tensor:
        with one_token_attention(self._config) if self._attention_by_name else nullcontext():
            return self._forward(tokens[:, None], mask, position_ids)[:, 0]

    def _forward(self, ids: Tensor, mask: Tensor | None, position_ids: Tensor) -> Tensor:
        with self._shared.scope(), checkpointing_off(self._checkpointing):
            return self._call(
                input_ids=ids,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=self._cache,
                use_cache=True,
            ).last_hidden_state

    def _reserve(self, columns: int) -> None:
        if columns <= self._columns:
            return
        if not plain_attention(self._backbone, columns):
            raise ValueError(f"columns: this model's attention window is shorter than {columns}; use row_decoder(...)")
        # Room for as many again, but not beyond an attention window.
        twice = 2 * self._columns
        self._columns = max(columns, twice) if plain_attention(self._backbone, twice) else columns
        self._position_ids = torch.arange(self._columns, device=self._device)
        for layer in self._layers:
            layer.grow(self._columns)
