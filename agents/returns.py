"""Returns and advantages as pure functions of `[B, T]` tensors.

Shapes: B rows, T response tokens. Where an episode ends is not a flag here but data: a discount of 0 pays nothing after
a termination, a λ of 0 stops the sum at a truncation and leaves the bootstrap, and a slot that does not count has a TD
error of 0 with discount and λ of 1, so that it hands on what comes from later. `boundaries` writes these down;
`gae` and `discounted_returns` know nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from agents.masked import clean, same_shape
from textenv.dynamics import last_slots


class Boundaries(NamedTuple):
    """What `gae` needs to know of where episodes end, each `[B, T]`."""

    next_values: Tensor
    """Value of the true successor of each slot's state."""
    discounts: Tensor
    """Weight of the successor: γ, 0 at a termination, 1 in a skipped slot."""
    lambdas: Tensor
    """Weight of the later TD errors: λ, 0 at a truncation, 1 in a skipped slot."""


class Estimates(NamedTuple):
    """What `masked_gae` estimates, each `[B, T]` and 0 outside of the mask."""

    advantages: Tensor
    """Advantages, not whitened."""
    returns: Tensor
    """Targets of the values: advantage + value, whatever is done to the advantages later."""


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    discounts: Tensor | float,
    lambdas: Tensor | float,
) -> Tensor:
    """Generalised advantage estimates, backwards in time.

    Âₜ = δₜ + dₜ λₜ Âₜ₊₁,  δₜ = rₜ + dₜ V'ₜ - Vₜ,  Â_T = 0

    Schulman et al. 2016 (arXiv 1506.02438), eq. 16, as a recursion. Here rₜ is paid for the action at t, d is per slot,
    and V'ₜ is given, because V of the next slot is not the value of the successor where an episode ends.

    Args:
        rewards: `[B, T]`.
        values: `[B, T]`, of the state that each action was taken in.
        next_values: `[B, T]`, of the state that it led to.
        discounts: `[B, T]` or a number; 0 at a termination.
        lambdas: `[B, T]` or a number in [0, 1].

    Returns:
        Advantages `[B, T]`. There is no mask here: every entry must be finite. See `masked_gae`.

    Raises:
        ValueError: if a shape differs from that of `rewards`, or that is not `[B, T]`.

    >>> gae(torch.tensor([[0.0, 0.0, 1.0]]), torch.zeros(1, 3), torch.zeros(1, 3), 1.0, 0.5)
    tensor([[0.2500, 0.5000, 1.0000]])
    """
    _two_dimensional("rewards", rewards)
    discounts, lambdas = _per_slot(discounts, rewards), _per_slot(lambdas, rewards)
    same_shape(rewards=rewards, values=values, next_values=next_values, discounts=discounts, lambdas=lambdas)
    td_errors = rewards + discounts * next_values - values
    return backward_recurrence(td_errors, discounts * lambdas)


def discounted_returns(rewards: Tensor, discounts: Tensor | float, bootstrap: Tensor | None = None) -> Tensor:
    """Discounted sums of rewards, backwards in time.

    Gₜ = rₜ + dₜ Gₜ₊₁,  G_T = bootstrap

    Sutton & Barto 2018, eq. 3.9, with rₜ for their Rₜ₊₁ and a discount per slot.

    Args:
        rewards: `[B, T]`.
        discounts: `[B, T]` or a number; 0 at a termination.
        bootstrap: `[B]`, what is worth having after the last slot; 0 when None.

    Returns:
        Returns `[B, T]`. There is no mask here: every entry must be finite.

    Raises:
        ValueError: if a shape is not as above.

    >>> discounted_returns(torch.tensor([[0.0, 0.0, 1.0]]), 0.5)
    tensor([[0.2500, 0.5000, 1.0000]])
    """
    _two_dimensional("rewards", rewards)
    discounts = _per_slot(discounts, rewards)
    same_shape(rewards=rewards, discounts=discounts)
    if bootstrap is not None:
        same_shape(**{"rewards[:, -1]": rewards[:, -1], "bootstrap": bootstrap})
        rewards = torch.cat([rewards[:, :-1], (rewards[:, -1] + discounts[:, -1] * bootstrap).unsqueeze(1)], dim=1)
    return backward_recurrence(rewards, discounts)


