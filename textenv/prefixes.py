"""Rows that begin alike: which tokens of a batch are the same in the eyes of a causal model."""

from __future__ import annotations

import numpy as np


def stand_ins(ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """For each token the row whose token stands for it: of rows that are equal up to it, always the same one.

    Sorted, rows that begin alike stand side by side; each hands on those tokens that it has in common with the next.

    Args:
        ids: `[B, L]` integers, none negative, right-padded with anything.
        lengths: `[B]`, at most L.

    Returns:
        `[B, L]` numbers of rows, of no meaning where there is padding.

    >>> stand_ins(np.array([[1, 2, 3], [1, 2, 4], [1, 5, 0]]), np.array([3, 3, 2]))[:, :2].tolist()
    [[0, 0], [0, 0], [0, 2]]
    """
    count, width = ids.shape
    places = np.arange(width)
    # -1 is no token: a row that has ended is like none that goes on.
    known = np.where(places < lengths[:, None], ids, -1).astype(np.int32)
    order = np.argsort(known.view(f"V{known.itemsize * width}").ravel(), kind="stable")
    known = known[order]
    common = np.zeros(count, dtype=np.int64)
    common[1:] = np.logical_and.accumulate(known[1:] == known[:-1], axis=1).sum(1)
    begins = np.where(places >= common[:, None], np.arange(count)[:, None], 0)
    found = np.empty_like(begins)
    found[order] = order[np.maximum.accumulate(begins, axis=0)]
    return found
