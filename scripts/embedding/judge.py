"""The judge whose preferences the reward model learns: how happy a text is, by human word ratings."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

_WORD = re.compile(r"[a-z']+")


def read_lexicon(path: Path) -> dict[str, float]:
    r"""Human valence of words, -4 to 4; the lexicon's emoticons and phrases are left out.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "words.txt"
    >>> _ = file.write_text("joy\t2.8\t0.7\t[]\n:)\t2.0\t1\t[]\n")
    >>> read_lexicon(file)
    {'joy': 2.8}
    """
    fields = (line.split("\t") for line in path.read_text(encoding="utf8").splitlines())
    return {word[0]: float(word[1]) for word in fields if _WORD.fullmatch(word[0])}


def valence(text: str, lexicon: Mapping[str, float]) -> float:
    """Sum over the *distinct* words of a text, so that saying a word again buys nothing.

    >>> valence("Joy, joy and pain.", {"joy": 2.8, "pain": -2.3})
    0.5
    """
    return sum(lexicon.get(word, 0.0) for word in set(_WORD.findall(text.lower())))


def repetition(text: str) -> float:
    """Share of a text's word bigrams that it had before.

    >>> repetition("so happy so happy so")
    0.5
    """
    words = _WORD.findall(text.lower())
    bigrams = list(itertools.pairwise(words))
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
