"""What to log about an update: masked statistics of ratios, clips and values, each defined by its formula.

Shapes: B rows, T response tokens. No gradient flows through any of these, and what lies outside of the mask, NaN
included, changes none of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agents.kl import k3
from agents.losses import clipped_surrogate, clipped_value, importance_ratios, sequence_surrogate
from agents.masked import clean, is_constant, masked_mean, masked_var, same_shape


@torch.no_grad()
def approx_kl(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Mean of k3 for KL(π_old‖π), per token: mean(ρ - 1 - log ρ).

    The tokens were sampled from π_old, so π_old stands first in the divergence, as in Schulman 2020.

    Args:
        logprobs: log π(a), `[B, T]`.
        old_logprobs: log π_old(a), `[B, T]`.
        mask: bool `[B, T]`.

    Returns:
        A scalar, non-negative up to rounding.

    Raises:
        ValueError: if shapes differ.

    >>> approx_kl(torch.tensor([[0.0, -1.0, 7.0]]), torch.full((1, 3), -1.0), torch.tensor([[True, True, False]]))
    tensor(0.3591)
    """
    return masked_mean(k3(old_logprobs, logprobs, mask=mask), mask)


@torch.no_grad()
def clip_fraction(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_eps: float,
    mask: Tensor,
    *,
    clip_eps_high: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """Fraction of tokens whose gradient the clip removes: ρ > 1 + ε_high and Â > 0, or ρ < 1 - ε and Â < 0.

    With a dual clip c also ρ > c and Â < 0. A ratio outside of the trust region on the side where the minimum is not
    clipped does not count.

    Args:
        logprobs: log π(a), `[B, T]`.
        old_logprobs: log π_old(a), `[B, T]`.
        advantages: `[B, T]`.
        clip_eps: half-width ε.
        mask: bool `[B, T]`.
        clip_eps_high: half-width on the upper side; `clip_eps` when None.
        dual_clip: c > 1, or None for no bound.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: if shapes differ, a half-width is negative, or `dual_clip` is not above 1.

    >>> clip_fraction(torch.zeros(1, 3), torch.full((1, 3), -1.0), torch.tensor([[1.0, -1.0, 1.0]]), 0.2,
    ...     torch.tensor([[True, True, False]]))
    tensor(0.5000)
    """
    clipped = clipped_surrogate(
        logprobs,
        old_logprobs,
        advantages,
        clip_eps,
        clip_eps_high=clip_eps_high,
        dual_clip=dual_clip,
        mask=mask,
    )
    unclipped = -clean(advantages, mask) * importance_ratios(logprobs, old_logprobs, mask=mask)
    # The trust region raises a loss, the dual clip lowers one.
    return masked_mean(clipped != unclipped, mask)


@torch.no_grad()
def sequence_clip_fraction(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_eps: float,
    mask: Tensor,
    *,
    clip_eps_high: float | None = None,
    per_token: bool = False,
) -> Tensor:
    """Fraction of tokens whose gradient the clip of `losses.sequence_surrogate` removes.

    Args:
        logprobs: log π(a), `[B, T]`.
        old_logprobs: log π_old(a), `[B, T]`.
        advantages: `[B, T]`.
        clip_eps: half-width ε.
        mask: bool `[B, T]`.
        clip_eps_high: half-width on the upper side; `clip_eps` when None.
        per_token: as there.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: if shapes differ or a half-width is negative.

    >>> sequence_clip_fraction(torch.tensor([[0.0, -1.0]]), torch.full((1, 2), -1.0), torch.ones(1, 2), 0.2,
    ...     torch.ones(1, 2) > 0)
    tensor(1.)
    """
    args = logprobs, old_logprobs, advantages
    clipped = sequence_surrogate(*args, clip_eps, mask=mask, clip_eps_high=clip_eps_high, per_token=per_token)
    # No bound at all: a lower half-width of 1 and an upper one without end.
    free = sequence_surrogate(*args, 1.0, mask=mask, clip_eps_high=float("inf"), per_token=per_token)
    return masked_mean(clipped > free, mask)


@torch.no_grad()
def value_clip_fraction(values: Tensor, old_values: Tensor, returns: Tensor, clip_eps: float, mask: Tensor) -> Tensor:
    """Fraction of tokens whose value gradient the clip removes: |V - V_old| > ε, and the clipped error is the larger.

    Args:
        values: `[B, T]`.
        old_values: `[B, T]`.
        returns: `[B, T]`.
        clip_eps: half-width ε.
        mask: bool `[B, T]`.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: if shapes differ or ε is negative.

    >>> counts = torch.tensor([[True, True, False]])
    >>> value_clip_fraction(torch.tensor([[0.0, 1.0, 1.0]]), torch.zeros(1, 3), torch.full((1, 3), 2.0), 0.5, counts)
    tensor(0.5000)
    """
    clipped = clipped_value(values, old_values, returns, clip_eps, mask=mask)
    return masked_mean(clipped > clipped_value(values, old_values, returns, None, mask=mask), mask)


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Share of the returns' variance that the values explain, 1 - Var(R - V) / Var(R).

    Args:
        values: `[B, T]`.
        returns: `[B, T]`.
        mask: bool `[B, T]`.

    Returns:
        A scalar: 1 for perfect values, 0 for constant ones, negative for worse; 0 if the returns do not vary.

    Raises:
        ValueError: if shapes differ.

    >>> explained_variance(torch.tensor([[0.0, 1.0, 7.0]]), torch.tensor([[0.0, 2.0, 9.0]]), torch.ones(1, 3) > 0)
    tensor(0.9552)
    """
    same_shape(values=values, returns=returns)
    total = masked_var(returns, mask, unbiased=False)
    unexplained = masked_var(clean(returns, mask) - clean(values, mask), mask, unbiased=False)
    flat = is_constant(returns, mask) | (total == 0)
    explained = 1 - unexplained / torch.where(flat, torch.ones_like(total), total)
    return torch.where(flat, torch.zeros_like(total), explained)
