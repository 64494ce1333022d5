"""Numbers of an evaluation with their uncertainty, by one method: the delete-one jackknife over prompts.

P prompts are a sample of all prompts; the responses to one of them are not independent, so a prompt is what is left
out. θ is a number of the whole evaluation, θ₍₋ᵢ₎ the same number without prompt i, and m their mean (Efron & Stein
1981, "The jackknife estimate of variance"):

    SE² = (P − 1)/P · Σᵢ (θ₍₋ᵢ₎ − m)²

For a mean it is sd/√P of the prompts' means (clustered standard errors, Miller 2024, "Adding error bars to evals"); for
a ratio of sums it is the usual linearised one. For anything else, such as a share of different n-grams, it errs on the
large side on average (Efron & Stein, theorem 2). The bootstrap has no answer there: a sample drawn with replacement
repeats texts, and is poorer for that alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LEVEL = 0.95
"""Of every interval."""

FEW = 30
"""Prompts below which a normal interval is too narrow to be relied on."""


@dataclass(frozen=True)
class Estimate:
    """A number and how well it is known."""

    value: float
    """What was measured."""
    se: float
    """Standard error; NaN where there is one prompt."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end."""

    def as_dict(self) -> dict[str, float | None]:
        """The fields, for JSON, which has no NaN."""
        values = {"value": self.value, "se": self.se, "low": self.low, "high": self.high}
        return {name: number if math.isfinite(number) else None for name, number in values.items()}


@dataclass(frozen=True, eq=False)
class Statistic:
    """A number of a whole evaluation, and the same number without each of its P prompts."""

    value: float
    """θ."""
    without: np.ndarray
    """`[P]` float64: θ₍₋ᵢ₎."""

    def __sub__(self, other: Statistic) -> Statistic:
        """The difference of two numbers of the same prompts, which are left out of both together: paired."""
        _same_prompts(self, other)
        return Statistic(self.value - other.value, self.without - other.without)

    def __truediv__(self, other: Statistic) -> Statistic:
        """The ratio of two numbers of the same prompts; NaN over 0."""
        _same_prompts(self, other)
        ratios = _divided(np.append(self.without, self.value), np.append(other.without, other.value), math.nan)
        return Statistic(float(ratios[-1]), ratios[:-1])

    def exp(self) -> Statistic:
        """The exponential of the number."""
        return Statistic(math.exp(self.value), np.exp(self.without))

    @property
    def se(self) -> float:
        """Standard error; NaN with one prompt."""
        count = len(self.without)
        if count < 2:
            return math.nan
        return math.sqrt((count - 1) / count * float(((self.without - self.without.mean()) ** 2).sum()))

    def estimate(self) -> Estimate:
        """θ ± z·SE: a normal interval, too narrow below `FEW` prompts."""
        half = _z() * self.se
        return Estimate(self.value, self.se, self.value - half, self.value + half)


def mean(values: Sequence[Sequence[float]] | np.ndarray) -> Statistic:
    """The mean over prompts of the mean over a prompt's responses.

    Args:
        values: `[P, n]`.

    >>> mean([[1.0, 3.0], [4.0, 6.0]]).estimate().value
    3.5
    """
    rows = _rows("values", values)
    return ratio(rows, np.ones_like(rows))


def ratio(numerators: Sequence[Sequence[float]] | np.ndarray, denominators: Sequence | np.ndarray) -> Statistic:
    """Σ numerators / Σ denominators, such as KL per token; 0 over 0 is 0.

    Args:
        numerators: `[P, n]`.
        denominators: `[P, n]`, not negative.

    Raises:
        ValueError: If the shapes differ or there is nothing.

    >>> ratio([[2.0], [6.0]], [[1.0], [3.0]]).value
    2.0
    """
    above, below = _rows("numerators", numerators), _rows("denominators", denominators)
    if above.shape != below.shape:
        raise ValueError(f"denominators: expected the shape of numerators, {above.shape}, got {below.shape}")
    return of_sums(above.sum(1), below.sum(1), float(above.sum()), float(below.sum()))


def of_sums(
    above: Sequence[float] | np.ndarray, below: Sequence[float] | np.ndarray, total_above: float, total_below: float
) -> Statistic:
    """A ratio of totals, of which leaving out prompt i takes `above[i]` and `below[i]` away.

    Args:
        above: `[P]`.
        below: `[P]`.
        total_above: Of all prompts; more than Σ above where several prompts share something.
        total_below: Of all prompts.

    >>> of_sums([1, 0], [2, 2], total_above=3, total_below=4).without
    array([1. , 1.5])
    """
    tops = total_above - np.append(np.asarray(above, dtype=np.float64), 0.0)
    bottoms = total_below - np.append(np.asarray(below, dtype=np.float64), 0.0)
    values = _divided(tops, bottoms, 0.0)
    return Statistic(float(values[-1]), values[:-1])


