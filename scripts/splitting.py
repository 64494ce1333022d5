"""Training and held-out sides of data whose items come in groups."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def split_groups(items: Sequence[T], keys: Sequence[Hashable], frac: float, seed: int) -> tuple[list[T], list[T]]:
    """Items to train on and items held out; those of one key stay on one side, and neither side is empty.

    Args:
        items: In their order, which both sides keep.
        keys: Of each item, its group; two groups at least.
        frac: Share of the groups that is held out.
        seed: Which.

    >>> split_groups("aabbc", "aabbc", 0.34, seed=0)
    (['a', 'a', 'b', 'b'], ['c'])
    """
    groups = list(dict.fromkeys(keys))
    count = min(max(1, round(frac * len(groups))), len(groups) - 1)
    unseen = {groups[place] for place in np.random.default_rng(seed).permutation(len(groups))[:count]}
    pairs = list(zip(items, keys, strict=True))
    return [item for item, key in pairs if key not in unseen], [item for item, key in pairs if key in unseen]
