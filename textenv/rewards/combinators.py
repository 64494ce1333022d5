"""Rewards made of others: weighted sums, maps of one score, ensembles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np

from textenv.rewards.base import RewardContext, Scores, check_names
from textenv.rewards.binding import bind_reward, response_level
from textenv.rewards.composition import Composed, float64, parts_of
from textenv.rewards.reward import Ids, Reward


def check_number(name: str, value: Any, *, low: float = -math.inf) -> None:
    """Raise unless `value` is a finite number ≥ `low`."""
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not number or float(value) < low:
        bound = "" if low == -math.inf else f" >= {low:g}"
        raise ValueError(f"{name}: expected a finite number{bound}, got {value!r}")


# ------------------------------------------------------------------------------------------------------- sums


@dataclass(frozen=True)
class WeightedSum:
    """score = Σ_i w_i·s_i. Each s_i is told under its name, before its weight.

    Rewards of text, of ids and per token mix: what is per token is paid at each token, the others at the end. A reward
    may be the folder of a model, as everywhere in a combination: it is loaded where and when the environment is made.

    Example:
        >>> calm = WeightedSum({"calm": (lambda prompts, responses: [-r.count("!") for r in responses], 0.5)})
    """

    terms: Mapping[str, tuple[Any, float]]
    """By name: a reward and its weight."""

    def __post_init__(self) -> None:
        """Check names and weights."""
        if not isinstance(self.terms, Mapping) or not self.terms:
            raise ValueError(f"terms: expected rewards and weights by name, got {self.terms!r}")
        check_names(list(self.terms), argument="terms")
        for name, term in self.terms.items():
            if not isinstance(term, tuple) or len(term) != 2:
                raise ValueError(f"terms: expected (reward, weight) for {name!r}, got {term!r}")
            check_number(f"terms, weight of {name!r}", term[1])

    def bind(self, context: RewardContext) -> BoundSum:
        """The sum of the bound terms."""
        bound = {
            name: (bind_reward(reward, context.within(f"reward {name!r}")), float(weight))
            for name, (reward, weight) in self.terms.items()
        }
        return _split(bound)


def _split(terms: Mapping[str, tuple[Reward, float]]) -> BoundSum:
    """What is paid at each token, and what is paid at the end as its outcome; either alone if there is no other."""
    at_end, dense = {}, {}
    for name, (reward, weight) in terms.items():
        outcome = reward.outcome if reward.per_token else reward
        if outcome is not None:
            at_end[name] = outcome, weight
        if reward.per_token:
            dense[name] = replace(reward, outcome=None), weight
    if not dense:
        return BoundSum(at_end)
    outcome = BoundSum(at_end) if at_end else None
    paid_at_end = None if outcome is None else Reward(outcome, None, False, outcome.part_names)
    return BoundSum(dense, per_token=True, outcome=paid_at_end)


class BoundSum(Composed):
    """A sum of rewards that are all per token, or all not."""

    def __init__(
        self, terms: Mapping[str, tuple[Reward, float]], *, per_token: bool = False, outcome: Reward | None = None
    ) -> None:
        """Rewards and weights by name."""
        super().__init__({name: reward for name, (reward, _) in terms.items()})
        self.weights = {name: weight for name, (_, weight) in terms.items()}
        self.per_token, self.outcome = per_token, outcome

    def __call__(self, prompts: Ids, responses: Ids) -> Scores:
        """Σ_i w_i·s_i of each response, or of each token."""
        answers = {name: child.ask(prompts, responses) for name, child in self.children.items()}
        totals = [
            sum(self.weights[name] * float64(answer.total[row]) for name, answer in answers.items())
            for row in range(len(responses))
        ]
        return Scores(
            totals, {path: part for name, one in answers.items() for path, part in parts_of(name, one).items()}
        )


# ------------------------------------------------------------------------------------------------------- maps

Map = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From scores and response lengths in tokens, float64 `[n]` each, to scores."""


class Mapped(Composed):
    """A map of another reward's score, which is told as the part `raw`."""

    def __init__(self, reward: Reward, law: Map) -> None:
        """The reward and the map."""
        super().__init__({"raw": reward})
        self.law = law

    def __call__(self, prompts: Ids, responses: Ids) -> Scores:
        """The mapped scores."""
        raw = self.children["raw"].whole(prompts, responses)
        lengths = float64([len(response) for response in responses])
        return Scores(self.law(float64(raw.total), lengths), parts_of("raw", raw))


