"""Per-token objectives and their reduction. What to log about them is in `agents.diagnostics`.

Shapes: B rows, T response tokens. A loss is `[B, T]`, and `aggregate` reduces it, by *global* counts, so that an update
does not depend on how its tokens were cut into micro-batches. Log-probs of the past, advantages, old values and
returns are constants here: no gradient flows into them.

Each loss takes an optional `mask`, true where a token counts: what lies outside is cleaned first and costs 0. Give it
whenever masked slots may hold anything but finite numbers: `aggregate` cleans the loss, but cannot undo the 0 · NaN of
the loss's own derivative.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from agents.kl import k1, k2
from agents.masked import clean, masked_mean, masked_sum, same_shape

# exp(20) is far outside of any trust region and far inside of float32.
_LOG_RATIO_LIMIT = 20.0


def importance_ratios(logprobs: Tensor, old_logprobs: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Ratios ρₜ = π(aₜ|sₜ) / π_old(aₜ|sₜ), from log-ratios clamped to ±20 so that they stay finite.

    Args:
        logprobs: log π(a), `[B, T]`.
        old_logprobs: log π_old(a), `[B, T]`; a constant.
        mask: bool `[B, T]`; the ratio is 1 outside of it.

    Returns:
        `[B, T]`, positive.

    Raises:
        ValueError: if shapes differ.

    >>> importance_ratios(torch.tensor([[0.0, -1.0, -2.0]]), torch.tensor([[-1.0, -1.0, -1.0]]))
    tensor([[2.7183, 1.0000, 0.3679]])
    """
    same_shape(logprobs=logprobs, old_logprobs=old_logprobs)
    log_ratios = k1(logprobs, old_logprobs.detach(), mask=mask)
    return log_ratios.clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT).exp()


def clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_eps: float,
    *,
    clip_eps_high: float | None = None,
    dual_clip: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """PPO's clipped surrogate as a loss, -min(ρₜ Âₜ, clip(ρₜ, 1 - ε, 1 + ε_high) Âₜ).

    Schulman et al. 2017 (arXiv 1707.06347), eq. 7, with the sign of a loss. `clip_eps_high` widens the upper side
    alone (DAPO, arXiv 2503.14476: "clip-higher"); `dual_clip` c bounds the loss of a negative advantage by -c Âₜ (Ye et
    al. 2020, arXiv 1912.09729: "dual-clip PPO").

    Args:
        logprobs: log π(a), `[B, T]`.
        old_logprobs: log π_old(a), `[B, T]`; a constant.
        advantages: `[B, T]`; constants.
        clip_eps: half-width ε of the trust region.
        clip_eps_high: half-width on the upper side; `clip_eps` when None.
        dual_clip: c > 1, or None for no bound.
        mask: bool `[B, T]`.

    Returns:
        Loss `[B, T]`.

    Raises:
        ValueError: if shapes differ, a half-width is negative, or `dual_clip` is not above 1.

    >>> clipped_surrogate(torch.tensor([[0.0, -1.0, -2.0]]), torch.full((1, 3), -1.0), torch.ones(1, 3), 0.2)
    tensor([[-1.2000, -1.0000, -0.3679]])
    """
    same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip: expected a number above 1, got {dual_clip}")
    low, high = _trust_region(clip_eps, clip_eps_high)
    advantages = _constant(advantages, mask)
    ratios = importance_ratios(logprobs, old_logprobs, mask=mask)
    loss = torch.maximum(-advantages * ratios, -advantages * ratios.clamp(low, high))
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return loss


def sequence_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_eps: float,
    *,
    mask: Tensor,
    clip_eps_high: float | None = None,
    per_token: bool = False,
) -> Tensor:
    """The surrogate clipped by the ratio of whole responses, s = (π(y)/π_old(y))^(1/|y|): GSPO (arXiv 2507.18071).

    GSPO (eq. 5): -min(s Â, clip(s) Â) at each token of a response, Â the mean of the response's advantages. GSPO-token
    (eq. 13): sₜ = sg(s) · π(aₜ)/sg(π(aₜ)) for s, which has its value, and each token's own Âₜ. The mean over a
    response, which the paper takes ("sequence" in `aggregate`), has the gradient -s Â mean(∇log π) in both where Â is
    constant.

    Args:
        logprobs: log π(a), `[B, T]`.
        old_logprobs: log π_old(a), `[B, T]`; a constant.
        advantages: `[B, T]`; constants.
        clip_eps: half-width ε of the trust region of s.
        mask: bool `[B, T]`.
        clip_eps_high: half-width on the upper side; `clip_eps` when None.
        per_token: GSPO-token.

    Returns:
        Loss `[B, T]`, 0 outside of the mask.

    Raises:
        ValueError: if shapes differ or a half-width is negative.

    >>> sequence_surrogate(torch.tensor([[0.0, -1.0]]), torch.full((1, 2), -1.0), torch.ones(1, 2), 0.2,
    ...     mask=torch.ones(1, 2) > 0)
    tensor([[-1.2000, -1.2000]])
    """
    same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    low, high = _trust_region(clip_eps, clip_eps_high)
    advantages = _constant(advantages, mask)
    log_ratios = masked_mean(k1(logprobs, old_logprobs.detach(), mask=mask), mask, dim=1).unsqueeze(1)
    if per_token:
        own = clean(logprobs, mask)
        log_ratios = log_ratios.detach() + (own - own.detach())
    else:
        advantages = masked_mean(advantages, mask, dim=1).unsqueeze(1)
    ratios = log_ratios.clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT).exp()
    loss = torch.maximum(-advantages * ratios, -advantages * ratios.clamp(low, high))
    return clean(loss.expand_as(logprobs), mask)


