"""Masked reductions: the only place of the library where numbers are summed over tokens.

Shapes: B rows, T response tokens. `mask` is bool and true where a sampled token counts. Every function replaces what
lies outside of the mask by zero *before* any arithmetic, because 0 · NaN is NaN: whatever stands there, NaN included,
changes neither the result nor a gradient. Statistics are computed in float32 at least.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A spread below this many rounding errors of the largest entry is noise of the mean, not variance.
_ROUNDING_ERRORS = 16


def same_shape(**tensors: Tensor) -> None:
    """Check that all tensors have the shape of the first one.

    Args:
        **tensors: the tensors under their argument names.

    Raises:
        ValueError: if a shape differs; the message names the argument.

    >>> same_shape(values=torch.zeros(1, 3), returns=torch.zeros(1, 2))
    Traceback (most recent call last):
    ...
    ValueError: returns: expected shape (1, 3) like values, got (1, 2)
    """
    (first, pattern), *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != pattern.shape:
            raise ValueError(f"{name}: expected shape {tuple(pattern.shape)} like {first}, got {tuple(tensor.shape)}")


def clean(x: Tensor, mask: Tensor) -> Tensor:
    """Zero what lies outside of the mask: yₜ = xₜ where the mask is true, else 0.

    A selection, not a product, so that NaN neither survives here nor comes back in the gradient.

    Args:
        x: any shape and dtype.
        mask: bool, the shape of `x`.

    Returns:
        The shape and dtype of `x`.

    Raises:
        ValueError: if the mask is not bool or has another shape.

    >>> clean(torch.tensor([[1.0, 2.0, float("nan")]]), torch.tensor([[True, True, False]]))
    tensor([[1., 2., 0.]])
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: expected dtype torch.bool, got {mask.dtype}")
    same_shape(x=x, mask=mask)
    return torch.where(mask, x, torch.zeros_like(x))


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum over the mask, Σₜ maskₜ xₜ.

    Args:
        x: `[B, T]`, or any shape.
        mask: bool, the shape of `x`.
        dim: the dimension to sum over; all of them when None.

    Returns:
        The sum without `dim`; 0 where nothing counts.

    Raises:
        ValueError: as `clean`.

    >>> masked_sum(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[True, True, False]]))
    tensor(3.)
    """
    kept = _wide(clean(x, mask))
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None, *, weights: Tensor | None = None) -> Tensor:
    """Mean over the mask, Σₜ wₜ xₜ / Σₜ wₜ, with w = mask unless weights are given.

    Args:
        x: `[B, T]`, or any shape.
        mask: bool, the shape of `x`.
        dim: the dimension to average over; all of them when None.
        weights: non-negative, the shape of `x`; probabilities, when all sequences are enumerated instead of sampled.

    Returns:
        The mean without `dim`; 0 where nothing counts.

    Raises:
        ValueError: as `clean`, and if `weights` have another shape.

    >>> masked_mean(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[True, True, False]]))
    tensor(1.5000)
    """
    w = _weights(x, mask, weights)
    total = w.sum() if dim is None else w.sum(dim)
    summed = masked_sum(w * _wide(clean(x, mask)), mask, dim)
    return summed / torch.where(total > 0, total, torch.ones_like(total))


def masked_var(x: Tensor, mask: Tensor, unbiased: bool = True, *, weights: Tensor | None = None) -> Tensor:
    """Variance over the mask, Σₜ wₜ (xₜ - x̄)² / D.

    D = Σ w for the biased variance. Unbiased, D = Σ w - Σ w² / Σ w: n - 1 without weights (Bessel), and the usual
    correction for reliability weights with them, so a common factor of the weights never matters.

    Args:
        x: `[B, T]`, or any shape.
        mask: bool, the shape of `x`.
        unbiased: whether to correct for the mean having been estimated.
        weights: as in `masked_mean`.

    Returns:
        A scalar; 0 if nothing counts, or if unbiased and only one entry counts.

    Raises:
        ValueError: as `masked_mean`.

    >>> masked_var(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]))
    tensor(2.)
    """
    w = _weights(x, mask, weights)
    kept = _wide(clean(x, mask))
    total = w.sum()
    squares = (w * (kept - masked_mean(x, mask, weights=weights)) ** 2).sum()
    safe_total = torch.where(total > 0, total, torch.ones_like(total))
    divisor = total - (w * w).sum() / safe_total if unbiased else total
    # One entry with a rounded weight leaves a divisor of rounding errors, of either sign.
    estimable = divisor > _ROUNDING_ERRORS * torch.finfo(w.dtype).eps * total
    return torch.where(estimable, squares / torch.where(estimable, divisor, torch.ones_like(divisor)), 0.0)


def is_constant(x: Tensor, mask: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Whether x varies over the mask by no more than the rounding of its own mean, sd(x) ≤ 16 ε max |x|.

    ε is the machine's, and the test is relative, so it does not depend on the unit of x.

    Args:
        x: `[B, T]`, or any shape.
        mask: bool, the shape of `x`.
        weights: as in `masked_mean`.

    Returns:
        A bool scalar; true if nothing counts.

    Raises:
        ValueError: as `masked_mean`.

    >>> is_constant(torch.tensor([[0.1, 0.1, 7.0]]), torch.tensor([[True, True, False]]))
    tensor(True)
    """
    kept = _wide(clean(x, mask)).detach()
    if kept.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=x.device)
    spread = masked_var(kept, mask, unbiased=False, weights=weights).sqrt()
    return spread <= _ROUNDING_ERRORS * torch.finfo(kept.dtype).eps * kept.abs().max()