@dataclass(frozen=True)
class Clip:
    """score = min(max(s, low), high)."""

    reward: Any
    """s: any reward of one number a response."""
    low: float
    """Lower bound."""
    high: float
    """Upper bound."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        check_number("low", self.low)
        check_number("high", self.high, low=self.low)

    def bind(self, context: RewardContext) -> BoundClip:
        """The clipped reward."""
        return BoundClip(response_level(self.reward, context, label="reward 'raw'", by="Clip"), self.apply)

    def apply(self, scores: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """From scores and response lengths, `[n]` each."""
        return scores.clip(self.low, self.high)


class BoundClip(Mapped):
    """A clipped reward."""

    @contextmanager
    def fixed_units(self) -> Iterator[None]:
        """Inside, nothing is clipped if the bounds are in units that move below."""
        law = self.law
        if self.children["raw"].moves_units:
            self.law = lambda scores, lengths: scores
        try:
            yield
        finally:
            self.law = law


@dataclass(frozen=True)
class Affine:
    """score = gain·s + bias.

    With gain 1/σ and bias −μ/σ the samples that have mean μ and standard deviation σ get mean 0 and deviation 1, as in
    Ziegler et al. 2019 (arXiv 1909.08593); `normalizing` computes the two.
    """

    reward: Any
    """s: any reward of one number a response."""
    gain: float = 1.0
    """Factor."""
    bias: float = 0.0
    """Added after it."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_number("gain", self.gain)
        check_number("bias", self.bias)

    @classmethod
    def normalizing(cls, reward: Any, samples: Sequence[float]) -> Affine:
        """The map by which these scores of the reward would have mean 0 and population standard deviation 1.

        Raises:
            ValueError: If they are all the same.
        """
        values = float64(samples)
        if not len(values) or not values.std() > 0:
            raise ValueError(f"samples: expected scores that differ, got {len(values)} with deviation 0")
        return cls(reward, float(1 / values.std()), float(-values.mean() / values.std()))

    def bind(self, context: RewardContext) -> Mapped:
        """The shifted and scaled reward."""
        return Mapped(response_level(self.reward, context, label="reward 'raw'", by="Affine"), self.apply)

    def apply(self, scores: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """From scores and response lengths, `[n]` each."""
        return self.gain * scores + self.bias


@dataclass(frozen=True)
class LengthPenalty:
    """score = s − coef·(|y| − target), |y| the response's tokens, a stop token among them.

    The term −α·|y| of Park et al. 2024 (arXiv 2403.19159); `target` only shifts all scores.
    """

    reward: Any
    """s: any reward of one number a response."""
    coef: float
    """α ≥ 0, in units of the score a token."""
    target: float = 0.0
    """The length at which nothing is added or subtracted."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_number("coef", self.coef, low=0.0)
        check_number("target", self.target)

    def bind(self, context: RewardContext) -> Mapped:
        """The penalised reward."""
        return Mapped(response_level(self.reward, context, label="reward 'raw'", by="LengthPenalty"), self.apply)

    def apply(self, scores: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """From scores and response lengths, `[n]` each."""
        return scores - self.coef * (lengths - self.target)


# ------------------------------------------------------------------------------------------------------- ensembles


@dataclass(frozen=True)
class Ensemble:
    """score = mean_i s_i − coef·sd_i s_i over the members, so that what they disagree on is not worth exploiting.

    sd is the population standard deviation, √(mean_i (s_i − mean)²): that of these members, not an estimate for more of
    them. Coste et al. 2023 (arXiv 2310.02743, uncertainty-weighted optimisation) subtract the variance instead, whose
    coefficient depends on the scale of the scores. The members should be on one scale (`Affine.normalizing`).
    """

    members: Mapping[str, Any]
    """Rewards of one number a response, by name; two or more."""
    coef: float = 1.0
    """λ ≥ 0; 0 is the mean."""

    def __post_init__(self) -> None:
        """Check names and coefficient."""
        if not isinstance(self.members, Mapping) or len(self.members) < 2:
            raise ValueError(f"members: expected two or more rewards by name, got {self.members!r}")
        check_names(list(self.members), argument="members")
        if "sd" in self.members:
            raise ValueError("members: expected other names than 'sd', which is that of the deviation, got it")
        check_number("coef", self.coef, low=0.0)

    def bind(self, context: RewardContext) -> BoundEnsemble:
        """The ensemble of the bound members."""
        members = {
            name: response_level(member, context, label=f"reward {name!r}", by="Ensemble")
            for name, member in self.members.items()
        }
        return BoundEnsemble(members, self.coef)


class BoundEnsemble(Composed):
    """mean − coef·sd of bound members; sd is told as a part."""

    def __init__(self, members: Mapping[str, Reward], coef: float) -> None:
        """Members by name."""
        super().__init__(members)
        self.part_names, self.coef = (*self.part_names, "sd"), coef

    def __call__(self, prompts: Ids, responses: Ids) -> Scores:
        """One score a response."""
        answers = {name: member.whole(prompts, responses) for name, member in self.children.items()}
        each = np.stack([float64(answer.total) for answer in answers.values()])
        spread = each.std(axis=0)
        parts = {path: part for name, one in answers.items() for path, part in parts_of(name, one).items()}
        return Scores(each.mean(axis=0) - self.coef * spread, parts | {"sd": spread})
