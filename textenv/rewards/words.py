"""A reward that is a weighted sum of the response's words."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

_SETTINGS, _NUMBERS = "words.json", "words.safetensors"


@dataclass(frozen=True, eq=False)
class WordsReward:
    """score(x, y) = w · φ(y) / ‖φ(y)‖ + b, with φ_j = (1 + ln n_j) · idf_j for a term that y has n_j times, else 0.

    A term is a run of lower-case words. The prompt is not read: a sum of words has no way to say how a response fits
    its prompt. φ / ‖φ‖ is the TF-IDF of scikit-learn (`TfidfVectorizer(sublinear_tf=True)`), which fits such a reward
    (`scripts/train_reward.py`) and is not needed to use it.

    >>> reward = WordsReward(("good", "good film"), np.array([1.0, 1.0]), np.array([3.0, 4.0]), bias=0.5)
    >>> reward(["", ""], ["Good.", "Good film!"])
    [3.5, 5.449747468305833]
    """

    terms: tuple[str, ...]
    """What is counted: words, or several with one space between."""
    idf: np.ndarray
    """`[terms]`: how rare each is; positive."""
    weights: np.ndarray
    """`[terms]`: w."""
    bias: float = 0.0
    """b."""
    pattern: str = r"(?u)\b\w\w+\b"
    """Regular expression of a word."""
    longest: int = 2
    """Most words of a term."""
    scale: float = 1.0
    """What undoes the normalisation of scores: σ(scale·(score_a − score_b)) is the probability that a is preferred to
    b, of a reward that was fitted to preferences."""

    def __post_init__(self) -> None:
        """Check the shapes and the numbers.

        Raises:
            ValueError: If they do not fit each other.
        """
        for name in ("idf", "weights"):
            array = getattr(self, name)
            if array.shape != (len(self.terms),) or not np.isfinite(array).all():
                raise ValueError(f"{name}: expected {len(self.terms)} finite numbers, one a term, got {array!r}")
        if not (self.idf > 0).all():
            raise ValueError(f"idf: expected positive numbers, got {self.idf.min()}")
        if not math.isfinite(self.bias):
            raise ValueError(f"bias: expected a finite number, got {self.bias}")
        if self.longest < 1:
            raise ValueError(f"longest: expected at least 1 word a term, got {self.longest}")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale: expected a finite number > 0, got {self.scale}")

    @cached_property
    def places(self) -> dict[str, int]:
        """Where each term stands."""
        return {term: place for place, term in enumerate(self.terms)}

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Scores of the responses."""
        return [self._score(response) for response in responses]

    def _score(self, text: str) -> float:
        counts = Counter(self.places[term] for term in self._terms(text) if term in self.places)
        if not counts:
            return self.bias
        places = np.fromiter(counts, dtype=np.int64)
        values = (1.0 + np.log(np.fromiter(counts.values(), dtype=np.float64))) * self.idf[places]
        return float(values @ self.weights[places] / np.linalg.norm(values)) + self.bias

    def _terms(self, text: str) -> Iterator[str]:
        words = re.findall(self.pattern, text.lower())
        for length in range(1, self.longest + 1):
            for first in range(len(words) - length + 1):
                yield " ".join(words[first : first + length])

    @staticmethod
    def is_in(folder: str | Path) -> bool:
        """Whether a folder holds such a reward."""
        return (Path(folder) / _SETTINGS).is_file()

    def save(self, folder: str | Path) -> None:
        """Write `words.json` (terms and settings) and `words.safetensors` (numbers)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {name: getattr(self, name) for name in ("pattern", "longest", "bias", "scale", "terms")}
        (folder / _SETTINGS).write_text(json.dumps(settings, ensure_ascii=False) + "\n", encoding="utf8")
        save_file({"idf": self.idf, "weights": self.weights}, folder / _NUMBERS)

    @classmethod
    def load(cls, folder: str | Path, *, argument: str = "reward") -> WordsReward:
        """Read what `save` wrote.

        Args:
            folder: Where that is.
            argument: For error messages.

        Raises:
            ValueError: If the folder holds something else.
        """
        folder = Path(folder)
        try:
            settings: dict[str, Any] = json.loads((folder / _SETTINGS).read_text(encoding="utf8"))
            numbers = load_file(folder / _NUMBERS)
            settings["terms"] = tuple(settings["terms"])
            return cls(idf=numbers["idf"], weights=numbers["weights"], **settings)
        except (OSError, KeyError, TypeError, json.JSONDecodeError, SafetensorError) as error:
            raise ValueError(
                f"{argument}: expected a folder with {_SETTINGS} and {_NUMBERS}, got {str(folder)!r} ({error})"
            ) from error