def backward_recurrence(inputs: Tensor, decays: Tensor) -> Tensor:
    """Solve yₜ = xₜ + cₜ yₜ₊₁ with y_T = 0, in ⌈log₂ T⌉ rounds.

    Each round doubles the number of slots that a sum covers (Hillis & Steele 1986): if y covers n slots and C is the
    product of their decays, then y + C · shift(y, n) covers 2n. Nothing is divided, so decays of 0 are as good as any.

    Args:
        inputs: x, `[B, T]`.
        decays: c, `[B, T]`.

    Returns:
        y, `[B, T]`.

    Raises:
        ValueError: if the shapes differ or are not `[B, T]`.

    >>> backward_recurrence(torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[2.0, 0.0, 2.0]]))
    tensor([[3., 1., 1.]])
    """
    _two_dimensional("inputs", inputs)
    same_shape(inputs=inputs, decays=decays)
    sums, products, covered = inputs, decays, 1
    while covered < inputs.shape[1]:
        sums = sums + products * pad(sums[:, covered:], (0, covered))
        products = products * pad(products[:, covered:], (0, covered))
        covered *= 2
    return sums


def boundaries(
    mask: Tensor,
    truncated: Tensor | None,
    bootstrap_values: Tensor | None,
    values: Tensor,
    gamma: float,
    lam: float | Tensor,
) -> Boundaries:
    """Where each row's episode goes on, ends and is cut, if a row is one episode that ends at its last counted slot.

    Args:
        mask: bool `[B, T]`; rows may have holes and padding.
        truncated: bool `[B]`, true for episodes that were cut, not terminated; none when None.
        bootstrap_values: `[B]`, value of the state after the cut; read where `truncated` only.
        values: `[B, T]`, and the same tensor that `gae` is given: skipped slots refer to it.
        gamma: discount.
        lam: λ of the TD errors; a number, or `[B, 1]`, one a row.

    Returns:
        The three as in `step_boundaries`.

    Raises:
        ValueError: if a shape is not as above, or `truncated` comes without `bootstrap_values`.

    >>> _, discounts, lambdas = boundaries(torch.tensor([[True, True, False]]), None, None, torch.zeros(1, 3), 0.9, 0.8)
    >>> discounts, lambdas
    (tensor([[0.9000, 0.0000, 1.0000]]), tensor([[0.8000, 0.8000, 1.0000]]))
    """
    _two_dimensional("mask", mask)
    last = last_slots(mask)
    if truncated is None:
        return step_boundaries(mask, last, torch.zeros_like(last), torch.zeros_like(values), values, gamma, lam)
    if bootstrap_values is None:
        raise ValueError("bootstrap_values: expected one value per row, because truncated is given, got None")
    same_shape(**{"mask[:, 0]": mask[:, 0], "truncated": truncated, "bootstrap_values": bootstrap_values})
    cut = last & truncated.unsqueeze(1)
    return step_boundaries(mask, last & ~cut, cut, bootstrap_values.unsqueeze(1).expand_as(values), values, gamma, lam)


