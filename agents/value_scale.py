"""The scale on which a critic learns: running statistics of the returns.

The value head learns u = (R − μ)/σ, so neither its loss nor its gradient knows the unit of the rewards. There is no
absolute ε anywhere: rewards times a power of two give bit-identical updates.
"""

from __future__ import annotations

import math

from torch import Tensor

from agents.masked import is_constant, masked_mean, masked_var
from agents.value_head import ValueHead


def first_value_scale(head: ValueHead, returns: Tensor, mask: Tensor) -> bool:
    """Set μ and σ from the first returns ever seen.

    A new head (u = 0) then starts at V = μ; one that came from a reward model keeps the values it has. Returns that are
    all 0 have no scale, and set none.

    Args:
        head: Its statistics are set.
        returns: `[B, T]`.
        mask: `[B, T]` bool.

    Returns:
        Whether the values moved: every V is μ now.
    """
    mean, variance = _moments(returns, mask)
    std = math.sqrt(variance) if variance > 0 else abs(mean)
    if std == 0:
        return False
    new = not bool(head.linear.weight.any() or head.linear.bias.any())
    head.rescale_values(mean, std, preserve=not new)
    head.value_count.add_(1)
    return new


def update_value_scale(head: ValueHead, returns: Tensor, mask: Tensor, decay: float) -> None:
    """Move μ and σ towards those of new returns; every value stays as it is.

    With a = 1 − decay:  μ' = μ + a·(m − μ);  σ'² = (1 − a)·σ² + a·s² + a·(1 − a)·(m − μ)², the moments of the mixture.

    Args:
        head: Its statistics and weights are moved (PopArt).
        returns: `[B, T]`, of mean m and variance s².
        mask: `[B, T]` bool.
        decay: Weight of the past, in [0, 1].
    """
    if head.value_count == 0:  # all returns so far were 0, or the rollout is somebody else's
        first_value_scale(head, returns, mask)
        return
    mean, variance = _moments(returns, mask)
    old_mean, old_variance, new = float(head.value_mean), float(head.value_std) ** 2, 1.0 - decay
    shift = mean - old_mean
    mixed = decay * old_variance + new * variance + new * decay * shift * shift
    if mixed > 0:
        head.rescale_values(old_mean + new * shift, math.sqrt(mixed), preserve=True)
    head.value_count.add_(1)


def _moments(returns: Tensor, mask: Tensor) -> tuple[float, float]:
    mean = float(masked_mean(returns.double(), mask))
    constant = bool(is_constant(returns, mask))
    return mean, 0.0 if constant else float(masked_var(returns.double(), mask, unbiased=False))
