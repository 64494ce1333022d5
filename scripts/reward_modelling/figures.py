"""What a reward model is worth on held-out examples, in numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from agents.intervals import wilson
from scripts.reward_modelling.examples import Example, Task, Text

GAPS = 5
"""Bins of the accuracy by gap."""
BINS = 10
"""Bins of the calibration curve."""


class Share(NamedTuple):
    """How often something was right."""

    value: float
    standard_error: float
    count: int


class Bin(NamedTuple):
    """Examples of similar predictions, or of similar gaps."""

    low: float
    high: float
    count: int
    predicted: float
    """Mean prediction, or mean gap."""
    observed: float
    """What was true on average: a share of right decisions, or a mean rating."""
    standard_error: float
    """Of `observed`."""


@dataclass(frozen=True)
class Decisions:
    """n choices of a reward model, each right or wrong."""

    logits: np.ndarray
    """`[n]`: the log-odds that it gives to what is right; its choice is right where they are positive."""
    members: np.ndarray
    """`[n, 1 or 2]`: which texts each is about. Choices that share a text are not independent."""
    gaps: np.ndarray
    """`[n]`: how far apart the texts are rated, or how sure the model is."""

    @property
    def correct(self) -> np.ndarray:
        """`[n]`: 1 right, 0 wrong, ½ undecided."""
        return (np.sign(self.logits) + 1) / 2


def accuracy(correct: np.ndarray, members: np.ndarray) -> Share:
    """Mean of `correct` with the standard error of choices that share texts.

    SE² = Σ_{p, q sharing a text} e_p e_q / n², e_p = correct_p − mean: Aronow, Samii and Assenova 2015 ("dyadic
    clustering"), which is the binomial one where no text is shared. Summed by text, choices between the same texts come
    as often as there are texts.

    >>> accuracy(np.array([1.0, 0.0, 1.0, 1.0]), np.arange(8).reshape(4, 2))
    Share(value=0.75, standard_error=0.21650635094610965, count=4)

    Args:
        correct: `[n]`.
        members: `[n, m]` numbers of texts.
    """
    count = len(correct)
    errors = correct - correct.mean()
    sums = np.bincount(members.ravel(), np.repeat(errors, members.shape[1]))
    _, same = np.unique(np.sort(members, axis=1), axis=0, return_inverse=True)
    again = (members.shape[1] - 1) * np.square(np.bincount(same.ravel(), errors)).sum()
    variance = (np.square(sums).sum() - again) / count**2
    return Share(float(correct.mean()), math.sqrt(max(0.0, float(variance))), count)


def accuracy_figures(decisions: Decisions) -> dict[str, float]:
    """The accuracy, its standard error, and its 95 % interval (Wilson 1927), which is never of no width.

    n choices are worth p(1 − p)/SE² independent ones, at most n. Where SE is 0, as where all are right, they are taken
    to be worth as many as could be made of their texts without using one twice.
    """
    share = accuracy(decisions.correct, decisions.members)
    p, se = share.value, share.standard_error
    trials = p * (1 - p) / se**2 if se > 0 else len(np.unique(decisions.members)) / decisions.members.shape[1]
    trials = min(trials, share.count)
    found = wilson(p, trials)
    return {**share._asdict(), "low": found.low, "high": found.high}


def calibration(decisions: Decisions) -> tuple[list[Bin], float]:
    """How often the choice is right where the model says it is p, in ten bins of p from ½ to 1; and their mean gap.

    p = σ(|logit|). The gap is the expected calibration error Σ_b n_b/n · |observed_b − predicted_b| (Guo et al. 2017,
    eq. 3).
    """
    sure = 1 / (1 + np.exp(-np.abs(decisions.logits)))
    bins = _binned(np.linspace(0.5, 1.0, BINS + 1), sure, sure, decisions.correct, decisions.members)
    return bins, expected_error(bins)


def expected_error(bins: Sequence[Bin]) -> float:
    """Σ_b n_b/n · |observed_b − predicted_b|."""
    return sum(b.count * abs(b.observed - b.predicted) for b in bins) / sum(b.count for b in bins)


def by_gap(decisions: Decisions) -> list[Bin]:
    """Accuracy from small gaps to large ones, in bins of equal counts."""
    edges = np.quantile(decisions.gaps, np.linspace(0, 1, GAPS + 1))
    return _binned(edges, decisions.gaps, decisions.gaps, decisions.correct, decisions.members)


def _binned(
    edges: np.ndarray, by: np.ndarray, predicted: np.ndarray, observed: np.ndarray, members: np.ndarray
) -> list[Bin]:
    """Bins [low, high), the last one closed, without the empty ones."""
    place = np.clip(np.searchsorted(edges, by, side="right") - 1, 0, len(edges) - 2)
    bins = []
    for number in np.unique(place):
        here = place == number
        share = accuracy(observed[here], members[here])
        low, high = float(edges[number]), float(edges[number + 1])
        bins.append(Bin(low, high, share.count, float(predicted[here].mean()), share.value, share.standard_error))
    return bins


def decide(task: Task, examples: Sequence[Example], raw: Mapping[Text, float]) -> Decisions:
    """The model's choices: which of two texts is better, or whether one is good.

    Args:
        task: `pairs`, `ranked` or `labels`.
        examples: Held-out ones.
        raw: Log-odds of each text, up to a constant for comparisons.
    """
    places = {text: place for place, text in enumerate(raw)}
    members = np.array([[places[text] for text in example.texts] for example in examples])
    values = np.array(list(raw.values()))[members]
    if task == "labels":
        logits = values[:, 0] * np.array([2 * example.target - 1 for example in examples])
    else:
        logits = values[:, 0] - values[:, 1]
    rated = [example.gap for example in examples if example.gap is not None]
    return Decisions(logits, members, np.array(rated) if len(rated) == len(examples) else np.abs(logits))


def choice_figures(task: Task, examples: Sequence[Example], raw: Mapping[Text, float]) -> dict[str, Any]:
    """Accuracy, log loss, calibration, accuracy by gap."""
    decisions = decide(task, examples, raw)
    bins, error = calibration(decisions)
    return {
        "accuracy": accuracy_figures(decisions),
        "loss": float(np.logaddexp(0.0, -decisions.logits).mean()),
        "calibration": {"error": error, "bins": [b._asdict() for b in bins]},
        "by_gap": _gap_figures(decisions, examples),
    }


def rating_figures(
    ratings: Sequence[Example], comparisons: Sequence[Example], raw: Mapping[Text, float]
) -> dict[str, Any]:
    """Accuracy on comparisons of held-out ratings, error and correlation of the ratings themselves, calibration.

    The calibration curve is the mean rating of texts of similar predictions, in tenths of the texts.
    """
    decisions = decide("ranked", comparisons, raw)
    predicted = np.array([raw[example.texts[0]] for example in ratings])
    given = np.array([example.target for example in ratings])
    edges = np.quantile(predicted, np.linspace(0, 1, BINS + 1))
    bins = _binned(edges, predicted, predicted, given, np.arange(len(given))[:, None])
    return {
        "accuracy": accuracy_figures(decisions),
        "rmse": float(np.sqrt(np.square(predicted - given).mean())),
        "correlation": float(np.corrcoef(predicted, given)[0, 1]),
        "calibration": {"error": expected_error(bins), "bins": [b._asdict() for b in bins]},
        "by_gap": _gap_figures(decisions, comparisons),
    }


def _gap_figures(decisions: Decisions, examples: Sequence[Example]) -> dict[str, Any]:
    of = "predicted" if any(example.gap is None for example in examples) else "rated"
    return {"of": of, "bins": [b._asdict() for b in by_gap(decisions)]}
