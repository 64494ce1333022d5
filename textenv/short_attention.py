"""Causal attention of short packed rows by plain products of matrices, with a backward of their own.

For rows of some dozens of tokens the fused kernel of a CPU, and the graph around it, cost more than the products: in
forward and backward together 16 rows of 9 to 56 tokens take three quarters of its time with 8 heads of 8, nine tenths
with 12 heads of 64.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

_WIDTH = 64
"""Longest row, measured with heads of 8 to 64: beyond, the fused kernel's blocks win."""


def is_short(query: Tensor, packing: Any) -> bool:
    """Whether products win: in a forward to be followed by a backward, on a CPU, in full precision.

    Args:
        query: `[1, H, N, D]`.
        packing: The `textenv.packing.Packing` of the rows.
    """
    return query.requires_grad and products_win(query, packing.width)


def products_win(tensor: Tensor, width: int) -> bool:
    """Whether they do in a forward to be followed by a backward, with tensors like this one and rows of `width`."""
    return (
        tensor.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and tensor.dtype in (torch.float32, torch.float64)
        and width <= _WIDTH
    )


class ShortAttention(torch.autograd.Function):
    """P = softmax(scale · q·Kᵀ + causal), O = P·V within each row.

    With dP = dO·Vᵀ and dS = P ∘ (dP − Σ P ∘ dP): dV = Pᵀ·dO, dK = scale · dSᵀ·q, dq = scale · dS·K.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, groups: Any) -> Tensor:
        """`[N, H, D]` of query `[N, H, D]` and key and value `[N, K, D]`; `groups` are a packing's."""
        heads, shared, size = query.shape[1], key.shape[1], query.shape[2]
        tokens = torch.cat([query * scale, key, value], dim=1)
        found, kept = [], []
        for group in groups:
            q, k, v = _padded(tokens, group).split([heads, shared, shared], dim=1)
            q = q.reshape(group.rows * shared, -1, size)  # the heads that share keys are queries of one product
            k, v = (x.reshape(group.rows * shared, group.width, size) for x in (k, v))
            hidden = _causal(q.dtype)[: group.width, : group.width].repeat(heads // shared, 1)
            weights = torch.baddbmm(hidden, q, k.transpose(1, 2)).softmax(-1)
            out = torch.bmm(weights, v).view(group.rows, heads, group.width, size)
            found.append(_unpadded(out, group))
            kept += [q, k, v, weights]
        ctx.save_for_backward(*kept)
        ctx.rest = scale, groups, heads, shared
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of `[N, H, D]`.

        Raises:
            RuntimeError: If it is to be differentiated itself. PyTorch's `once_differentiable` would not raise where
                inputs alone are asked for, and leave attention out of the second derivative.
        """
        if torch.is_grad_enabled():
            raise RuntimeError("attention: expected no create_graph, as it has no second derivative; eager has one")
        scale, groups, heads, shared = ctx.rest
        found = []
        for at, group in enumerate(groups):
            q, k, v, weights = ctx.saved_tensors[4 * at : 4 * at + 4]
            # Zeros where the padding is: no query of it adds to keys and values.
            d_out = _padded(gradients[0], group).reshape_as(q)
            d_value = torch.bmm(weights.transpose(1, 2), d_out)
            d_scores = torch.bmm(d_out, v.transpose(1, 2)).mul_(weights)
            d_scores.addcmul_(weights, d_scores.sum(-1, keepdim=True), value=-1)
            d_query = torch.bmm(d_scores, k).mul_(scale)
            d_key = torch.bmm(d_scores.transpose(1, 2), q)
            parts = (x.view(group.rows, -1, group.width, q.shape[-1]) for x in (d_query, d_key, d_value))
            found.append(_unpadded(torch.cat(list(parts), dim=1), group))
        return *torch.cat(found).split([heads, shared, shared], dim=1), None, None


def _padded(tokens: Tensor, group: Any) -> Tensor:
    """Of all tokens `[N, H, D]`, the group's as `[n, H, W, D]`."""
    mine = tokens[group.first : group.last]
    cells = mine.new_zeros(group.rows * group.width, *mine.shape[1:]).index_copy_(0, group.cells, mine)
    return cells.view(group.rows, group.width, *mine.shape[1:]).transpose(1, 2)


def _unpadded(rows: Tensor, group: Any) -> Tensor:
    """The tokens of `[n, H, W, D]`, one after the other."""
    return rows.transpose(1, 2).flatten(0, 1).index_select(0, group.cells)


@cache
def _causal(dtype: torch.dtype) -> Tensor:
    return torch.full((_WIDTH, _WIDTH), -torch.inf, dtype=dtype).triu_(1)
