"""Forwards of right-padded rows that compute their tokens and not their padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from textenv.attention import can_attend, plain_attention
from textenv.short_attention import is_reduced, is_small, products_win

_WORTH_IT, _WORTH_IT_SHORT = 0.9, 0.95
"""Share of tokens among the cells of the batch up to which padding is left out: laying out has a price too, which short
rows that learn win back by their attention."""

_CALL_IN_CELLS = {"cpu": 2**10, "cuda": 2**22}
"""Cells of attention (queries × keys of a row) that cost as much as one more call of the kernel, about: measured on a
CPU (of 512 to 8192), reckoned for a GPU (60 µs of launches, 4 kFLOP a cell)."""

_REGISTER = {"cpu": 16}
"""Width to which rows of half of it and more are padded at least: a softmax over fewer numbers than a register holds
takes ten times as long a number."""

_packs: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class Group(NamedTuple):
    """Rows of similar lengths, which attention pads to the longest of them."""

    rows: int
    """n."""
    width: int
    """W, of the longest, or that of a register."""


@dataclass(frozen=True)
class Packing:
    """N tokens of B rows, row after row, the shortest row first."""

    rows: int
    """B."""
    width: int
    """L, the longest row."""
    cells: Tensor
    """`[N]` int64: each token's place in the flattened batch `[B, L]`, whose rows keep their order."""
    positions: Tensor
    """`[N]` int64: each token's place in its row."""
    starts: Tensor
    """`[B]` int64: where each row begins among the N tokens."""
    places: Tensor
    """`[N]` int64: each token's place among the cells of all groups, `[Σ n·W]`, group after group."""
    groups: tuple[Group, ...]
    """What attention computes together."""
    mask: Tensor
    """`[1, 1, 1, 1]`: what a model hands on unread, as a mask that somebody has prepared."""
    made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What layers made for it, to be made once."""

    @classmethod
    def of(cls, lengths: Tensor) -> Packing:
        """Of rows of so many tokens, `[B]`, each at least 1.

        >>> packing = Packing.of(torch.tensor([3, 2]))
        >>> packing.cells.tolist(), packing.positions.tolist(), packing.starts.tolist()
        ([3, 4, 0, 1, 2], [0, 1, 0, 1, 2], [2, 0])
        """
        counts = lengths.cpu().numpy()
        order = np.argsort(counts, kind="stable")
        sizes, width = counts[order], int(counts.max())
        ends = np.cumsum(sizes)
        rank, positions = (np.arange(width) < sizes[:, None]).nonzero()
        starts = np.empty_like(ends)
        starts[order] = ends - sizes

        def on_device(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(lengths.device)

        register = _REGISTER.get(lengths.device.type, 1)
        widths = np.where(2 * sizes < register, sizes, np.maximum(sizes, register))
        spans = _alike(widths, _CALL_IN_CELLS.get(lengths.device.type, 2**22))
        groups = tuple(Group(high - low, int(widths[high - 1])) for low, high in spans)
        cells = order[rank] * width + positions
        begins = np.cumsum([0] + [wide for rows, wide in groups for _ in range(rows)])
        places = begins[rank] + positions
        mask = torch.zeros(1, 1, 1, 1, device=lengths.device)
        cells, positions, starts, places = (on_device(table) for table in (cells, positions, starts, places))
        return cls(len(counts), width, cells, positions, starts, places, groups, mask)

    @property
    def size(self) -> int:
        """Cells of all groups, Σ n·W."""
        return sum(rows * width for rows, width in self.groups)

    def remembered(self, name: Any, make: Callable[[], Any]) -> Any:
        """What was made for this packing under this name; made now if it was not."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def padded(self, tokens: Tensor) -> Tensor:
        """Tokens `[N, …]` at their places among the cells of all groups, `[Σ n·W, …]`, and zeros between."""
        return tokens.new_zeros(self.size, *tokens.shape[1:]).index_copy_(0, self.places, tokens)

    def split(self, cells: Tensor) -> list[Tensor]:
        """Of the cells of all groups, each group's `[n, W, …]`, as views."""
        parts = cells.split([rows * width for rows, width in self.groups])
        return [part.view(*group, *part.shape[1:]) for group, part in zip(self.groups, parts, strict=True)]

    def unpadded(self, cells: Tensor) -> Tensor:
        """The tokens `[N, …]` of the cells of all groups."""
        return cells.index_select(0, self.places)