def whiten(
    x: Tensor,
    mask: Tensor,
    shift_mean: bool = True,
    unbiased: bool = True,
    *,
    weights: Tensor | None = None,
) -> Tensor:
    """Divide by the standard deviation: yₜ = (xₜ - x̄) / sd(x), plus x̄ if the mean is not to be shifted.

    The reward whitening of RLHF keeps the mean, advantage whitening does not (Huang et al. 2023, "The N
    implementation details of RLHF with PPO", detail "reward and advantage whitening"; OpenAI's code is biased, TRL's
    unbiased). Unlike there nothing is added to the variance: an absolute ε would make the update depend on the unit of
    the score. With `shift_mean=True`, x · 2ᵏ gives bit for bit the same y.

    Args:
        x: `[B, T]`, or any shape.
        mask: bool, the shape of `x`.
        shift_mean: whether y has mean 0 (advantages) or keeps the mean of x (rewards).
        unbiased: which variance, see `masked_var`.
        weights: as in `masked_mean`.

    Returns:
        The shape of `x`; 0 outside of the mask. Where x is constant (see `is_constant`), or only one entry counts,
        there is no scale to divide by: then y is 0, or the mean if that is kept.

    Raises:
        ValueError: as `masked_mean`.

    >>> whiten(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]), unbiased=False)
    tensor([[-1.,  1.,  0.]])
    """
    mean = masked_mean(x, mask, weights=weights)
    variance = masked_var(x, mask, unbiased, weights=weights)
    flat = is_constant(x, mask, weights=weights) | (variance == 0)
    # The flat case is replaced before the square root, whose derivative at 0 is infinite.
    scaled = (_wide(clean(x, mask)) - mean) / torch.where(flat, torch.ones_like(variance), variance).sqrt()
    white = torch.where(flat, torch.zeros_like(scaled), scaled)
    return clean(white if shift_mean else white + mean, mask)


def _wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _weights(x: Tensor, mask: Tensor, weights: Tensor | None) -> Tensor:
    """The weights, 0 outside of the mask."""
    if weights is None:
        return mask.to(torch.promote_types(x.dtype, torch.float32))
    same_shape(x=x, weights=weights)
    return _wide(clean(weights, mask))
