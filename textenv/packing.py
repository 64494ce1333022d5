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
from textenv.prefixes import stand_ins
from textenv.short_attention import is_reduced, is_small, products_win

_WORTH_IT, _WORTH_IT_SHORT = 0.9, 0.95
"""Share of the cells of the batch that must be computed, up to which the others are left out: laying out has a price
too, which short rows that learn win back by their attention."""

_WORTH_SHARING = 0.97
"""Share of distinct tokens up to which those that rows have in common are computed once: what that takes is a hundredth
of an update of short rows."""

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
    """N tokens of B rows, row after row, the shortest row first; M of them are computed."""

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
    distinct: Tensor | None = None
    """`[M]` int64: which of the N tokens are computed, one for all that follow the same prefix; None: all of them."""
    same_as: Tensor | None = None
    """`[N]` int64: which of the M each token is."""
    ids: Tensor | None = field(default=None, repr=False)
    """The batch whose rows begin alike; None: any."""
    made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What layers made for it, to be made once."""

    @classmethod
    def of(cls, lengths: Tensor, ids: Tensor | None = None) -> Packing:
        """Of rows of so many tokens, `[B]`, each at least 1.

        Args:
            lengths: `[B]`.
            ids: `[B, L]` or wider, right-padded with anything: what will be computed. Where rows begin alike, as
                prompts of one group or behind one instruction do, their tokens are computed once. None: each is.

        >>> packing = Packing.of(torch.tensor([3, 2]))
        >>> packing.cells.tolist(), packing.positions.tolist(), packing.starts.tolist()
        ([3, 4, 0, 1, 2], [0, 1, 0, 1, 2], [2, 0])
        >>> packing = Packing.of(torch.tensor([3, 2]), torch.tensor([[7, 8, 9], [7, 5, 0]]))
        >>> packing.distinct.tolist(), packing.same_as.tolist()
        ([0, 1, 3, 4], [0, 1, 0, 2, 3])
        """
        counts = lengths.cpu().numpy().astype(np.int64)
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
        shared = None if ids is None else _shared(ids[:, :width].cpu().numpy(), counts, order[rank], positions)
        mask = torch.zeros(1, 1, 1, 1, device=lengths.device)
        cells, positions, starts, places = (on_device(table) for table in (cells, positions, starts, places))
        packing = cls(len(counts), width, cells, positions, starts, places, groups, mask)
        if shared is None:
            return packing
        distinct, same_as = map(on_device, shared)
        return replace(packing, distinct=distinct, same_as=same_as, ids=ids)

    @property
    def size(self) -> int:
        """Cells of all groups, Σ n·W."""
        return sum(rows * width for rows, width in self.groups)

    def remembered(self, name: Any, make: Callable[[], Any]) -> Any:
        """What was made for this packing under this name; made now if it was not."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    @property
    def count(self) -> int:
        """M."""
        return len(self.cells if self.distinct is None else self.distinct)

    def once(self, tokens: Tensor) -> Tensor:
        """Of the tokens `[N, …]` the `[M, …]` that are computed."""
        return tokens if self.distinct is None else tokens.index_select(0, self.distinct)

    def everywhere(self, computed: Tensor) -> Tensor:
        """Of `[M, …]` that were computed what each token is, `[N, …]`."""
        return computed if self.same_as is None else computed.index_select(0, self.same_as)

    def padded(self, computed: Tensor) -> Tensor:
        """`[M, …]` at their places among the cells of all groups, `[Σ n·W, …]`, and zeros between."""
        tokens = self.everywhere(computed)
        return tokens.new_zeros(self.size, *tokens.shape[1:]).index_copy_(0, self.places, tokens)

    def split(self, cells: Tensor) -> list[Tensor]:
        """Of the cells of all groups, each group's `[n, W, …]`, as views."""
        parts = cells.split([rows * width for rows, width in self.groups])
        return [part.view(*group, *part.shape[1:]) for group, part in zip(self.groups, parts, strict=True)]

    def unpadded(self, cells: Tensor) -> Tensor:
        """What was computed, `[M, …]`, of the cells of all groups."""
        return cells.index_select(0, self.remembered("once", lambda: self.once(self.places)))


