"""Rewards with running statistics, which move in `update` and never otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from textenv.rewards.base import RewardContext, Scores
from textenv.rewards.binding import response_level
from textenv.rewards.combinators import Mapped
from textenv.rewards.composition import Composed, float64
from textenv.rewards.reward import Ids, Reward


@dataclass(frozen=True)
class Moments:
    """Weight, mean and co-moments of the vectors seen so far, float64.

    `comoments[i, j] = Σ w·(x_i − mean_i)(x_j − mean_j)`, so the covariance is `comoments / count`.
    """

    count: float
    """Σ w: the number of vectors, or less where the past is forgotten."""
    mean: np.ndarray
    """`[k]`."""
    comoments: np.ndarray
    """`[k, k]`."""

    @classmethod
    def none(cls, size: int) -> Moments:
        """Of no vectors."""
        return cls(0.0, np.zeros(size), np.zeros((size, size)))

    def joined(self, rows: np.ndarray, decay: float = 1.0) -> Moments:
        """With n more vectors, the past weighing `decay` times what it did.

        n' = d·n + m,  δ = mean_b − mean,  mean' = mean + δ·m/n',  M' = d·M + M_b + δδᵀ·d·n·m/n'  (Chan, Golub & LeVeque
        1983; d = 1 is exact: the order and size of the batches do not matter).

        Args:
            rows: `[m, k]`.
            decay: d in (0, 1].
        """
        past, batch = decay * self.count, float(len(rows))
        # A mean is rounded; that of equal numbers must be that number, or its deviation would not be 0.
        count, center = past + batch, rows.mean(axis=0).clip(rows.min(axis=0), rows.max(axis=0))
        shift, apart = center - self.mean, rows - center
        mean = self.mean + shift * (batch / count)
        comoments = decay * self.comoments + apart.T @ apart + np.outer(shift, shift) * (past * batch / count)
        return Moments(count, mean, comoments)

    def state_dict(self) -> dict[str, Any]:
        """As JSON holds it, bit for bit."""
        return {"count": self.count, "mean": self.mean.tolist(), "comoments": self.comoments.tolist()}

    @classmethod
    def of_state(cls, state: Mapping[str, Any], size: int) -> Moments:
        """What `state_dict` gave.

        Raises:
            ValueError: If it is something else's.
        """
        try:
            moments = cls(float(state["count"]), float64(state["mean"]), float64(state["comoments"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"reward: expected count, mean and comoments in its statistics, got {state!r}") from error
        if moments.mean.shape != (size,) or moments.comoments.shape != (size, size):
            raise ValueError(f"reward: expected statistics of {size} numbers, got {state!r}")
        return moments


class RunningLaw(Protocol):
    """A map of scores by moments."""

    @property
    def decay(self) -> float:
        """Weight of the past at each update."""
        ...

    @property
    def with_length(self) -> bool:
        """Whether the vectors are (score, length) or scores alone."""
        ...

    @property
    def moves_units(self) -> bool:
        """Whether mapped scores are in a unit that the moments say."""
        ...

    def apply(self, moments: Moments, scores: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Scores `[n]`, from raw ones."""
        ...