def _alike(sizes: np.ndarray, call: int) -> list[tuple[int, int]]:
    """Cut ascending lengths into spans, each in two for as long as that spares more cells than a call is worth.

    >>> _alike(np.array([10, 12, 100, 100]), 2000)
    [(0, 2), (2, 4)]
    """
    spans, left = [], [(0, len(sizes))]
    while left:
        low, high = left.pop()
        middle = (low + high) // 2
        spared = (middle - low) * (int(sizes[high - 1]) ** 2 - int(sizes[middle - 1]) ** 2)
        if middle > low and spared > call:
            left += [(middle, high), (low, middle)]
        else:
            spans.append((low, high))
    return spans


def packed_hidden(trunk: Any, input_ids: Tensor, packing: Packing) -> Tensor:
    """Final hidden states of the tokens, `[N, H]`, each as in a forward of its row alone.

    Nothing is masked: in a causal model no token sees the padding on its right, positions count from 0, and attention
    keeps its fast path. Where much of the batch is padding and the model allows it, all but attention is computed of
    the N tokens alone.

    Args:
        trunk: A transformers model without its head.
        input_ids: `[B, L]` or wider, right-padded with anything.
        packing: Of the rows' lengths.
    """
    cells = input_ids[:, : packing.width].reshape(-1)
    tokens = cells.index_select(0, packing.cells)
    if len(tokens) <= _worth_it(trunk, packing) * len(cells) and _can_pack(trunk, packing.width):
        return _packed(trunk, tokens, packing)
    padded = cells.new_zeros(len(cells)).index_copy(0, packing.cells, tokens)  # no padding id is special
    hidden = trunk(input_ids=padded.view(packing.rows, packing.width), use_cache=False).last_hidden_state.flatten(0, 1)
    return hidden if len(tokens) == len(cells) else hidden.index_select(0, packing.cells)


def _packed(trunk: Any, tokens: Tensor, packing: Packing) -> Tensor:
    return trunk(
        input_ids=tokens[None],
        attention_mask=packing.mask,
        position_ids=packing.positions[None],
        use_cache=False,
        packing=packing,
    ).last_hidden_state[0]


def _worth_it(trunk: Any, packing: Packing) -> float:
    weight, small = next(trunk.parameters()), _has_small_heads(trunk.config.get_text_config())
    learns = torch.is_grad_enabled()
    if not products_win(weight, packing.width, small=small, learns=learns):
        return _WORTH_IT
    widened = packing.size > 1.2 * packing.rows * packing.width
    slow = small or (learns and is_reduced(weight))  # the fused kernel, with or without padding
    return 1.0 if slow and not widened else _WORTH_IT_SHORT


def _has_small_heads(config: Any) -> bool:
    try:
        return is_small(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    # A model without heads or with another name for them, or layers that differ: transformers raises RuntimeError.
    except (AttributeError, RuntimeError, TypeError, ZeroDivisionError):
        return False


def _can_pack(trunk: Any, width: int) -> bool:
    config = trunk.config.get_text_config()
    if getattr(trunk, "_compiled_call_impl", None) is not None:
        return False  # each packing is a shape of its own, and would be compiled anew
    if config._attn_implementation != "sdpa" or not plain_attention(trunk, width):
        return False
    if trunk not in _packs:
        _packs[trunk] = can_attend(trunk) and _agrees(trunk)
    return _packs[trunk]


@torch.no_grad()
def _agrees(trunk: Any) -> bool:
    """Whether packed rows come out as padded ones: a model may not hand on what its attention is to be told."""
    device = next(trunk.parameters()).device
    packing, one_row = (Packing.of(torch.tensor(lengths, device=device)) for lengths in ([3, 1, 2], [6]))
    one_row = replace(one_row, positions=packing.positions)
    ids = torch.tensor([[1, 2, 3], [2, 0, 0], [3, 1, 0]], device=device)
    ids = ids.clamp(max=trunk.config.get_text_config().vocab_size - 1)
    tokens = ids.reshape(-1).index_select(0, packing.cells)
    with torch.autocast(device.type, enabled=False):
        padded = trunk(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1).index_select(0, packing.cells)
        try:
            packed, leaking = (_packed(trunk, tokens, one) for one in (packing, one_row))
        except (TypeError, NotImplementedError):
            return False
    # Rounding, against what rows that see each other would do: states may have channels that are large and constant.
    error, leak = (float((found - padded).float().norm()) for found in (packed, leaking))
    return error < leak * (0.2 if padded.dtype in (torch.bfloat16, torch.float16) else 1e-3)