def _alike(sizes: np.ndarray, call: int) -> list[tuple[int, int]]:
    """Cut ascending lengths into spans, each in two where that spares most cells, while those are worth a call.

    >>> _alike(np.array([10, 12, 100, 100]), 2000)
    [(0, 2), (2, 4)]
    """
    spans, left = [], [(0, len(sizes))]
    while left:
        low, high = left.pop()
        cells = sizes[low:high] ** 2
        spared = np.arange(high - low) * (cells[-1] - np.roll(cells, 1))  # by a cut before each row
        cut = low + int(spared.argmax())
        if spared[cut - low] > call:
            left += [(cut, high), (low, cut)]
        else:
            spans.append((low, high))
    return spans


def _shared(
    ids: np.ndarray, counts: np.ndarray, rows: np.ndarray, places: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Of tokens at these `rows` and `places` `[N]` which are computed, `[M]`, and which of those each is, `[N]`.

    None, where that would spare too few.
    """
    owners = stand_ins(ids, counts)[rows, places]
    distinct = (owners == rows).nonzero()[0]
    if len(distinct) > _WORTH_SHARING * len(rows):
        return None
    numbers = np.empty(ids.shape, dtype=np.int64)
    numbers[rows[distinct], places[distinct]] = np.arange(len(distinct))
    return distinct, numbers[owners, places]


def packed_hidden(trunk: Any, input_ids: Tensor, packing: Packing, at: Tensor | None = None) -> Tensor:
    """Final hidden states of the tokens, `[N, H]`, each as in a forward of its row alone.

    Nothing is masked: in a causal model no token sees the padding on its right, positions count from 0, and attention
    keeps its fast path. Where much of the batch is padding, or what rows begin with alike, and the model allows it,
    all but attention is computed of the M distinct tokens alone.

    Args:
        trunk: A transformers model without its head.
        input_ids: `[B, L]` or wider, right-padded with anything.
        packing: Of the rows' lengths, and of these ids or none.
        at: Which of the N tokens are asked for, `[n]`; None: all.

    Returns:
        `[N, H]`, or `[n, H]` of those asked for.

    Raises:
        ValueError: If the packing is one of other ids.
    """
    if packing.ids is not None and packing.ids is not input_ids:
        raise ValueError("packing: expected one of these ids or of lengths alone, got one of another batch")
    cells = input_ids[:, : packing.width].reshape(-1)
    tokens = cells.index_select(0, packing.cells)
    if packing.count <= _worth_it(trunk, packing) * len(cells) and _can_pack(trunk, packing.width):
        return _picked(_packed(trunk, packing.once(tokens), packing), packing.same_as, at)
    padded = cells.new_zeros(len(cells)).index_copy(0, packing.cells, tokens)  # no padding id is special
    hidden = trunk(input_ids=padded.view(packing.rows, packing.width), use_cache=False).last_hidden_state.flatten(0, 1)
    return _picked(hidden, packing.cells if len(tokens) < len(cells) else None, at)


def _picked(states: Tensor, places: Tensor | None, at: Tensor | None) -> Tensor:
    """Of the tokens whose states are at these `places` (None: where they are), those asked for (None: all)."""
    if places is None or at is None:
        wanted = at if places is None else places
        return states if wanted is None else states.index_select(0, wanted)
    return states.index_select(0, places.index_select(0, at))


def _packed(trunk: Any, tokens: Tensor, packing: Packing) -> Tensor:
    return trunk(
        input_ids=tokens[None],
        attention_mask=packing.mask,
        position_ids=packing.once(packing.positions)[None],
        use_cache=False,
        packing=packing,
    ).last_hidden_state.squeeze(0)


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
