"""Causal attention of short packed rows by plain products of matrices, with a backward of their own.

For rows of some dozens of tokens the fused kernel of a CPU, and the graph around it, cost more than the products, and
what surrounds the products more than they do: so tokens go to where products want them, and back, by one gather each
for all groups of rows. Where a group is large, its queries are cut into spans, which leave out keys past their end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache, wraps
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_WIDTH, _WIDTH_OF_SMALL = 64, 128
"""Longest row, and longest with small heads that learn, measured: heads of 16 to 64 gain nothing beyond the first."""
_FEW_COLUMNS = 12
"""Columns of a product's right side up to which it is computed transposed, measured; small heads have no more."""
_SPAN_IN_WEIGHTS = 2**15
"""Attention weights that cost as much as one more span of queries, measured."""


def is_short(query: Tensor, packing: Any) -> bool:
    """Whether products win for these queries.

    Args:
        query: `[1, H, M, D]`.
        packing: The `textenv.packing.Packing` of the rows.
    """
    return products_win(query, packing.width, small=is_small(query.shape[-1]), learns=query.requires_grad)


def products_win(tensor: Tensor, width: int, *, small: bool, learns: bool) -> bool:
    """Whether they do: where a backward follows, and without one for small heads or in reduced precision.

    Args:
        tensor: Anything on the device and of the dtype.
        width: Of the longest row.
        small: Whether heads are.
        learns: Whether a backward follows.
    """
    longest = _WIDTH_OF_SMALL if learns and small else _WIDTH
    return (learns or small or is_reduced(tensor)) and tensor.device.type == "cpu" and width <= longest


def is_small(size: int) -> bool:
    """Whether the fused kernel takes long for heads of D = `size`, padding or not."""
    return size <= _FEW_COLUMNS


def is_reduced(tensor: Tensor) -> bool:
    """Whether a CPU computes with it in 16 bits, where the fused kernel's backward of short rows is slow."""
    return torch.is_autocast_enabled("cpu") or tensor.dtype in (torch.bfloat16, torch.float16)


class Span(NamedTuple):
    """Queries of each row of a group; they attend to keys before `high`."""

    low: int
    """The first."""
    high: int
    """One past the last."""