def share(values: Sequence[Sequence[float]] | np.ndarray) -> Estimate:
    """A mean of numbers in [0, 1], with the interval of Wilson (1927), which stays inside and is wide at its ends.

    The number of independent trials is p(1 − p)/SE², with the jackknife's SE: what P prompts of n dependent
    responses are worth (Korn & Graubard 1998); P where SE is 0.

    Args:
        values: `[P, n]`; a tie is a half.

    >>> all_wins = share([[1.0]] * 96)
    >>> round(all_wins.low, 3), all_wins.high
    (0.962, 1.0)
    """
    statistic = mean(values)
    p, se = statistic.value, statistic.se
    if not math.isfinite(se):
        return Estimate(p, se, math.nan, math.nan)
    found = wilson(p, p * (1 - p) / se**2 if se > 0 else float(len(statistic.without)))
    return Estimate(p, se, found.low, found.high)


def wilson(p: float, trials: float) -> Estimate:
    """A proportion of independent trials with the interval of Wilson (1927), which is wide at 0 and 1, too.

    (p + z²/2n ± z·√(p(1 − p)/n + z²/4n²)) / (1 + z²/n), and SE = √(p(1 − p)/n).

    Args:
        p: Successes over trials, in [0, 1].
        trials: n > 0; of dependent ones, how many independent ones they are worth.

    Raises:
        ValueError: If p is no proportion or there are no trials.

    >>> accuracy = wilson(1.0, 100)
    >>> round(accuracy.low, 3), accuracy.high
    (0.963, 1.0)
    """
    if not (0 <= p <= 1 and trials > 0):
        raise ValueError(f"p, trials: expected a number in [0, 1] and one > 0, got {p} and {trials}")
    z2 = _z() ** 2 / trials
    centre, spread = (p + z2 / 2) / (1 + z2), p * (1 - p) / trials
    half = _z() / (1 + z2) * math.sqrt(spread + z2 / (4 * trials))
    # p is always inside; what rounding says of the ends is not believed.
    return Estimate(p, math.sqrt(spread), max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


def wins(ours: Sequence[Sequence[float]] | np.ndarray, theirs: Sequence[Sequence[float]] | np.ndarray) -> Estimate:
    """How often a response of ours scores above one of theirs to the same prompt; a tie counts half.

    (1/P) Σᵢ (1/n²) Σⱼₖ (1[aᵢⱼ > bᵢₖ] + ½·1[aᵢⱼ = bᵢₖ]): all pairs of a prompt, so that no chance pairing enters.

    Args:
        ours: Scores `[P, n]`.
        theirs: Scores `[P, m]`, drawn independently of ours.

    Raises:
        ValueError: If they are of different numbers of prompts.

    >>> wins([[1.0, 2.0]], [[1.0, 0.0]]).value
    0.875
    """
    a, b = _rows("ours", ours), _rows("theirs", theirs)
    if len(a) != len(b):
        raise ValueError(f"theirs: expected scores of {len(a)} prompts, got {len(b)}")
    above, equal = a[:, :, None] > b[:, None, :], a[:, :, None] == b[:, None, :]
    return share((above + 0.5 * equal).mean((1, 2))[:, None])


def over_optimised(score_gain: Estimate, second_gain: Estimate, tolerance: float = 0.0) -> bool | None:
    """Whether the score that was trained on rose while one that was not fell; None where neither is proven.

    True if the 95 % interval of the score's gain lies above 0 and that of the second reward's below −tolerance. Both
    must hold, so chance alone raises the flag in at most 2.5 % of cases (intersection–union test, Berger 1982). False
    if that of the score's gain holds nothing above 0, or that of the second reward's nothing below −tolerance: either
    shows the contrary.

    Args:
        score_gain: Of the trained reward, against what the policy started from, paired by prompt.
        second_gain: Of a reward that training never saw.
        tolerance: How far the second reward may fall before it counts.

    Raises:
        ValueError: If the tolerance is negative or the intervals are not known.

    >>> up, down = Estimate(1.0, 0.1, 0.8, 1.2), Estimate(-0.4, 0.1, -0.6, -0.2)
    >>> over_optimised(up, down), over_optimised(up, down, tolerance=0.3), over_optimised(down, up)
    (True, None, False)
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance: expected a number >= 0, got {tolerance}")
    if not (math.isfinite(score_gain.low) and math.isfinite(second_gain.high)):
        raise ValueError("score_gain, second_gain: expected estimates from at least two prompts, got no interval")
    if score_gain.low > 0 and second_gain.high < -tolerance:
        return True
    return False if score_gain.high <= 0 or second_gain.low >= -tolerance else None


def _z() -> float:
    return NormalDist().inv_cdf(0.5 + LEVEL / 2)


def _rows(name: str, values: Sequence | np.ndarray) -> np.ndarray:
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 2 or not rows.size:
        raise ValueError(f"{name}: expected a row of numbers for each prompt, [P, n], got shape {rows.shape}")
    return rows


def _divided(above: np.ndarray, below: np.ndarray, otherwise: float) -> np.ndarray:
    return np.divide(above, below, out=np.full(above.shape, otherwise), where=below != 0)


def _same_prompts(one: Statistic, other: Statistic) -> None:
    if one.without.shape != other.without.shape:
        raise ValueError(f"other: expected a number of {len(one.without)} prompts, got {len(other.without)}")