class Running(Mapped):
    """A reward mapped by what `update` has seen. Each environment has statistics of its own."""

    def __init__(self, reward: Reward, law: RunningLaw) -> None:
        """The reward and how it is mapped."""
        super().__init__(reward, self._by_moments)
        self.running = law
        self.columns = ("raw", "length") if law.with_length else ("raw",)
        self.part_names = (*self.part_names, *self.columns[1:])
        self.moments = Moments.none(len(self.columns))

    def __call__(self, prompts: Ids, responses: Ids) -> Scores:
        """The mapped scores, by the statistics as they are."""
        answer = super().__call__(prompts, responses)
        if not self.running.with_length:
            return answer
        return Scores(answer.total, {**answer.parts, "length": [len(response) for response in responses]})

    @property
    def learns(self) -> bool:
        """It has running statistics."""
        return True

    @property
    def moves_units(self) -> bool:
        """Whether its own statistics, or those below, move the unit of its scores."""
        return self.running.moves_units or super().moves_units

    def _by_moments(self, scores: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return self.running.apply(self.moments, scores, lengths)

    def update(self, scores: Scores) -> None:
        """Learn from the raw scores of a rollout."""
        rows = np.stack([float64(scores.parts[column]) for column in self.columns], axis=1)
        self.moments = self.moments.joined(rows, self.running.decay)
        super().update(scores)

    @contextmanager
    def fixed_units(self) -> Iterator[None]:
        """Inside, no score has been seen yet, so the raw ones are given."""
        moments, self.moments = self.moments, Moments.none(len(self.columns))
        try:
            yield
        finally:
            self.moments = moments

    def state_dict(self) -> dict[str, Any]:
        """The moments, and the reward's own state."""
        return {"moments": self.moments.state_dict(), **super().state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave.

        Raises:
            ValueError: If it is something else's.
        """
        self.moments = Moments.of_state(state.get("moments", {}), len(self.columns))
        super().load_state_dict({name: one for name, one in state.items() if name != "moments"})


@contextmanager
def in_fixed_units(reward: Reward) -> Iterator[None]:
    """Inside, the reward scores in units that no `update` moves, so that scores of different times compare.

    Its running statistics are as before the first update, and what clips in a unit that they move does not; the rest of
    a combination acts as ever. Afterwards everything is as it was.

    Raises:
        ValueError: If a reward with an `update` of its own has no `fixed_units`, a context in which they do not move.
    """
    with ExitStack() as stack:
        for context in _fixed_units(reward):
            stack.enter_context(context)
        yield


def _fixed_units(reward: Reward) -> Iterator[AbstractContextManager]:
    """The contexts of all that moves in a reward."""
    if not reward.learns:
        return
    function, outcome = reward.function, reward.outcome
    children = function.children if isinstance(function, Composed) else {}
    update: Any = getattr(function, "update", None)
    enter: Any = getattr(function, "fixed_units", None)
    if enter is not None:
        yield enter()
    elif callable(update) and getattr(update, "__func__", None) is not Composed.update:
        raise ValueError(
            f"{reward.label}: expected a method fixed_units(), a context in which its scores are in units that do not "
            f"move, because evaluations are compared, got {type(function).__name__} with update and without it"
        )
    for child in (*children.values(), *([] if outcome is None else [outcome])):
        yield from _fixed_units(child)


def _check_decay(decay: float) -> None:
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 < decay <= 1:
        raise ValueError(f"decay: expected a number in (0, 1], got {decay!r}")


@dataclass(frozen=True)
class RunningNormalization:
    """score = (s − μ)/σ, μ and σ the running mean and population standard deviation of the raw scores.

    Before the first update, and while all scores were the same, nothing is known of the scale and s is not divided.
    Before the first update it is not shifted either. There is no ε, so scores in another unit give the same.
    """

    reward: Any
    """s: any reward of one number a response."""
    decay: float = 1.0
    """What an update leaves of the past's weight; 1: all scores so far weigh the same (Welford)."""
    center: bool = True
    """Whether μ is subtracted."""
    with_length = False
    moves_units = True

    def __post_init__(self) -> None:
        """Check the decay."""
        _check_decay(self.decay)

    def bind(self, context: RewardContext) -> Running:
        """The normalised reward, with statistics of its own."""
        return Running(response_level(self.reward, context, label="reward 'raw'", by="RunningNormalization"), self)

    def apply(self, moments: Moments, scores: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """(scores − μ)/σ."""
        if not moments.count:
            return scores
        deviation = math.sqrt(moments.comoments[0, 0] / moments.count)
        shifted = scores - moments.mean[0] if self.center else scores
        return shifted / deviation if deviation > 0 else shifted


@dataclass(frozen=True)
class LengthControlled:
    """score = s − b·(|y| − mean|y|), b = cov(s, |y|)/var(|y|): what a line through length does not explain.

    The line is fitted to the raw scores of past rollouts. Before the first update, and while all responses had one
    length, b is 0. A calibration of rewards against length after the fact, as Huang et al. 2024 (arXiv 2409.17407),
    with a line where they fit a local regression; as there, quality that truly goes with length is removed, too.
    """

    reward: Any
    """s: any reward of one number a response."""
    decay: float = 1.0
    """What an update leaves of the past's weight."""
    with_length = True
    moves_units = False

    def __post_init__(self) -> None:
        """Check the decay."""
        _check_decay(self.decay)

    def bind(self, context: RewardContext) -> Running:
        """The controlled reward, with statistics of its own."""
        return Running(response_level(self.reward, context, label="reward 'raw'", by="LengthControlled"), self)

    def apply(self, moments: Moments, scores: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Residuals of the line, around its mean score."""
        spread = moments.comoments[1, 1]
        slope = moments.comoments[0, 1] / spread if spread > 0 else 0.0
        return scores - slope * (lengths - moments.mean[1])
