"""Causal attention of short packed rows by plain products of matrices, with a backward of their own.

For rows of some dozens of tokens the fused kernel of a CPU, and the graph around it, cost more than the products, and
what surrounds the products more than they do: so tokens go to where products want them, and back, by one gather each
for all groups of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, wraps
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_WIDTH = 64
"""Longest row, measured with heads of 8 to 64: beyond, the fused kernel's blocks win."""
_FEW_COLUMNS = 12
"""Columns of a product's right side up to which it is computed transposed, measured."""


def is_short(query: Tensor, packing: Any) -> bool:
    """Whether products win: where a backward follows, and without one for small heads or in reduced precision.

    Args:
        query: `[1, H, N, D]`.
        packing: The `textenv.packing.Packing` of the rows.
    """
    pays = query.requires_grad or query.shape[-1] <= _FEW_COLUMNS or is_reduced(query)
    return pays and products_win(query, packing.width)


def products_win(tensor: Tensor, width: int) -> bool:
    """Whether they may, with tensors like this one and rows of `width`."""
    return tensor.device.type == "cpu" and width <= _WIDTH


def is_reduced(tensor: Tensor) -> bool:
    """Whether a CPU computes with it in 16 bits, where the fused kernel's backward of short rows is slow."""
    return torch.is_autocast_enabled("cpu") or tensor.dtype in (torch.bfloat16, torch.float16)


class Layout(NamedTuple):
    """Where the vectors of H heads of queries and K of keys and of values stand, with the model and with the products.

    A model has them as `[N, H + 2·K]` and takes outputs as `[N, H]`. Products want them group after group, of each
    `[n, H, W]` queries, `[n, K, W]` keys, `[n, K, W]` values, and give `[n, H, W]` group after group.
    """

    taken: Tensor
    """Of each vector that products want, its place in the model; where there is padding, that of the one before, so
    that no row holds anything of another."""
    taken_back: Tensor
    """Of each vector in the model, its place with the products."""
    given: Tensor
    """Of each output that a model takes, its place with the products."""
    given_back: Tensor
    """Of each output of the products, its place in the model; one past the last where there is padding."""

    @classmethod
    def of(cls, packing: Any, heads: int, shared: int) -> Layout:
        """Of the rows of a `Packing`, with H = `heads` and K = `shared`."""
        firsts, cells = [], 0
        for rows, width in packing.groups:
            row, column = np.divmod(np.arange(rows * width), width)
            query = row * (heads * width) + column
            key = (rows * heads + row * shared) * width + column
            vectors = cells * (heads + 2 * shared)  # of the groups before
            of_head_0 = query + vectors, key + vectors, key + (vectors + rows * shared * width), query + cells * heads
            firsts.append(np.stack([*of_head_0, np.full_like(row, width)]))
            cells += rows * width
        query, key, value, out, width = np.concatenate(firsts, axis=1)[:, packing.places.numpy()]
        head = np.arange(heads)[:, None]
        taken_back = np.concatenate(
            [query + head * width, key + head[:shared] * width, value + head[:shared] * width]
        ).T
        given = (out + head * width).T
        taken = _inverse(taken_back, cells * (heads + 2 * shared), nothing=-1)
        taken = taken[np.maximum.accumulate(np.where(taken < 0, 0, np.arange(len(taken))))]
        given_back = _inverse(given, cells * heads, nothing=given.size)
        return cls(*(torch.from_numpy(table.ravel()) for table in (taken, taken_back, given, given_back)))


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

    With dP = dO·Vᵀ and dS = P ∘ (dP − Σ P ∘ dP): dV = Pᵀ·dO, dK = scale · dSᵀ·q, dq = scale · dS·K.
    """

    @staticmethod
    @_without_autocast
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, packing: Any) -> Tensor:
        """`[N, H, D]` of query `[N, H, D]` and key and value `[N, K, D]`; of the rows of a `Packing`."""
        (tokens, heads, size), shared = query.shape, key.shape[1]
        layout = packing.remembered((heads, shared), lambda: Layout.of(packing, heads, shared))
        full = torch.promote_types(query.dtype, torch.float32)
        together = torch.cat([query.to(full) * scale, key.to(full), value.to(full)], dim=1)
        vectors = together.view(-1, size).index_select(0, layout.taken)
        found = vectors.new_empty(len(layout.given_back), size)
        blocks = _blocks(vectors, packing.groups, (heads, shared, shared), shared)
        kept = []
        for at, out in enumerate(_blocks(found, packing.groups, (heads,), shared)):
            q, k, v = blocks[3 * at : 3 * at + 3]
            hidden = _causal(k.shape[1], heads // shared, k.dtype)
            weights = torch.baddbmm(hidden, q, k.transpose(1, 2)).softmax(-1)
            _product(weights, v, out)
            kept += [q, k, v, weights]
        ctx.save_for_backward(*kept)
        ctx.rest = scale, packing.groups, layout, heads, shared
        return found.index_select(0, layout.given).view(tokens, heads, size).to(value.dtype)

    @staticmethod
    @_without_autocast
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of `[N, H, D]`.

        Raises:
            RuntimeError: If it is to be differentiated itself. PyTorch's `once_differentiable` would not raise where
                inputs alone are asked for, and leave attention out of the second derivative.
        """
        if torch.is_grad_enabled():
            raise RuntimeError("attention: expected no create_graph, as it has no second derivative; eager has one")
        scale, groups, layout, heads, shared = ctx.rest
        kept, (tokens, _, size) = ctx.saved_tensors, gradients[0].shape
        # Zeros where the padding is: no query of it adds to keys and values.
        padding = kept[0].new_zeros(1, size)
        outs = torch.cat([gradients[0].reshape(-1, size), padding]).index_select(0, layout.given_back)
        found = outs.new_empty(len(layout.taken), size)
        wanted = _blocks(found, groups, (heads, shared, shared), shared)
        for at, d_out in enumerate(_blocks(outs, groups, (heads,), shared)):
            q, k, v, weights = kept[4 * at : 4 * at + 4]
            d_query, d_key, d_value = wanted[3 * at : 3 * at + 3]
            _product(weights.transpose(1, 2), d_out, d_value)
            d_weights = torch.bmm(d_out, v.transpose(1, 2))
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            _product(d_scores, k, d_query)
            _product(d_scores.transpose(1, 2), q, d_key)
        found = found.index_select(0, layout.taken_back).view(tokens, -1, size)
        query, key, value = found.split([heads, shared, shared], dim=1)
        return query.mul_(scale), key, value, None, None


def _blocks(vectors: Tensor, groups: Sequence[Any], heads: Sequence[int], shared: int) -> list[Tensor]:
    """Of each group, for each of these numbers of heads, its vectors `[n·K, heads/K·W, D]`, as views.

    Heads that share keys are queries of one product.
    """
    parts = vectors.split_with_sizes([n * count * width for n, width in groups for count in heads])
    batches = [n * shared for n, _ in groups for _ in heads]
    return [part.view(batch, -1, vectors.shape[-1]) for part, batch in zip(parts, batches, strict=True)]


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """`[b, M, N]` of `[b, M, K]` and `[b, K, N]`: a few columns take up to four times as long as a few rows."""
    if right.shape[-1] > _FEW_COLUMNS:
        torch.bmm(left, right, out=out)
    else:
        out.copy_(torch.bmm(right.transpose(1, 2), left.transpose(1, 2)).transpose(1, 2))


@cache
def _causal(width: int, times: int, dtype: torch.dtype) -> Tensor:
    """`[times · W, W]`."""
    return torch.full((width, width), -torch.inf, dtype=dtype).triu_(1).repeat(times, 1)
