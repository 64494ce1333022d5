"""Checks of settings: each raises a `ValueError` that names the field, what was expected and what came."""

from __future__ import annotations

import math


def at_least(name: str, value: object, low: int) -> None:
    """Raise unless it is an integer ≥ `low`.

    >>> at_least("epochs", 0, 1)
    Traceback (most recent call last):
    ...
    ValueError: epochs: expected an integer >= 1, got 0
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name}: expected an integer >= {low}, got {value!r}")


def number(name: str, value: object, *, high: float = math.inf, above: float | None = None) -> None:
    """Raise unless it is a number in [0, high], finite, or one above `above` if that is given.

    >>> number("gamma", 1.5, high=1.0)
    Traceback (most recent call last):
    ...
    ValueError: gamma: expected a finite number >= 0 and <= 1.0, got 1.5
    """
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if above is not None:
        if not (real and isinstance(value, int | float) and above < value < math.inf):
            raise ValueError(f"{name}: expected a number > {above:g}, got {value!r}")
    elif not (real and isinstance(value, int | float) and 0 <= value <= high and value < math.inf):
        bound = "" if high == math.inf else f" and <= {high}"
        raise ValueError(f"{name}: expected a finite number >= 0{bound}, got {value!r}")
