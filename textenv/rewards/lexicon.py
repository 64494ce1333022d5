"""Valence by word: the sum of what people said that each word is worth."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from textenv.tables import as_number

_WORD = re.compile(r"[a-z']+")


def words(text: str) -> list[str]:
    """The words of a text, in lower case: runs of a to z and apostrophes.

    >>> words("Don't worry, be HAPPY!")
    ["don't", 'worry', 'be', 'happy']
    """
    return _WORD.findall(text.lower())


def valence(text: str, values: Mapping[str, float], *, distinct: bool = False) -> float:
    """Σ value(w) over the words of a text, or over its different words.

    >>> valence("Joy, joy and pain.", {"joy": 2.5, "pain": -2.0}), valence("Joy, joy!", {"joy": 2.5}, distinct=True)
    (3.0, 2.5)
    """
    found = words(text)
    # dict.fromkeys, not a set: the order of a set of strings differs from run to run, and with it the rounding.
    return float(sum(values.get(word, 0.0) for word in (dict.fromkeys(found) if distinct else found)))


def read_lexicon(path: str | Path) -> dict[str, float]:
    r"""Values by word, from lines of `word<TAB>value`, or `word,value` in a `.csv`; further columns are skipped.

    That is the layout of VADER's lexicon. Entries that `words` never finds (emoticons, phrases) are left out, and so is
    a first line whose second column is a header.

    Raises:
        ValueError: If a line has no value, or if no word is left.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "words.txt"
    >>> _ = file.write_text("joy\t2.8\t0.7\t[]\n:)\t2.0\t1\t[]\n")
    >>> read_lexicon(file)
    {'joy': 2.8}
    """
    path = Path(path)
    with path.open(encoding="utf8", newline="") as file:
        separator, quoting = (",", csv.QUOTE_MINIMAL) if path.suffix == ".csv" else ("\t", csv.QUOTE_NONE)
        rows = [
            (number, row) for number, row in enumerate(csv.reader(file, delimiter=separator, quoting=quoting), 1) if row
        ]
    values = {}
    for number, row in rows:
        value = as_number(row[1]) if len(row) > 1 else None
        if value is None and number > 1:
            raise ValueError(f"lexicon: expected a word and its value in line {number} of {path.name}, got {row!r}")
        if value is not None and _WORD.fullmatch(row[0]):
            values[row[0]] = value
    if not values:
        raise ValueError(f"lexicon: expected words and values in {path.name}, got none")
    return values


@dataclass(frozen=True)
class LexiconReward:
    """score = Σ value(w) over the words of the response, or with `distinct` over its different words.

    >>> LexiconReward({"joy": 2.8, "pain": -2.3}, distinct=True)([""], ["Joy, joy and pain."])
    [0.5]
    """

    values: Mapping[str, float]
    """By word in lower case; other words are worth 0. `read_lexicon` reads a file."""
    distinct: bool = False
    """Whether saying a word again buys nothing."""

    def __post_init__(self) -> None:
        """Check the values."""
        if not isinstance(self.values, Mapping) or not self.values:
            raise ValueError(f"values: expected numbers by word, got {self.values!r}")
        bad = [word for word, value in self.values.items() if not math.isfinite(value)]
        if bad:
            raise ValueError(f"values: expected finite numbers, got {self.values[bad[0]]!r} for {bad[0]!r}")

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """One score a response."""
        return [valence(response, self.values, distinct=self.distinct) for response in responses]
