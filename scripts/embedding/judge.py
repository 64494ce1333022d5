"""The judge whose preferences the reward model learns: how happy a text is, by human word ratings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from textenv.rewards.lexicon import valence as lexicon_valence
from textenv.rewards.lexicon import words


def valence(text: str, lexicon: Mapping[str, float]) -> float:
    """Sum over the *distinct* words of a text, so that saying a word again buys nothing.

    >>> valence("Joy, joy and pain.", {"joy": 2.8, "pain": -2.3})
    0.5
    """
    return lexicon_valence(text, lexicon, distinct=True)


def repetition(text: str) -> float:
    """Share of a text's word bigrams that it had before.

    >>> repetition("so happy so happy so")
    0.5
    """
    bigrams = list(itertools.pairwise(words(text)))
    return 1.0 - len(set(bigrams)) / len(bigrams) if bigrams else 0.0


def utility(text: str, mean_logprob: float, usual_logprob: float, lexicon: Mapping[str, float]) -> float:
    """U = 8 tanh(v / 12) - 10 max(0, r - 0.15) - 4 max(0, usual - mean_logprob).

    v is the valence, r the repetition; the last term is for text that the storyteller itself would hardly tell, so
    that heaps of happy words lose against happy sentences.

    Args:
        text: The response.
        mean_logprob: Of its tokens under the storyteller.
        usual_logprob: The lowest that counts as usual.
        lexicon: Valence of words.
    """
    oddness = max(0.0, usual_logprob - mean_logprob)
    return 8.0 * math.tanh(valence(text, lexicon) / 12.0) - 10.0 * max(0.0, repetition(text) - 0.15) - 4.0 * oddness


def correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Pearson's."""
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    spread = math.sqrt(sum((x - mean_x) ** 2 for x in xs) * sum((y - mean_y) ** 2 for y in ys))
    return covariance / spread if spread else 0.0
