"""Two ways to log-probs in chunks: rows of any head under checkpointing, and blocks of a plain linear head.

By rows, autograd makes a gradient of the whole weight matrix for every chunk and adds it to the last one. By blocks, a
slice of the weights is read once in each direction and its gradient is written once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from math import isqrt
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]


def logprobs_by_rows(
    hidden: Tensor, head: Head, targets: Tensor, temperature: float, chunk: int, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probs (and entropies, if asked) `[N]` float32 of hidden states `[N, H]`, `chunk` rows at a time.

    Each chunk is computed once more in backward; if one holds all rows, nothing is.
    """
    if len(targets) <= chunk:
        return _plain_logprobs(hidden, head, targets, temperature, with_entropy)
    parts = []
    for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        if torch.is_grad_enabled():
            # Recomputed in backward, so a chunk's logits die with it. The head draws no random numbers.
            part = checkpoint(
                _plain_logprobs, h, head, t, temperature, with_entropy, use_reentrant=False, preserve_rng_state=False
            )
        else:
            part = _plain_logprobs(h, head, t, temperature, with_entropy)
        parts.append(part)
    logprobs = torch.cat([part[0] for part in parts])
    return logprobs, torch.cat([part[1] for part in parts]) if with_entropy else None


def is_plain_linear(head: Any) -> TypeGuard[nn.Linear]:
    """Whether `head(hidden)` is `hidden @ weight.T + bias` and no more: no subclass, no hook, no sharded weight."""
    return (
        type(head) is nn.Linear
        and "forward" not in vars(head)
        and type(head.weight) in (Tensor, nn.Parameter)
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks)
    )


def logprobs_by_blocks(
    hidden: Tensor, head: nn.Linear, targets: Tensor, temperature: float, max_elements: int, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """The same with a head that `is_plain_linear`, in blocks of at most `max_elements` logits.

    The forward pass keeps three numbers a row; backward computes each block once more. A gradient with
    `create_graph=True` is that of `logprobs_by_rows`.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    blocks = _Blocks(len(hidden), temperature, dtype, max_elements, with_entropy)
    logprobs, entropy = _BlockLogprobs.apply(hidden, head.weight, head.bias, targets, blocks)  # type: ignore[misc]
    return logprobs, entropy if with_entropy else None


def _plain_logprobs(
    hidden: Tensor, head: Head, targets: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    logits = head(hidden).float()
    if temperature != 1.0:
        logits = logits / temperature
    if not with_entropy:
        # One fused log-softmax and pick; its backward is one pass over the logits.
        return -F.cross_entropy(logits, targets, reduction="none"), None
    logp = F.log_softmax(logits, dim=-1)
    # An excluded token has log-probability -inf: 0 * -inf would be NaN, in the value and in the gradient.
    finite = logp.masked_fill(logp == -torch.inf, 0.0)
    entropy = -(finite.exp() * finite).sum(-1)
    return logp.gather(-1, targets[:, None]).squeeze(-1), entropy


class _BlockLogprobs(torch.autograd.Function):
    """With z = (W h + b) / τ, m = max z and S = Σ exp(z - m): log p_a = z_a - m - log S, and H = -Σ p log p.

    Their gradients are ∂ log p_a / ∂z_v = [v = a] - p_v and ∂H / ∂z_v = -p_v (log p_v + H).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, blocks: _Blocks
    ) -> tuple[Tensor, Tensor]:
        chosen, total, product = hidden.new_zeros(3, len(targets), dtype=torch.float32)
        top = torch.full_like(total, torch.finfo(total.dtype).min)
        for columns, rows in itertools.product(blocks.columns(weight), blocks.rows(hidden)):
            logits = blocks.logits(hidden[rows], weight[columns], None if bias is None else bias[columns])
            places, here = _places(targets[rows], columns)
            chosen[rows] += logits.gather(1, places).squeeze(1).where(here, 0.0)
            new_top = torch.maximum(top[rows], logits.amax(1))
            fall = top[rows] - new_top
            logits -= new_top[:, None]
            if blocks.with_entropy:  # Σ exp(z - m) (z - m), of the columns so far
                product[rows] = (product[rows] + total[rows] * fall) * fall.exp() + (logits.exp() * logits).sum(1)
            total[rows] = total[rows] * fall.exp() + logits.exp_().sum(1)
            top[rows] = new_top
        entropy = total.log() - product / total if blocks.with_entropy else product
        ctx.save_for_backward(hidden, weight, bias, targets, top, total, entropy)
        ctx.blocks = blocks
        return chosen - top - total.log(), entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, top, total, entropy = ctx.saved_tensors
        blocks, needs = ctx.blocks, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph
            return *_gradient_with_graph(hidden, weight, bias, targets, blocks, grads, needs), None, None
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs[0] else None
        grad_weight = torch.empty_like(weight) if needs[1] else None
        grad_bias = torch.empty_like(bias) if bias is not None and needs[2] else None
        for columns in blocks.columns(weight):
            # Sums over blocks are float32, whatever the dtypes.
            weight_sum = torch.zeros_like(weight[columns], dtype=torch.float32)
            bias_sum = weight_sum.new_zeros(len(weight_sum))
            for rows in blocks.rows(hidden):
                logits = blocks.logits(hidden[rows], weight[columns], None if bias is None else bias[columns])
                saved = top[rows, None], total[rows, None], entropy[rows, None]
                back = blocks.gradient(logits, targets[rows], columns, saved, [grad[rows, None] for grad in grads])
                if grad_bias is not None:
                    bias_sum += back.sum(0)
                if grad_hidden is not None:
                    blocks.add_product(grad_hidden[rows], back, weight[columns])
                if grad_weight is not None:
                    blocks.add_product(weight_sum, back.T, hidden[rows])
            if grad_weight is not None:
                grad_weight[columns] = weight_sum
            if grad_bias is not None:
                grad_bias[columns] = bias_sum
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias, None, None