def policy_gradient(logprobs: Tensor, advantages: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """The likelihood-ratio loss, -Âₜ log π(aₜ|sₜ), whose gradient is REINFORCE's (Williams 1992).

    Args:
        logprobs: log π(a), `[B, T]`.
        advantages: `[B, T]`; constants.
        mask: bool `[B, T]`.

    Returns:
        Loss `[B, T]`.

    Raises:
        ValueError: if shapes differ.

    >>> policy_gradient(torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[1.0, 0.5, -1.0]]))
    tensor([[ 1.,  1., -3.]])
    """
    same_shape(logprobs=logprobs, advantages=advantages)
    return -_constant(advantages, mask) * (logprobs if mask is None else clean(logprobs, mask))


def clipped_value(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    clip_eps: float | None,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """The value loss of PPO's first code, ½ max((V - R)², (clip(V, V_old ± ε) - R)²).

    Not in the paper; OpenAI baselines' ppo2 has it (Huang et al. 2022, "The 37 implementation details of PPO",
    detail 9). ε is in the unit of the values, so normalise them first, or give None for ½ (V - R)².

    Args:
        values: `[B, T]`.
        old_values: `[B, T]`, at collection; constants.
        returns: `[B, T]`; constants.
        clip_eps: half-width ε, or None for no clipping.
        mask: bool `[B, T]`.

    Returns:
        Loss `[B, T]`.

    Raises:
        ValueError: if shapes differ or ε is negative.

    >>> clipped_value(torch.tensor([[0.0, 1.0, 2.0]]), torch.zeros(1, 3), torch.full((1, 3), 2.0), 0.5)
    tensor([[2.0000, 1.1250, 1.1250]])
    """
    same_shape(values=values, old_values=old_values, returns=returns)
    returns = _constant(returns, mask)
    values = values if mask is None else clean(values, mask)
    squares = (values - returns) ** 2
    if clip_eps is None:
        return 0.5 * squares
    _non_negative("clip_eps", clip_eps)
    old_values = _constant(old_values, mask)
    near = old_values + (values - old_values).clamp(-clip_eps, clip_eps)
    return 0.5 * torch.maximum(squares, (near - returns) ** 2)


def kl_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """A loss with the gradient of KL(π‖π_ref) at fixed states: sg(ρₜ) · k2ₜ.

    Earlier tokens get no credit for the divergence of later states; charge k1 in the reward for that. After the first
    optimizer step the tokens no longer come from π, hence the ratio ρ = π/π_old, held constant (sg).

    Args:
        logprobs: log π(a), `[B, T]`.
        ref_logprobs: log π_ref(a), `[B, T]`; a constant.
        old_logprobs: log π_old(a), `[B, T]`, of the policy that sampled; π itself when None.
        mask: bool `[B, T]`.

    Returns:
        Loss `[B, T]`.

    Raises:
        ValueError: if shapes differ.

    >>> kl_loss(torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-2.0, -2.0, -2.0]]))
    tensor([[0.5000, 0.0000, 0.5000]])
    """
    loss = k2(logprobs, ref_logprobs.detach(), mask=mask)
    if old_logprobs is None:
        return loss
    return importance_ratios(logprobs.detach(), old_logprobs, mask=mask) * loss


def aggregate(
    loss: Tensor,
    mask: Tensor,
    how: Literal["token", "sequence"] = "token",
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Reduce a per-token loss: Σ lossₜ / N over tokens, or Σ_b (mean over the tokens of row b) / N over sequences.

    N is the count of the *whole* batch. Given it, the micro-batches' results add up to that of the batch, whatever the
    cut. The gradient of the expected return needs "token"; "sequence" weights a token by 1 / length of its row.

    Args:
        loss: `[B, T]`.
        mask: bool `[B, T]`.
        how: "token" or "sequence".
        denominator: N; the counted tokens, or the rows with any, of `mask` itself when None.

    Returns:
        A scalar; 0 if nothing counts.

    Raises:
        ValueError: if shapes differ, `how` is unknown, or N is a number that is not positive.

    >>> loss, mask = torch.tensor([[1.0, 2.0, 9.0], [6.0, 9.0, 9.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]]) > 0
    >>> aggregate(loss, mask), aggregate(loss, mask, "sequence"), aggregate(loss[:1], mask[:1], denominator=3)
    (tensor(3.), tensor(3.7500), tensor(1.))
    """
    if how not in ("token", "sequence"):
        raise ValueError(f'how: expected "token" or "sequence", got {how!r}')
    if isinstance(denominator, float | int) and not denominator > 0:
        raise ValueError(f"denominator: expected a positive count, got {denominator}")
    if how == "token":
        total, count = masked_sum(loss, mask), mask.sum()
    else:
        total, count = masked_mean(loss, mask, dim=-1).sum(), mask.any(-1).sum()
    return total / (count.clamp(min=1) if denominator is None else denominator)


def _constant(x: Tensor, mask: Tensor | None) -> Tensor:
    """Detached, and clean where there is a mask."""
    return x.detach() if mask is None else clean(x.detach(), mask)


def _non_negative(name: str, half_width: float) -> None:
    """Raise unless it is a half-width."""
    if not half_width >= 0:
        raise ValueError(f"{name}: expected a non-negative number, got {half_width}")


def _trust_region(clip_eps: float, clip_eps_high: float | None) -> tuple[float, float]:
    """Its ends, 1 - ε and 1 + ε_high."""
    _non_negative("clip_eps", clip_eps)
    if clip_eps_high is None:
        clip_eps_high = clip_eps
    _non_negative("clip_eps_high", clip_eps_high)
    return 1 - clip_eps, 1 + clip_eps_high
