"""Texts with places for others."""

from __future__ import annotations

import re
from collections.abc import Mapping


def fill(template: str, values: Mapping[str, str]) -> str:
    """Put texts where a template has their names in braces.

    In one pass and not by `str.format`: other braces stay, and a response that says `{prompt}` is not filled in again.

    >>> fill("{prompt} | {response} | {x}", {"prompt": "a", "response": "{prompt}"})
    'a | {prompt} | {x}'
    """
    places = "|".join(re.escape(f"{{{name}}}") for name in values)
    return re.sub(places, lambda found: values[found[0][1:-1]], template)