class _Blocks:
    """How the logits are cut into blocks, and what is computed of each."""

    def __init__(
        self, count: int, temperature: float, dtype: torch.dtype, max_elements: int, with_entropy: bool
    ) -> None:
        """Near squares of the `count` rows; `dtype` is that of the matrix products, what is made of them is float32."""
        self.temperature, self.dtype, self.with_entropy = temperature, dtype, with_entropy
        self.max_elements, self.height = max_elements, min(count, isqrt(max_elements))

    def columns(self, weight: Tensor) -> Iterator[slice]:
        """Slices of the vocabulary, as wide as the blocks are high if there are rows enough."""
        return _slices(len(weight), max(1, self.max_elements // self.height))

    def rows(self, hidden: Tensor) -> Iterator[slice]:
        """Slices of the positions."""
        return _slices(len(hidden), self.height)

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The z of a block, a new float32 tensor."""
        bias = None if bias is None else bias.to(self.dtype)
        with torch.autocast(hidden.device.type, enabled=False):  # all is in its dtype already
            logits = F.linear(hidden.to(self.dtype), weight.to(self.dtype), bias).float()
        logits = logits if self.temperature == 1.0 else logits.div_(self.temperature)
        # A bias of -inf excludes a token: finite here, because 0 * -inf would be NaN.
        return logits if bias is None else logits.clamp_(min=-1e30)

    def gradient(
        self, logits: Tensor, targets: Tensor, columns: slice, saved: tuple[Tensor, ...], grads: list[Tensor]
    ) -> Tensor:
        """Gradient of the logits before the temperature, in their place; `saved` and `grads` are `[N, 1]`."""
        top, total, entropy = saved
        logits -= top
        slope = -grads[0]
        if self.with_entropy:
            slope = slope - grads[1] * (logits - total.log() + entropy)
        places, here = _places(targets, columns)
        back = logits.exp_().mul_(slope / total)
        return back.scatter_add_(1, places, grads[0].where(here[:, None], 0.0)).div_(self.temperature)

    def add_product(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """Add `a @ b` to a float32 sum, in place."""
        if self.dtype == total.dtype:
            total.addmm_(a, b)
        else:
            total += a.to(self.dtype) @ b.to(self.dtype)


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _places(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Where the targets are within the columns `[N, 1]` (anywhere, if they are not), and whether they are `[N]`."""
    here = (targets >= columns.start) & (targets < columns.stop)
    return (targets - columns.start).where(here, 0)[:, None], here


def _gradient_with_graph(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    blocks: _Blocks,
    grads: tuple[Tensor, ...],
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """The gradient by operations that can be differentiated again."""
    # Names of their own: with tied weights `hidden` hangs on `weight`, and that path is autograd's, outside of here.
    hidden, weight = hidden.view_as(hidden), weight.view_as(weight)
    bias = None if bias is None else bias.view_as(bias)

    def head(h: Tensor) -> Tensor:
        b = None if bias is None else bias.to(blocks.dtype)
        return F.linear(h.to(blocks.dtype), weight.to(blocks.dtype), b)

    chunk = max(1, blocks.max_elements // len(weight))
    found = logprobs_by_rows(hidden, head, targets, blocks.temperature, chunk, blocks.with_entropy)
    outputs = [tensor for tensor in found if tensor is not None]
    inputs = [tensor for tensor, needed in zip((hidden, weight, bias), needs, strict=True) if needed]
    gradients = iter(torch.autograd.grad(outputs, inputs, grads[: len(outputs)], create_graph=True))  # type: ignore
    return [next(gradients) if needed else None for needed in needs]