def step_boundaries(
    mask: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    bootstrap_values: Tensor,
    values: Tensor,
    gamma: float,
    lam: float | Tensor,
) -> Boundaries:
    """Where episodes go on, end and are cut, if they may do so at any slot (several episodes in a row).

    A slot that goes on has the value of the next counted slot as V', d = γ and λ. A termination has d = 0. A truncation
    has the bootstrap value as V', d = γ, and λ = 0, because the next slot belongs to another episode. A slot outside
    of the mask has V' = V and d = λ = 1, hence δ = 0 if its reward is 0: later errors pass through it undiminished.

    Args:
        mask: bool `[B, T]`.
        terminated: bool `[B, T]`; wins over `truncated`. The last counted slot of a row is taken as terminated unless
            it is truncated, for nothing in the row follows it.
        truncated: bool `[B, T]`.
        bootstrap_values: `[B, T]`, value of the state after a cut; read where `truncated` only.
        values: `[B, T]`, and the same tensor that `gae` is given.
        gamma: discount.
        lam: λ of the TD errors; a number, or `[B, 1]`, one a row.

    Returns:
        Next values, discounts and lambdas, each `[B, T]`.

    Raises:
        ValueError: if a shape is not as above.

    >>> counts, cut = torch.tensor([[True, True, True]]), torch.tensor([[True, False, False]])
    >>> step_boundaries(counts, ~counts, cut, torch.full((1, 3), 5.0), torch.ones(1, 3), 0.9, 0.8).next_values
    tensor([[5., 1., 0.]])
    """
    _two_dimensional("mask", mask)
    same_shape(mask=mask, terminated=terminated, truncated=truncated, bootstrap_values=bootstrap_values, values=values)
    length = mask.shape[1]
    counted = torch.where(mask, torch.arange(length, device=mask.device), length)
    following = pad(counted[:, 1:], (0, 1), value=length).flip(1).cummin(1).values.flip(1)
    cut = truncated & ~terminated
    ended = (terminated | (following == length)) & ~cut
    next_values = torch.where(cut, bootstrap_values, pad(values, (0, 1)).gather(1, following))
    one = torch.ones_like(values)
    return Boundaries(
        next_values=torch.where(mask, torch.where(ended, torch.zeros_like(values), next_values), values),
        discounts=torch.where(mask, torch.where(ended, 0.0, gamma * one), one),
        lambdas=torch.where(mask, torch.where(cut, 0.0, lam * one), one),
    )


def masked_gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    gae_lambda: float | Tensor,
    truncated: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
) -> Estimates:
    """Advantages and returns of rows of one episode each: `gae` over `boundaries`, with the masked slots cleaned.

    Rₜ = Âₜ + Vₜ is formed here, so that no later whitening of the advantages can enter the targets.

    Args:
        rewards: `[B, T]`.
        values: `[B, T]`.
        mask: bool `[B, T]`; whatever lies outside of it, NaN included, is neither read nor returned.
        gamma: discount.
        gae_lambda: λ of the TD errors; a number, or `[B, 1]`, one a row.
        truncated: as in `boundaries`.
        bootstrap_values: as in `boundaries`.

    Returns:
        Advantages and returns, `[B, T]`, 0 outside of the mask.

    Raises:
        ValueError: as `boundaries` and `gae`.

    >>> rewards, mask = torch.tensor([[0.0, 1.0, float("nan")]]), torch.tensor([[True, True, False]])
    >>> masked_gae(rewards, torch.full((1, 3), 0.5), mask, gamma=1.0, gae_lambda=1.0)
    Estimates(advantages=tensor([[0.5000, 0.5000, 0.0000]]), returns=tensor([[1., 1., 0.]]))
    """
    same_shape(rewards=rewards, values=values, mask=mask)
    rewards, values = clean(rewards, mask), clean(values, mask)
    advantages = gae(rewards, values, *boundaries(mask, truncated, bootstrap_values, values, gamma, gae_lambda))
    return Estimates(clean(advantages, mask), clean(advantages + values, mask))


def _per_slot(number: Tensor | float, like: Tensor) -> Tensor:
    """A number as a tensor of that shape; a tensor as it is."""
    if isinstance(number, Tensor):
        return number
    return torch.full(like.shape, number, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def _two_dimensional(name: str, x: Tensor) -> None:
    """Raise unless there are rows and slots."""
    if x.ndim != 2:
        raise ValueError(f"{name}: expected shape [B, T], got {tuple(x.shape)}")
