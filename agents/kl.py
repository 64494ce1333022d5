"""Divergence between a policy and its reference: estimators from sampled tokens, and the exact sum over the vocabulary.

Shapes: B rows, T response tokens, V vocabulary. With d = log π(a) - log π_ref(a) and a sampled from π, the means of k1
and k3 are KL(π‖π_ref), and that of k2 is close to it (Schulman 2020, "Approximating KL divergence"). As a *reward* only
k1 is right. As a *loss* each differentiates to something else, on policy and with the visited states held fixed:

    k1  E[∇d]                = 0
    k2  E[d ∇log π]          = ∇ KL(π‖π_ref)
    k3  E[(1 - e⁻ᵈ) ∇log π]  = ∇ KL(π_ref‖π)

Each function takes an optional `mask`, true where a token counts: what lies outside is cleaned first and yields 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agents.masked import clean, same_shape


def k1(logprobs: Tensor, ref_logprobs: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """The log-ratio, k1 = log π(a) - log π_ref(a): unbiased, of either sign, and the one that rewards are charged with.

    Args:
        logprobs: log π(a), `[B, T]`.
        ref_logprobs: log π_ref(a), `[B, T]`.
        mask: bool `[B, T]`.

    Returns:
        `[B, T]`.

    Raises:
        ValueError: if shapes differ.

    >>> k1(torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-2.0, -2.0, -2.0]]))
    tensor([[ 1.,  0., -1.]])
    """
    same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    if mask is not None:
        logprobs, ref_logprobs = clean(logprobs, mask), clean(ref_logprobs, mask)
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Half the squared log-ratio, k2 = d²/2: as a loss it has the gradient of KL(π‖π_ref) at fixed states.

    Args:
        logprobs: log π(a), `[B, T]`.
        ref_logprobs: log π_ref(a), `[B, T]`.
        mask: bool `[B, T]`.

    Returns:
        `[B, T]`, non-negative.

    Raises:
        ValueError: if shapes differ.

    >>> k2(torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-2.0, -2.0, -2.0]]))
    tensor([[0.5000, 0.0000, 0.5000]])
    """
    return 0.5 * k1(logprobs, ref_logprobs, mask=mask) ** 2


def k3(logprobs: Tensor, ref_logprobs: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """The log-ratio with a control variate, k3 = e⁻ᵈ - 1 + d: unbiased and non-negative.

    As a loss it has the gradient of KL(π_ref‖π), the other direction.

    Args:
        logprobs: log π(a), `[B, T]`.
        ref_logprobs: log π_ref(a), `[B, T]`.
        mask: bool `[B, T]`.

    Returns:
        `[B, T]`, non-negative up to rounding.

    Raises:
        ValueError: if shapes differ.

    >>> k3(torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-2.0, -2.0, -2.0]]))
    tensor([[0.3679, 0.0000, 0.7183]])
    """
    difference = k1(logprobs, ref_logprobs, mask=mask)
    return torch.expm1(-difference) + difference


def exact(logits: Tensor, ref_logits: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """The divergence itself at each state, Σₐ π(a) (log π(a) - log π_ref(a)).

    Logits are normalised in float32 at least. An action with logit -inf under π (a constraint of the MDP) adds nothing;
    one that only π_ref excludes makes the divergence infinite, as it is.

    Args:
        logits: `[..., V]`, divided by the temperature.
        ref_logits: `[..., V]`, likewise.
        mask: bool `[...]`; states that count.

    Returns:
        `[...]`.

    Raises:
        ValueError: if shapes differ.

    >>> exact(torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 2.0]]), torch.zeros(3, 2))
    tensor([0.0000, 0.0000, 0.3278])
    """
    same_shape(logits=logits, ref_logits=ref_logits)
    if mask is not None:
        everywhere = mask.unsqueeze(-1).expand_as(logits)
        logits, ref_logits = clean(logits, everywhere), clean(ref_logits, everywhere)
    logprobs = _log_softmax(logits)
    possible = logprobs > -torch.inf
    # Selected before the product: 0 · (-inf + inf) is NaN, in the value and in the gradient.
    difference = k1(logprobs, _log_softmax(ref_logits), mask=possible)
    return (logprobs.exp() * difference).sum(-1)


def _log_softmax(logits: Tensor) -> Tensor:
    """Over the last dimension, in float32 at least."""
    return torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