class Layout(NamedTuple):
    """Where the vectors of H heads of queries and K of keys and of values stand, with the model and with the products.

    A model has them as `[M, H + 2·K]` and takes outputs as `[M, H]`. Products want them group after group, of each
    `[n, H, high − low]` queries span after span, `[n, K, W]` keys, `[n, K, W]` values, and give outputs as queries are.
    """

    taken: Tensor
    """Of each vector that products want, its place in the model; where there is padding, that of the row's last token,
    so that no row holds anything of another."""
    taken_back: Tensor
    """Of each vector in the model, its place with the products."""
    given: Tensor
    """Of each output that a model takes, its place with the products."""
    given_back: Tensor
    """Of each output of the products, its place in the model; one past the last where there is padding, or
    the output of another row is taken."""
    again: Tensor
    """Of each key and value that a row has in common with another one, whose own is in `taken_back`, its place with the
    products."""
    again_for: Tensor
    """Of each such token, which of the model's it is."""
    heads: int
    """H."""
    shared: int
    """K."""
    groups: Sequence[tuple[int, int]]
    """Rows n and width W of each."""
    spans: Sequence[Sequence[Span]]
    """Of each group, the last first, which alone sees all keys."""

    @classmethod
    def of(cls, packing: Any, heads: int, shared: int) -> Layout:
        """Of the rows of a `Packing`."""
        firsts, cells = [], 0
        spans = [_spans(rows * heads, width) for rows, width in packing.groups]
        for (rows, width), parts in zip(packing.groups, spans, strict=True):
            row, column = np.divmod(np.arange(rows * width), width)
            low, high = np.empty((2, width), dtype=int)
            for part in parts:
                low[part.low : part.high], high[part.low : part.high] = part
            low, high = low[column], high[column]
            query = rows * heads * (width - high) + row * (heads * (high - low)) + column - low
            key = (rows * heads + row * shared) * width + column
            vectors = cells * (heads + 2 * shared)  # of the groups before
            of_head_0 = query + vectors, key + vectors, key + (vectors + rows * shared * width), query + cells * heads
            firsts.append(np.stack([*of_head_0, high - low, np.full_like(row, width)]))
            cells += rows * width
        query, key, value, out, span, width = np.concatenate(firsts, axis=1)
        head, places, vectors = np.arange(heads)[:, None], packing.places.numpy(), np.arange(heads + 2 * shared)
        where = np.concatenate([query + head * span, key + head[:shared] * width, value + head[:shared] * width]).T
        tokens = np.maximum.accumulate(_inverse(places, cells, nothing=0))
        own, again, again_for = places, np.empty((0, 2 * shared), dtype=int), np.empty(0, dtype=int)
        if packing.distinct is not None:
            distinct, same_as = packing.distinct.numpy(), packing.same_as.numpy()
            own, others = places[distinct], np.delete(np.arange(len(places)), distinct)
            tokens, again, again_for = same_as[tokens], where[places[others], heads:], same_as[others]
        taken = np.empty(where.size, dtype=int)
        taken[where] = tokens[:, None] * len(vectors) + vectors
        given = (out + head * span).T[own]
        given_back = _inverse(given, cells * heads, nothing=given.size)
        found = taken, where[own], given, given_back, again, again_for
        tables = [torch.from_numpy(table.ravel()) for table in found]
        return cls(*tables, heads, shared, packing.groups, spans)  # type: ignore[call-arg]

    def split(self, vectors: Tensor, *, with_keys: bool) -> list[list[Tensor]]:
        """Views: of each group the queries `[n·K, H/K·(high − low), D]` of its spans, then keys, values `[n·K, W, D]`.

        Heads that share keys are queries of one product.
        """
        sizes = [
            [n * self.heads * (high - low) for low, high in spans] + 2 * with_keys * [n * self.shared * width]
            for (n, width), spans in zip(self.groups, self.spans, strict=True)
        ]
        parts = iter(vectors.split_with_sizes([size for group in sizes for size in group]))
        return [
            [next(parts).view(n * self.shared, -1, vectors.shape[-1]) for _ in group]
            for (n, _), group in zip(self.groups, sizes, strict=True)
        ]


def _spans(rows: int, width: int) -> list[Span]:
    """Cut queries into spans, each in two for as long as that spares `rows` more weights than a span is worth.

    >>> _spans(128, 55)
    [Span(low=32, high=55), Span(low=16, high=32), Span(low=0, high=16)]
    """
    found, left = [], [Span(0, width)]
    while left:
        low, high = left.pop()
        middle = low + (high - low + 16) // 32 * 16  # whole registers
        if low < middle < high and rows * (middle - low) * (high - middle) >= _SPAN_IN_WEIGHTS:
            left += [Span(low, middle), Span(middle, high)]
        else:
            found.append(Span(low, high))
    return found


def _inverse(places: np.ndarray, count: int, nothing: int) -> np.ndarray:
    """Of each of `count` places, where it is among these, or `nothing`.

    >>> _inverse(np.array([3, 0]), 4, nothing=-1).tolist()
    [1, -1, -1, 0]
    """
    found = np.full(count, nothing)
    found[places.ravel()] = np.arange(places.size)
    return found


def _without_autocast(method: Callable[..., Any]) -> Callable[..., Any]:
    """Entering a context costs as much as a product: only where there is something to switch off."""

    @wraps(method)
    def run(*arguments: Any) -> Any:
        off = torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()
        with off:
            return method(*arguments)

    return run


