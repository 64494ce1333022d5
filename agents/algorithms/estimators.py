"""Advantage estimators: small objects `(rollout, gamma) -> Targets`, usable alone and inside one another.

Shapes: B rows, T response tokens. `rollout.rewards` holds whatever is charged for the KL, so it enters each of them:
token by token where an estimator sums what comes *after* a token, in one sum where it looks at whole responses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from agents.algorithms.base import Estimator, Needing, Targets
from agents.checks import number
from agents.masked import clean, masked_mean, whiten
from agents.returns import Estimates, discounted_returns, masked_gae
from agents.rollout import Rollout

_NOTHING: frozenset[str] = frozenset()
# A group whose returns differ by less than this many rounding errors of their size is taken as constant.
_ROUNDING_ERRORS = 16


@dataclass(frozen=True)
class GAE:
    """Generalised advantage estimates Âₜ = Σₗ (γλ)ˡ δₜ₊ₗ (Schulman et al. 2016, eq. 16), and returns Â + V."""

    lam: float = 0.98
    """λ."""

    def __post_init__(self) -> None:
        """Check λ."""
        number("lam", self.lam, high=1.0)

    needs = frozenset({"critic"})

    def __call__(self, rollout: Rollout, gamma: float) -> Targets:
        """`agents.returns.masked_gae`; rewards enter token by token."""
        estimates = _gae(rollout, gamma, self.lam)
        return Targets(estimates.advantages, estimates.returns)


@dataclass(frozen=True)
class DecoupledGAE:
    """GAE with one λ for the policy and another for the returns of the critic (VC-PPO, arXiv 2503.01491, §3.2).

    With λ = 1 the critic learns plain returns, to which a wrong value adds no bias.
    """

    lam: float = 0.98
    """λ of the advantages."""
    value_lam: float = 1.0
    """λ of the returns."""

    def __post_init__(self) -> None:
        """Check both."""
        number("lam", self.lam, high=1.0)
        number("value_lam", self.value_lam, high=1.0)

    needs = frozenset({"critic"})

    def __call__(self, rollout: Rollout, gamma: float) -> Targets:
        """GAE twice; rewards enter token by token."""
        return Targets(_gae(rollout, gamma, self.lam).advantages, _gae(rollout, gamma, self.value_lam).returns)


@dataclass(frozen=True)
class LengthAdaptiveGAE:
    """Decoupled GAE whose λ grows with the length l of a response, λ = max(0, 1 − 1/(α l)) (VAPO, arXiv 2504.05118).

    The sum of the weights λⁱ is then about α l whatever the length. The paper's α = 0.05 is for responses of thousands
    of tokens: at 48 it makes λ = 0.58.
    """

    alpha: float
    """α, the share of a response that an error of the values reaches."""
    value_lam: float = 1.0
    """λ of the returns."""

    def __post_init__(self) -> None:
        """Check both."""
        number("alpha", self.alpha, above=0.0)
        number("value_lam", self.value_lam, high=1.0)

    needs = frozenset({"critic"})

    def __call__(self, rollout: Rollout, gamma: float) -> Targets:
        """GAE with a λ per row; rewards enter token by token."""
        lengths = rollout.mask.sum(1, keepdim=True).to(rollout.values.dtype)
        lam = (1 - 1 / (self.alpha * lengths.clamp(min=1))).clamp(min=0)
        return Targets(_gae(rollout, gamma, lam).advantages, _gae(rollout, gamma, self.value_lam).returns)


@dataclass(frozen=True)
class ReturnToGo:
    """What came after each token, Âₜ = Gₜ = Σₛ≥ₜ γˢ⁻ᵗ rₛ (REINFORCE, Williams 1992), without a baseline."""

    needs = _NOTHING

    def __call__(self, rollout: Rollout, gamma: float) -> Targets:
        """Rewards enter token by token."""
        return Targets(_to_go(rollout, gamma))


@dataclass(frozen=True)
class RunningBaseline:
    """REINFORCE against a running mean, Âₜ = Gₜ − b, with b ← decay·b + (1 − decay)·mean(G) after each update.

    b comes from earlier rollouts, so it is independent of this one; the first rollout is held against its own mean.
    """

    decay: float = 0.9
    """Weight of the past."""

    def __post_init__(self) -> None:
        """Check it."""
        number("decay", self.decay, high=1.0)

    needs = _NOTHING

    def __call__(self, rollout: Rollout, gamma: float) -> Targets:
        """Rewards enter token by token; b is `memory["baseline"]`."""
        to_go = _to_go(rollout, gamma)
        mean = float(masked_mean(to_go.double(), rollout.mask))
        baseline = rollout.memory.get("baseline", mean)
        moved = self.decay * baseline + (1 - self.decay) * mean
        return Targets(clean(to_go - baseline, rollout.mask), memory={"baseline": moved})


@dataclass(frozen=True)
class GreedyBaseline:
    """REINFORCE against the greedy response to the same prompt, Âₜ = Gₜ − r(x, ŷ) (ReMax, arXiv 2310.10505, §4).

    r(x, ŷ) is the score and the penalties of ŷ, without its KL, as in the paper's code.
    """

    needs = frozenset({"greedy"})

    def __call__(self, rollout: Rollout, gamma: float) -> Targets:
        """Rewards enter token by token."""
        if rollout.greedy is None:
            raise ValueError("rollout: expected one with `greedy` returns (Algorithm(..., greedy=True)), got None")
        return Targets(clean(_to_go(rollout, gamma) - rollout.greedy[:, None], rollout.mask))


@dataclass(frozen=True)
class LeaveOneOut:
    """A response against the mean of the others to its prompt, Âᵢ = Rᵢ − 1/(n−1) Σⱼ≠ᵢ Rⱼ (RLOO, arXiv 2402.14740)."""

    needs = frozenset({"groups"})

    def __call__(self, rollout: Rollout, gamma: float) -> Targets:
        """Rewards, KL included, enter as the sum over the response."""
        centred, _, size = _centred(_whole_returns(rollout.rewards, rollout, gamma), rollout)
        return _on_tokens(centred * size / (size - 1), rollout)


@dataclass(frozen=True)
class GroupNormalized:
    """A response against its group, Âᵢ = (Rᵢ − mean R)/sd R (GRPO, arXiv 2402.03300, §4.1.2).

    sd is the unbiased one. A group whose scores and penalties are all equal has Â = 0 under it: all that its returns
    differ by is their KL, which would become one deviation whatever β is. Dividing by sd weighs prompts by how little
    their responses differ; without it (Dr. GRPO, arXiv 2503.20783) Â is (n−1)/n times that of `LeaveOneOut`.
    """

    std: bool = True
    """Whether to divide by the group's standard deviation."""

    def __post_init__(self) -> None:
        """Check it."""
        if not isinstance(self.std, bool):
            raise ValueError(f"std: expected True or False, got {self.std!r}")

    needs = frozenset({"groups"})

    def __call__(self, rollout: Rollout, gamma: float) -> Targets:
        """Rewards, KL included, enter as the sum over the response."""
        centred, std, _ = _centred(_whole_returns(rollout.rewards, rollout, gamma), rollout)
        if not self.std:
            return _on_tokens(centred, rollout)
        paid = rollout.rewards if rollout.task_rewards is None else rollout.task_rewards
        _, spread, _ = _centred(_whole_returns(paid, rollout, gamma), rollout)
        told = (std > 0) & (spread > 0)
        return _on_tokens(torch.where(told, centred / torch.where(told, std, 1.0), 0.0), rollout)


