"""What an algorithm is: three components and what they need, each an object or a function of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from agents.checks import at_least, number
from agents.config import TrainConfig
from agents.rollout import Rollout


@dataclass(frozen=True)
class Targets:
    """What a rollout is learnt towards; a constant for all the steps of its update."""

    advantages: Tensor
    """`[B, T]`: Â."""
    returns: Tensor | None = None
    """`[B, T]`: R that the critic learns, in reward units; None without a critic."""
    memory: Mapping[str, float] = field(default_factory=dict)
    """What the estimator finds in `rollout.memory` next time; the agent keeps it, and checkpoints do."""

    def select(self, rows: Tensor, steps: int | None = None) -> Targets:
        """Some of the rows, and their first slots."""
        returns = None if self.returns is None else self.returns[rows.to(self.returns.device), :steps]
        return Targets(self.advantages[rows.to(self.advantages.device), :steps], returns, self.memory)


Estimator = Callable[[Rollout, float], Targets]
"""`(rollout, gamma) -> Targets`: advantages, from what was recorded. Pure: what it remembers goes through `memory`."""

Objective = Callable[[Tensor, Rollout, Tensor], Tensor]
"""`(logprobs, rollout, advantages) -> loss [B, T]`: differentiated in `logprobs`, log π of the present weights."""

KLLoss = Callable[[Tensor, Rollout], Tensor]
"""`(logprobs, rollout) -> loss [B, T]`, weighed by β."""


class Aggregation(Protocol):
    """How a loss `[B, T]` becomes a number, by a count of the whole minibatch, so that microbatches do not matter."""

    def count(self, mask: Tensor, max_new_tokens: int) -> float:
        """What a minibatch with this `mask` `[B, T]` is divided by; positive."""
        ...

    def __call__(self, loss: Tensor, mask: Tensor, count: float) -> Tensor:
        """The share of some rows `[b, T]` of the minibatch; the shares of all rows add up to its loss."""
        ...


@runtime_checkable
class ClippedObjective(Protocol):
    """An objective that can say how much of it is clipped; `clip/policy` is then logged."""

    def clip_fraction(self, logprobs: Tensor, rollout: Rollout, advantages: Tensor) -> Tensor:
        """Fraction of the tokens whose gradient the clip removes."""
        ...


@runtime_checkable
class Needing(Protocol):
    """An estimator that says what it reads; `Algorithm` checks that it is there."""

    @property
    def needs(self) -> frozenset[str]:
        """Of `"critic"`, `"groups"` and `"greedy"`."""
        ...


@runtime_checkable
class OnPolicy(Protocol):
    """An objective that says whether it is right for the first step on a rollout alone, as one without a ratio is."""

    @property
    def on_policy(self) -> bool:
        """True: epochs and minibatches must be 1."""
        ...


@dataclass(frozen=True)
class ValueLoss:
    """A critic, and how it learns: ½ (u − u_R)², in units of the returns' variance."""

    clip_eps: float | None = 0.2
    """Half-width of the value clip, in standard deviations of the returns; None: no clip."""
    coef: float = 1.0
    """Weight of the loss."""
    trunk_coef: float = 1.0
    """Share of its gradient that reaches a shared trunk."""
    stats_decay: float = 0.9
    """Memory of the running mean and variance of the returns, per update."""

    def __post_init__(self) -> None:
        """Check each field."""
        if self.clip_eps is not None:
            number("clip_eps", self.clip_eps)
        number("coef", self.coef)
        number("trunk_coef", self.trunk_coef)
        number("stats_decay", self.stats_decay, high=1.0)


@dataclass(frozen=True)
class Algorithm:
    """How advantages are estimated, what loss they go into, and how it is averaged.

    Raises:
        ValueError: If the estimator reads something that is not there.
    """

    estimator: Estimator
    """`(rollout, gamma) -> Targets`."""
    objective: Objective
    """`(logprobs, rollout, advantages) -> loss [B, T]`."""
    aggregation: Aggregation
    """How that is averaged; the value loss is always a mean over tokens."""
    critic: ValueLoss | None = None
    """How the critic learns; None: there is none, and no value is computed."""
    group_size: int = 1
    """Responses to each prompt of a rollout; divides `batch_episodes`."""
    kl_loss: KLLoss | None = None
    """A KL to the reference added to the loss with the environment's β, instead of being charged in the reward."""
    greedy: bool = False
    """Whether each prompt's greedy response is sampled and scored too (`rollout.greedy`)."""
    defaults: TrainConfig = field(default_factory=TrainConfig)
    """Settings of the loop that suit it; an `Agent` without a config takes them."""
    name: str = "custom"
    """How it is called in logs."""

    def __post_init__(self) -> None:
        """Check the parts, and that they fit."""
        for part in ("estimator", "objective", "aggregation"):
            if not callable(getattr(self, part)):
                raise ValueError(f"{part}: expected a function or an object to call, got {getattr(self, part)!r}")
        if self.critic is not None and not isinstance(self.critic, ValueLoss):
            raise ValueError(f"critic: expected a ValueLoss or None, got {self.critic!r}")
        if self.kl_loss is not None and not callable(self.kl_loss):
            raise ValueError(f"kl_loss: expected a function or None, got {self.kl_loss!r}")
        at_least("group_size", self.group_size, 1)
        needs = self.estimator.needs if isinstance(self.estimator, Needing) else frozenset()
        who = repr(self.estimator)
        if "critic" in needs and self.critic is None:
            raise ValueError(f"critic: expected a ValueLoss, because {who} reads values, got None")
        if "groups" in needs and self.group_size < 2:
            raise ValueError(f"group_size: expected at least 2, because {who} compares responses to one prompt, got 1")
        if "greedy" in needs and not self.greedy:
            raise ValueError(f"greedy: expected True, because {who} reads the greedy response's return, got False")