class ShortAttention(torch.autograd.Function):
    """P = softmax(scale · q·Kᵀ + causal), O = P·V within each row, in float32 at least.

    With dP = scale · dO·Vᵀ and dS = P ∘ (dP − Σ P ∘ dP): dV = Pᵀ·dO, dK = dSᵀ·q, dq = dS·K.
    """

    @staticmethod
    @_without_autocast
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, packing: Any) -> Tensor:
        """`[M, H, D]` of query `[M, H, D]` and key and value `[M, K, D]`; of the rows of a `Packing`."""
        (tokens, heads, size), shared = query.shape, key.shape[1]
        layout = packing.remembered((heads, shared), lambda: Layout.of(packing, heads, shared))
        full = torch.promote_types(query.dtype, torch.float32)
        together = torch.cat([query.to(full), key.to(full), value.to(full)], dim=1)
        vectors = together.view(-1, size).index_select(0, layout.taken)
        found = vectors.new_empty(len(layout.given_back), size)
        blocks, outs, kept = layout.split(vectors, with_keys=True), layout.split(found, with_keys=False), []
        for spans, (*queries, k, v), given in zip(layout.spans, blocks, outs, strict=True):
            kept += [k, v]
            for (low, high), q, out in zip(spans, queries, given, strict=True):
                seen_k, seen_v = _first(high, k, v)
                hidden = _causal(low, high, heads // shared, k.dtype)
                weights = torch.baddbmm(hidden, q, seen_k.transpose(1, 2), alpha=scale).softmax(-1)
                _product(weights, seen_v, out)
                kept += [q, weights]
        ctx.save_for_backward(*kept)
        ctx.rest = scale, layout
        return found.index_select(0, layout.given).view(tokens, heads, size).to(value.dtype)

    @staticmethod
    @_without_autocast
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of `[M, H, D]`.

        Raises:
            RuntimeError: If it is to be differentiated itself. PyTorch's `once_differentiable` would not raise where
                inputs alone are asked for, and leave attention out of the second derivative.
        """
        if torch.is_grad_enabled():
            raise RuntimeError("attention: expected no create_graph, as it has no second derivative; eager has one")
        scale, layout = ctx.rest
        saved, (tokens, _, size) = ctx.saved_tensors, gradients[0].shape
        # Zeros where the padding is: no query of it adds to keys and values.
        padding, nothing, kept = saved[0].new_zeros(1, size), saved[0].new_zeros(()), iter(saved)
        outs = torch.cat([gradients[0].reshape(-1, size), padding]).index_select(0, layout.given_back)
        found = outs.new_empty(len(layout.taken), size)
        wanted, d_outs = layout.split(found, with_keys=True), layout.split(outs, with_keys=False)
        for spans, (*d_queries, d_key, d_value), given in zip(layout.spans, wanted, d_outs, strict=True):
            k, v = next(kept), next(kept)
            for (_, high), d_query, d_out in zip(spans, d_queries, given, strict=True):
                q, weights, more = next(kept), next(kept), high < k.shape[1]
                seen_k, seen_v, d_seen_k, d_seen_v = _first(high, k, v, d_key, d_value)
                _product(weights.transpose(1, 2), d_out, d_seen_v, more)
                d_weights = torch.baddbmm(nothing, d_out, seen_v.transpose(1, 2), beta=0, alpha=scale)
                d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
                _product(d_scores, seen_k, d_query)
                _product(d_scores.transpose(1, 2), q, d_seen_k, more)
        vectors = found.index_select(0, layout.taken_back).view(tokens, -1, size)
        if len(layout.again):
            more = found.index_select(0, layout.again).view(len(layout.again_for), -1, size)
            vectors[:, layout.heads :].index_add_(0, layout.again_for, more)
        query, key, value = vectors.split([layout.heads, layout.shared, layout.shared], dim=1)
        return query, key, value, None, None


def _first(count: int, *tensors: Tensor) -> Sequence[Tensor]:
    """Of each `[b, W, D]` so many."""
    return tensors if count == tensors[0].shape[1] else [tensor[:, :count] for tensor in tensors]


def _product(left: Tensor, right: Tensor, out: Tensor, more: bool = False) -> None:
    """Write or, if there is `more` than it in `out`, add `[b, M, N]` of `[b, M, K]` and `[b, K, N]`.

    A few columns take up to four times as long as a few rows.
    """
    if right.shape[-1] <= _FEW_COLUMNS:
        found = torch.bmm(right.transpose(1, 2), left.transpose(1, 2)).transpose(1, 2)
        out.add_(found) if more else out.copy_(found)
    elif more:
        out.add_(torch.bmm(left, right))
    else:
        torch.bmm(left, right, out=out)


@lru_cache(maxsize=256)  # a mask takes up to half a megabyte
def _causal(low: int, high: int, times: int, dtype: torch.dtype) -> Tensor:
    """`[times · (high − low), high]`."""
    return torch.full((high - low, high), -torch.inf, dtype=dtype).triu_(1 + low).repeat(times, 1)