@dataclass(frozen=True)
class Whitened:
    """Another estimator's advantages, to mean 0 and variance 1 over the rollout's tokens (`agents.masked.whiten`).

    The mean is a baseline that no action moves, and the deviation a factor common to all, so the expected gradient
    keeps its direction. The returns are not whitened.
    """

    estimator: Estimator
    """Whose advantages."""

    @property
    def needs(self) -> frozenset[str]:
        """The other's."""
        return self.estimator.needs if isinstance(self.estimator, Needing) else _NOTHING

    def __call__(self, rollout: Rollout, gamma: float) -> Targets:
        """The other's targets, whitened."""
        found = self.estimator(rollout, gamma)
        return Targets(whiten(found.advantages, rollout.mask), found.returns, found.memory)


@dataclass(frozen=True)
class Scaled:
    """Another estimator's advantages over their root mean square; no mean is moved, so a sign stays what it is.

    With it an update does not depend on the unit of the rewards. It is a factor common to all tokens.
    """

    estimator: Estimator
    """Whose advantages."""

    @property
    def needs(self) -> frozenset[str]:
        """The other's."""
        return self.estimator.needs if isinstance(self.estimator, Needing) else _NOTHING

    def __call__(self, rollout: Rollout, gamma: float) -> Targets:
        """The other's targets, scaled; advantages of a few rounding errors of the returns have no size, and are 0."""
        found = self.estimator(rollout, gamma)
        advantages = clean(found.advantages, rollout.mask)
        size = masked_mean(advantages**2, rollout.mask).sqrt()
        told = size > _ROUNDING_ERRORS * torch.finfo(rollout.rewards.dtype).eps * _to_go(rollout, gamma).abs().max()
        scaled = torch.where(told, advantages / torch.where(told, size, torch.ones_like(size)), 0.0)
        return Targets(scaled, found.returns, found.memory)


