"""The KL penalty: who charges it, where it lands, and the coefficient β.

The reward's KL is k1, k_t = log π(a_t|s_t) − log π_ref(a_t|s_t), always: k2, k3 or the exact KL of each state give
wrong gradients when they are paid as a reward.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from textenv.dynamics import last_slots

KLSource = Literal["agent", "policy", "reference"]
KLCredit = Literal["token", "sequence"]


def token_charges(logprobs: Tensor | None, ref_logprobs: Tensor, *, kl_coef: float, kl_source: KLSource) -> Tensor:
    """What the environment itself adds to the reward of each token.

    `agent`: 0 (the collecting side charges); `policy`: −β·(log π − log π_ref); `reference`: β·log π_ref.

    Args:
        logprobs: log π(a_t|s_t), any shape; needed under `policy` only.
        ref_logprobs: log π_ref(a_t|s_t), the same shape.
        kl_coef: β.
        kl_source: Who knows log π.

    Returns:
        The shape of `ref_logprobs`.
    """
    if kl_coef == 0 or kl_source == "agent":
        return torch.zeros_like(ref_logprobs)
    if kl_source == "reference":
        return kl_coef * ref_logprobs
    if logprobs is None:
        raise ValueError("logprobs: expected log π of every token under kl_source='policy', got None")
    return -kl_coef * (logprobs - ref_logprobs)


def credit(charges: Tensor, mask: Tensor, kl_credit: KLCredit) -> Tensor:
    """Where the charges land: at their tokens, or all with the last one.

    Args:
        charges: `[B, T]`.
        mask: `[B, T]` bool, true where a sampled token counts.
        kl_credit: `token` or `sequence`.

    Returns:
        `[B, T]`, 0 where `mask` is false; each row has the sum it had.

    >>> credit(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[True, True, False]]), "sequence").tolist()
    [[0.0, 3.0, 0.0]]
    """
    charges = torch.where(mask, charges, torch.zeros_like(charges))
    if kl_credit == "token":
        return charges
    return torch.where(last_slots(mask), charges.sum(1, keepdim=True), torch.zeros_like(charges))


def charge(
    rewards: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    kl_source: KLSource,
    kl_credit: KLCredit = "token",
) -> Tensor:
    """Rewards with the KL in them, charged exactly once.

    r_t ← r_t − β·k_t under `kl_source="agent"`; under `policy` and `reference` the environment has already paid its
    side, and the rewards come back as they are. Every agent and adapter goes through here.

    Args:
        rewards: `[B, T]`, as the environment paid them.
        logprobs: `[B, T]`, log π(a_t|s_t) of the policy that chose the tokens.
        ref_logprobs: `[B, T]`, log π_ref(a_t|s_t).
        mask: `[B, T]` bool, true where a sampled token counts; masked slots come back as 0.
        kl_coef: β.
        kl_source: The environment's `kl_source`.
        kl_credit: The environment's `kl_credit`.

    Returns:
        `[B, T]`.

    Raises:
        ValueError: If the shapes differ.

    >>> ones = torch.ones(1, 2)
    >>> charge(ones, 0 * ones, -ones, ones.bool(), kl_coef=0.5, kl_source="agent").tolist()
    [[0.5, 0.5]]
    """
    for name, tensor in (("logprobs", logprobs), ("ref_logprobs", ref_logprobs), ("mask", mask)):
        if tensor.shape != rewards.shape:
            raise ValueError(f"{name}: expected the shape of rewards {tuple(rewards.shape)}, got {tuple(tensor.shape)}")
    rewards = torch.where(mask, rewards, torch.zeros_like(rewards))
    if kl_source != "agent" or kl_coef == 0:
        return rewards
    return rewards + credit(-kl_coef * (logprobs - ref_logprobs), mask, kl_credit)


@runtime_checkable
class KLController(Protocol):
    """Something that holds β and may move it once per rollout."""

    @property
    def value(self) -> float:
        """The coefficient β now."""
        ...

    def update(self, mean_sequence_kl: float, episodes: int) -> None:
        """Look at the KL of one rollout, in nats per response, and at how many episodes it had."""
        ...

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        ...

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint."""
        ...


def _check_coefficient(name: str, value: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
        raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")


@dataclass
class FixedKL:
    """A constant β."""

    value: float = 0.1
    """The coefficient β ≥ 0."""

    def __post_init__(self) -> None:
        """Refuse what is no coefficient."""
        _check_coefficient("kl_coef", self.value)

    def update(self, mean_sequence_kl: float, episodes: int) -> None:
        """Stay."""

    def state_dict(self) -> dict[str, float]:
        """β."""
        return {"value": float(self.value)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """β of the checkpoint."""
        self.value = state["value"]


@dataclass
class AdaptiveKL:
    """β that steers the KL of a response towards a target (Ziegler et al. 2019, §2.2).

    e = clip(KL/target − 1, −0.2, 0.2);  β ← β·(1 + e·episodes/horizon)
    """

    value: float = 0.15
    """The first β > 0."""
    target: float = 6.0
    """Nats per response."""
    horizon: float = 10_000.0
    """Episodes over which β may move by the error's bound; K_β of the paper is 1/horizon per episode."""
    max_error: float = field(default=0.2, repr=False)
    """Bound of the relative error e."""

    def __post_init__(self) -> None:
        """Refuse what cannot steer."""
        for name in ("value", "target", "horizon", "max_error"):
            _check_coefficient(name, getattr(self, name))
            if getattr(self, name) == 0:
                raise ValueError(f"{name}: expected a number > 0, got 0")

    def update(self, mean_sequence_kl: float, episodes: int) -> None:
        """One step of the controller."""
        error = min(max(mean_sequence_kl / self.target - 1.0, -self.max_error), self.max_error)
        self.value *= 1.0 + error * episodes / self.horizon

    def state_dict(self) -> dict[str, float]:
        """β."""
        return {"value": float(self.value)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """β of the checkpoint."""
        self.value = state["value"]


def as_controller(kl_coef: float | KLController) -> KLController:
    """A number becomes `FixedKL`."""
    if isinstance(kl_coef, int | float):
        return FixedKL(float(kl_coef) if not isinstance(kl_coef, bool) else kl_coef)
    if isinstance(kl_coef, KLController):
        return kl_coef
    raise ValueError(f"kl_coef: expected a number >= 0 or a controller with value and update, got {kl_coef!r}")
