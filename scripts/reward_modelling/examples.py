"""What a reward model learns from: rows of data become examples, on two sides."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from scripts.splitting import split_groups
from textenv.table_files import shown
from textenv.tables import as_number

Task = Literal["pairs", "ranked", "ratings", "labels"]

COLUMNS: dict[Task, tuple[str, ...]] = {
    "pairs": ("chosen", "rejected"),
    "ranked": ("response", "rating"),
    "ratings": ("response", "rating"),
    "labels": ("response", "label"),
}
"""What each row must have, beside the prompt, which may be empty."""
GROUP = "group"
"""The key of a row's group, where rows are split by a column of their own."""

_WORDS = {"true": 1.0, "good": 1.0, "yes": 1.0, "false": 0.0, "bad": 0.0, "no": 0.0}


class Text(NamedTuple):
    """What is scored."""

    prompt: str
    response: str


class Example(NamedTuple):
    """A comparison or a judged text."""

    texts: tuple[Text, ...]
    """The better and the worse of a comparison, else one."""
    target: float = 0.0
    """The margin of a comparison, else the rating or the label (1 good, 0 bad)."""
    gap: float | None = None
    """By how much the better one is rated higher, where that is known."""


def split(
    rows: Sequence[Mapping[str, Any]], fraction: float, seed: int
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Training and held-out rows; rows of one group stay on one side.

    Args:
        rows: Those with the same value under `GROUP` are a group; without it those with the same prompt are, each
            without a prompt being one of its own.
        fraction: Share of the groups that is held out.
        seed: Which groups.

    Raises:
        ValueError: If a side would be empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction: expected a share between 0 and 1, got {fraction}")
    keys = [_group(row, number) for number, row in enumerate(rows)]
    if len(set(keys)) < 2:
        of = "split_by" if any(GROUP in row for row in rows) else "prompt"
        raise ValueError(f"split_by: expected rows of at least 2 groups, got {len(set(keys))} (by {of})")
    return split_groups(rows, keys, fraction, seed)


def _group(row: Mapping[str, Any], number: int) -> Hashable:
    if GROUP in row:
        return str(row[GROUP])
    return str(row["prompt"]) if row["prompt"] else number


def comparisons(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Example], int]:
    """Comparisons of rows with `prompt`, `chosen`, `rejected` and perhaps a `margin`; how many ties were dropped."""
    found = []
    for row in rows:
        if row["chosen"] != row["rejected"]:
            texts = tuple(Text(row["prompt"] or "", row[side]) for side in ("chosen", "rejected"))
            margin = row.get("margin")
            found.append(Example(texts, margin or 0.0, margin))
    return found, len(rows) - len(found)


def judged(rows: Sequence[Mapping[str, Any]], key: Literal["rating", "label"]) -> list[Example]:
    """Examples of rows with `prompt`, `response`, and a number under the key."""
    return [Example((Text(row["prompt"] or "", row["response"]),), row[key]) for row in rows]


def as_label(value: Any, column: str = "label") -> float:
    """1 for good, 0 for bad.

    >>> [as_label(value) for value in (True, 0, "Good", "no", "1.0")]
    [1.0, 0.0, 1.0, 0.0, 1.0]

    Args:
        value: What stands there.
        column: Where, for the error.

    Raises:
        ValueError: For anything but true, good, yes, false, bad, no and the numbers 1 and 0.
    """
    label = _WORDS.get(str(value).strip().lower(), as_number(value))
    if label not in (0.0, 1.0):
        raise ValueError(f"expected 1, 0, {', '.join(_WORDS)} for {column!r}, got {shown(value)}")
    return label


def draw_comparisons(ratings: Sequence[Example], *, min_gap: float, rounds: int, seed: int) -> list[Example]:
    """Comparisons of random pairs whose ratings are more than `min_gap` apart.

    Each round pairs all texts at random, each with one other, and keeps the pairs that are far enough apart; no pair
    comes twice.

    Raises:
        ValueError: If there is no such pair.
    """
    chooser, found = np.random.default_rng(seed), {}
    for _ in range(rounds):
        order = chooser.permutation(len(ratings)).tolist()
        half = len(order) // 2
        for a, b in zip(order[:half], order[half:], strict=False):
            gap = ratings[a].target - ratings[b].target
            texts = ratings[a].texts + ratings[b].texts
            if abs(gap) > min_gap and texts[0] != texts[1]:
                found.setdefault(frozenset((a, b)), Example(texts if gap > 0 else texts[::-1], gap=abs(gap)))
    if not found:
        values = np.array([rating.target for rating in ratings] or [0.0])
        advice = f"; set it below their standard deviation, {values.std():.2g}" if np.ptp(values) else ""
        raise ValueError(
            f"min_gap: expected ratings more than {min_gap} apart, got none among {len(ratings)} from "
            f"{values.min():g} to {values.max():g}{advice}"
        )
    return list(found.values())