def _gae(rollout: Rollout, gamma: float, lam: float | Tensor) -> Estimates:
    return masked_gae(
        rollout.rewards,
        rollout.values,
        rollout.mask,
        gamma=gamma,
        gae_lambda=lam,
        truncated=rollout.truncated,
        bootstrap_values=rollout.bootstrap_values,
    )


def _to_go(rollout: Rollout, gamma: float) -> Tensor:
    """Discounted sums of rewards from each token on, `[B, T]`."""
    return clean(discounted_returns(clean(rollout.rewards, rollout.mask), gamma), rollout.mask)


def _whole_returns(rewards: Tensor, rollout: Rollout, gamma: float) -> Tensor:
    """The return of each response, `[B]` float64: sums of few numbers that must not depend on a device's order."""
    return discounted_returns(clean(rewards, rollout.mask).double(), gamma)[:, 0]


def _centred(returns: Tensor, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
    """Returns less their group's mean, its unbiased deviation and its size, `[B]`, added up on the host.

    A group that differs by a few rounding errors alone is constant: both are exactly 0 there.
    """
    rows = torch.arange(len(returns)) if rollout.groups is None else rollout.groups.cpu()
    _, group = rows.unique(return_inverse=True)
    values = returns.cpu()

    def total(x: Tensor) -> Tensor:
        return torch.zeros(int(group.max()) + 1, dtype=x.dtype).index_add_(0, group, x)[group]

    size = total(torch.ones_like(values))
    if bool((size < 2).any()):
        raise ValueError("rollout: expected at least 2 responses to each prompt (`groups`), got a prompt with one")
    mean = total(values) / size
    std = (total((values - mean) ** 2) / (size - 1)).sqrt()
    # Relative, so that the unit of the rewards does not matter; rewards are float32.
    rounding = _ROUNDING_ERRORS * torch.finfo(rollout.rewards.dtype).eps * (total(values**2) / size).sqrt()
    std = torch.where(std > rounding, std, 0.0)
    centred = torch.where(std > 0, values - mean, 0.0)
    return centred.to(returns.device), std.to(returns.device), size.to(returns.device)


def _on_tokens(per_row: Tensor, rollout: Rollout) -> Targets:
    """One number a response, on each of its tokens."""
    return Targets(clean(per_row.to(rollout.rewards.dtype)[:, None].expand_as(rollout.rewards), rollout.mask))
