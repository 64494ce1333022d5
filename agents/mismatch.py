"""What samples is never exactly what trains: weights that correct the gap, and statistics that watch it.

A sampler draws tokens from its own arithmetic's law μ, the trainer's forward of the same weights gives π_old. Even at
equal weights the two differ by rounding; at unequal weights, or if μ is told wrongly, learning is silently off policy
(Yao, Liu et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training").

Shapes: B rows, T response tokens. What lies outside of the mask, NaN included, changes nothing.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from agents.kl import k1
from agents.losses import importance_ratios
from agents.masked import masked_mean, masked_sum

CorrectionLevel = Literal["token", "sequence", "none"]


@torch.no_grad()
def correction_weights(
    old_logprobs: Tensor,
    behavior_logprobs: Tensor,
    mask: Tensor,
    *,
    level: CorrectionLevel = "token",
    cap: float = 2.0,
    drop: bool = False,
) -> Tensor:
    """Importance weights of the policy's loss: π_old over μ, cut off at a cap.

        token     w_t = min(π_old(a_t|s_t) / μ(a_t|s_t), C)
        sequence  w_t = min(Π_s π_old(a_s|s_s) / μ(a_s|s_s), C), one number a response

    Below the cap, sequence weights give the gradient under π_old exactly, with a variance that grows with the length.
    Token weights leave out what earlier tokens make of the states: a smaller bias than none, and little variance.

    Args:
        old_logprobs: log π_old(a), `[B, T]`.
        behavior_logprobs: log μ(a), `[B, T]`.
        mask: bool `[B, T]`.
        level: Whose ratio: a token's or a response's; `"none"`: all weights are 1.
        cap: C.
        drop: Whether what exceeds the cap weighs 0 instead of C (Liu, Li et al. 2025: "When speed kills stability").

    Returns:
        `[B, T]`, constants, 1 outside of the mask, or 0 in a response that is dropped.

    Raises:
        ValueError: If shapes differ.

    >>> counts = torch.tensor([[True, True, False]])
    >>> old, behavior = torch.tensor([[-1.0, -2.0, 5.0]]), torch.tensor([[-1.5, -1.0, 0.0]])
    >>> correction_weights(old, behavior, counts)
    tensor([[1.6487, 0.3679, 1.0000]])
    >>> correction_weights(old, behavior, counts, level="sequence")
    tensor([[0.6065, 0.6065, 0.6065]])
    """
    gap = k1(old_logprobs, behavior_logprobs, mask=mask)
    if level == "none":
        return torch.ones_like(gap)
    if level == "sequence":
        gap = gap.sum(1, keepdim=True).expand_as(gap)
    weights = importance_ratios(gap, torch.zeros_like(gap))
    return torch.where(weights > cap, torch.zeros_like(weights), weights) if drop else weights.clamp(max=cap)


class Mismatch(NamedTuple):
    """How far the trainer's law is from the sampler's on the sampled tokens, scalars; no gap if nothing counts."""

    logprob_gap: Tensor
    """Mean of |log π_old − log μ|, nats per token."""
    prob_gap: Tensor
    """Mean of |π_old − μ|."""
    kl: Tensor
    """KL(μ‖π_old) per token, its k3 estimate, nats."""
    bounded_kl: Tensor
    """The same of log-ratios cut to ±1: what one token adds is at most (e − 2)/N."""
    effective_frac: Tensor
    """Effective sample size of the tokens' ratios over their number, in [0, 1]."""
    worst_sequence: Tensor
    """Largest |Σ_t (log π_old − log μ)| of a response, nats."""


@torch.no_grad()
def mismatch(old_logprobs: Tensor, behavior_logprobs: Tensor, mask: Tensor) -> Mismatch:
    """Statistics of the gap between trainer and sampler.

    Args:
        old_logprobs: log π_old(a), `[B, T]`.
        behavior_logprobs: log μ(a), `[B, T]`.
        mask: bool `[B, T]`.

    Raises:
        ValueError: If shapes differ.

    >>> counts = torch.tensor([[True, True, False]])
    >>> found = mismatch(torch.tensor([[-1.0, -2.0, 5.0]]), torch.tensor([[-1.5, -1.0, 0.0]]), counts)
    >>> [round(float(number), 4) for number in found]
    [0.75, 0.1886, 0.2583, 0.2583, 0.7125, 0.5]
    """
    gap = k1(old_logprobs, behavior_logprobs, mask=mask)
    if not mask.any():
        zero = gap.new_zeros(())
        return Mismatch(zero, zero, zero, zero, zero + 1, zero)
    ratios = importance_ratios(old_logprobs, behavior_logprobs, mask=mask)
    bounded = gap.clamp(-1, 1)
    return Mismatch(
        logprob_gap=masked_mean(gap.abs(), mask),
        prob_gap=masked_mean((old_logprobs.exp() - behavior_logprobs.exp()).abs(), mask),
        kl=masked_mean(ratios - 1 - ratios.log(), mask),
        bounded_kl=masked_mean(bounded.exp() - 1 - bounded, mask),
        effective_frac=masked_mean(ratios, mask) ** 2 / masked_mean(ratios**2, mask),
        worst_sequence=masked_sum(gap, mask, dim=1).abs().max(),
    )


class SamplerMismatch(RuntimeError):
    """The sampler's law is not the trainer's: what it drew must not be learnt from."""


def check_mismatch(old_logprobs: Tensor, behavior_logprobs: Tensor, mask: Tensor, alarm: float | None) -> None:
    """Refuse samples whose law is further from the trainer's than rounding explains.

    What is watched is `bounded_kl`: a law that is wrong is so at most tokens, while one token that is far off, as
    rounding in bfloat16 now and then makes it, would move the mean of an unbounded estimate as much.

    Args:
        old_logprobs: log π_old(a), `[B, T]`.
        behavior_logprobs: log μ(a), `[B, T]`.
        mask: bool `[B, T]`.
        alarm: Largest bounded KL(μ‖π_old) per token, nats; None: none is too large.

    Raises:
        SamplerMismatch: With what it may come from.
    """
    found = mismatch(old_logprobs, behavior_logprobs, mask)
    if alarm is None or float(found.bounded_kl) <= alarm:  # NaN is no number to go on with
        return
    raise SamplerMismatch(
        f"the sampler's log-probs are {float(found.bounded_kl):.2g} nats per token (bounded KL) from the trainer's, "
        f"above the alarm of {alarm:.2g}; mean |Δ log p| {float(found.logprob_gap):.2g}, worst response "
        f"{float(found.worst_sequence):.2g}."
        " Rounding in bfloat16 gives 1e-4 to 2e-3. Likelier: weights that were not pushed, or in part; a prefix cache "
        "from before a push; log-probs of another temperature, or of top-p; other positions. Nothing was learnt from "
        "these samples."
    )
