"""Objectives as objects `(logprobs, rollout, advantages) -> loss [B, T]`: settings around `agents.losses`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from agents.checks import number
from agents.diagnostics import clip_fraction, sequence_clip_fraction
from agents.losses import clipped_surrogate, kl_loss, policy_gradient, sequence_surrogate
from agents.rollout import Rollout


@dataclass(frozen=True)
class Clipped:
    """PPO's clipped surrogate (`agents.losses.clipped_surrogate`)."""

    clip_eps: float = 0.2
    """Half-width of the trust region of the probability ratio."""
    clip_eps_high: float | None = None
    """Its upper half-width ("clip-higher"); None: `clip_eps`."""
    dual_clip: float | None = None
    """Bound c > 1 of the loss where the advantage is negative; None: none."""

    def __post_init__(self) -> None:
        """Check each field."""
        _check_clip(self.clip_eps, self.clip_eps_high)
        if self.dual_clip is not None:
            number("dual_clip", self.dual_clip, above=1.0)

    def __call__(self, logprobs: Tensor, rollout: Rollout, advantages: Tensor) -> Tensor:
        """The loss `[B, T]`."""
        return clipped_surrogate(
            logprobs,
            rollout.old_logprobs,
            advantages,
            self.clip_eps,
            clip_eps_high=self.clip_eps_high,
            dual_clip=self.dual_clip,
            mask=rollout.mask,
        )

    def clip_fraction(self, logprobs: Tensor, rollout: Rollout, advantages: Tensor) -> Tensor:
        """Fraction of the tokens whose gradient the clip, or the dual clip, removes."""
        return clip_fraction(
            logprobs,
            rollout.old_logprobs,
            advantages,
            self.clip_eps,
            rollout.mask,
            clip_eps_high=self.clip_eps_high,
            dual_clip=self.dual_clip,
        )


@dataclass(frozen=True)
class SequenceClipped:
    """The surrogate clipped by the ratio of whole responses (GSPO; `agents.losses.sequence_surrogate`)."""

    clip_eps: float = 3e-4
    """Half-width of the trust region of the ratio per token, (π(y)/π_old(y))^(1/|y|); the paper's."""
    clip_eps_high: float | None = 4e-4
    """Its upper half-width; None: `clip_eps`."""
    per_token: bool = False
    """Whether the gradient flows through each token's own ratio (GSPO-token), so that advantages may differ."""

    def __post_init__(self) -> None:
        """Check each field."""
        _check_clip(self.clip_eps, self.clip_eps_high)
        if not isinstance(self.per_token, bool):
            raise ValueError(f"per_token: expected True or False, got {self.per_token!r}")

    def __call__(self, logprobs: Tensor, rollout: Rollout, advantages: Tensor) -> Tensor:
        """The loss `[B, T]`; its mean over each response is meant (`SequenceMean`)."""
        return sequence_surrogate(
            logprobs,
            rollout.old_logprobs,
            advantages,
            self.clip_eps,
            clip_eps_high=self.clip_eps_high,
            per_token=self.per_token,
            mask=rollout.mask,
        )

    def clip_fraction(self, logprobs: Tensor, rollout: Rollout, advantages: Tensor) -> Tensor:
        """Fraction of the tokens whose gradient the clip removes."""
        return sequence_clip_fraction(
            logprobs,
            rollout.old_logprobs,
            advantages,
            self.clip_eps,
            rollout.mask,
            clip_eps_high=self.clip_eps_high,
            per_token=self.per_token,
        )


@dataclass(frozen=True)
class PolicyGradient:
    """−Âₜ log π(aₜ|sₜ) (`agents.losses.policy_gradient`): right for the first step on a rollout, so it takes one."""

    on_policy = True

    def __call__(self, logprobs: Tensor, rollout: Rollout, advantages: Tensor) -> Tensor:
        """The loss `[B, T]`."""
        return policy_gradient(logprobs, advantages, mask=rollout.mask)


@dataclass(frozen=True)
class ReferenceKL:
    """KL to the reference as a loss, with the k2 gradient (`agents.losses.kl_loss`)."""

    def __call__(self, logprobs: Tensor, rollout: Rollout) -> Tensor:
        """The loss `[B, T]`, before β."""
        return kl_loss(logprobs, rollout.ref_logprobs, old_logprobs=rollout.old_logprobs, mask=rollout.mask)


def _check_clip(clip_eps: float, clip_eps_high: float | None) -> None:
    number("clip_eps", clip_eps)
    if clip_eps_high is not None:
        number("clip_eps_high", clip_eps_high)
