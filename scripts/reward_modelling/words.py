"""Fitting a weighted sum of words with scikit-learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from scripts.reward_modelling.examples import Example, Task, Text
from textenv.rewards import WordsReward


@dataclass(frozen=True)
class WordSettings:
    """How a weighted sum of words is fitted."""

    longest: int = 2
    """Most words of a term."""
    min_texts: int = 2
    """Fewest training texts that a term is in."""
    penalty: float = 1.0
    """Weight of ‖w‖² (ridge, or ½‖w‖² of a logistic regression) beside the sum of the losses."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: Naming the setting.
        """
        for name in ("longest", "min_texts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {getattr(self, name)}")
        if not self.penalty > 0:
            raise ValueError(f"penalty: expected a positive number, got {self.penalty}")


def fit_words(task: Task, examples: Sequence[Example], settings: WordSettings) -> WordsReward:
    """Least squares of ratings, or logistic regression of labels or of differences of comparisons.

    Its score is raw: a rating or log-odds.

    Raises:
        ValueError: If there is a margin, if no term is left, or if all labels are the same.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    if any(example.target for example in examples) and task in ("pairs", "ranked"):
        raise ValueError("margin: expected none with kind='words', whose regression has no place for it")
    vectorizer = TfidfVectorizer(ngram_range=(1, settings.longest), min_df=settings.min_texts, sublinear_tf=True)
    distinct = list(dict.fromkeys(text for example in examples for text in example.texts))
    try:
        features = vectorizer.fit_transform([text.response for text in distinct])
    except ValueError as error:
        raise ValueError(
            f"min_texts: expected terms in {settings.min_texts} texts or more, got none ({error})"
        ) from error
    places = {text: place for place, text in enumerate(distinct)}
    sides = [features[[places[text] for text in column]] for column in zip(*(e.texts for e in examples), strict=True)]
    weights, bias = _regression(task, sides, np.array([example.target for example in examples]), settings.penalty)
    terms = vectorizer.get_feature_names_out()
    pattern = vectorizer.token_pattern
    return WordsReward(tuple(terms.tolist()), vectorizer.idf_, weights, bias, pattern, settings.longest)


def _regression(task: Task, sides: Sequence[Any], targets: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    from scipy.sparse import vstack
    from sklearn.linear_model import LogisticRegression, Ridge

    if task == "ratings":
        ridge = Ridge(alpha=penalty).fit(sides[0], targets)
        return ridge.coef_, float(ridge.intercept_)
    if task == "labels":
        if len(set(targets)) < 2:
            raise ValueError(f"labels: expected good and bad ones, got only {targets[0]}")
        logistic = LogisticRegression(C=1 / penalty, max_iter=1000, tol=1e-6).fit(sides[0], targets)
        return logistic.coef_[0], float(logistic.intercept_[0])
    # A difference and its opposite are one example told twice: scikit-learn wants both classes, and half the weight.
    difference = sides[0] - sides[1]
    both, outcome = vstack([difference, -difference]), np.repeat([1, 0], difference.shape[0])
    logistic = LogisticRegression(C=0.5 / penalty, max_iter=1000, tol=1e-6, fit_intercept=False).fit(both, outcome)
    return logistic.coef_[0], 0.0


def standardise_words(reward: WordsReward, reference: Sequence[Text]) -> tuple[WordsReward, Mapping[str, float]]:
    """The reward whose scores of the reference have mean 0 and standard deviation 1, and the way back.

    Raises:
        ValueError: If the scores are all the same.
    """
    scores = np.array(reward([text.prompt for text in reference], [text.response for text in reference]))
    mean, sd = float(scores.mean()), float(scores.std())
    if not sd > 0:
        raise ValueError(f"reference: expected texts whose scores differ, got {len(reference)} scores of {mean}")
    fitted = replace(reward, weights=reward.weights / sd, bias=(reward.bias - mean) / sd, scale=reward.scale * sd)
    return fitted, {"bias": fitted.bias, "scale": sd, "offset": mean}
