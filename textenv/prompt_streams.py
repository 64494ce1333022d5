"""Drawing prompts in a seeded order that a checkpoint can go on from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np


class PromptStream:
    """Prompt indices in seeded epochs without repetition, each repeated `group` times in a row.

    The order is a pure function of `(seed, epoch)`; the position is all that a checkpoint keeps.

    >>> sorted(PromptStream(3, seed=0).take(3))
    [0, 1, 2]
    """

    def __init__(self, size: int, *, seed: int, group: int = 1) -> None:
        """A stream over `size` prompts."""
        if size < 1 or group < 1:
            raise ValueError(f"size, group: expected integers >= 1, got {size} and {group}")
        self.size, self.seed, self.group = size, seed, group
        self.position = 0
        """Draws so far, counting each of a group."""

    def take(self, count: int) -> list[int]:
        """The next `count` prompt indices."""
        draws = range(self.position, self.position + count)
        self.position += count
        orders: dict[int, np.ndarray] = {}
        indices = []
        for draw in draws:
            epoch, place = divmod(draw // self.group, self.size)
            if epoch not in orders:
                orders[epoch] = _order(self.size, self.seed, epoch)
            indices.append(int(orders[epoch][place]))
        return indices

    def state_dict(self) -> dict[str, int]:
        """The position."""
        return {"seed": self.seed, "position": self.position, "group": self.group, "size": self.size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a position in the same stream."""
        if (state.get("size"), state["group"]) != (self.size, self.group):
            raise ValueError(
                f"prompts: expected the checkpoint's {state.get('size')} prompts in groups of {state['group']}, "
                f"got {self.size} in groups of {self.group}"
            )
        self.seed, self.position = state["seed"], state["position"]


class MixedPromptStream:
    """Prompt indices of several sources, each drawn by its share and in seeded epochs without repetition of its own.

    Draw k takes the source that is furthest behind its share,

        argmax_i  w_i·(k + 1) − W·n_i ,    W = Σ w_i ,    n_i the draws of source i so far,

    the first of them if several are (smooth weighted round robin; stride scheduling, Waldspurger and Weihl 1995, is
    its kin). So the shares are exact after every cycle of W / gcd(w) draws, in integer weights, and never off by as
    much as the number of sources between. Only the order within a source is random, a pure function of the seed.
    Indices count through the sources put together. The first source is in the order of a `PromptStream` of its own.

    >>> MixedPromptStream([4, 1], [2, 1], seed=0).take(6)
    [2, 4, 0, 1, 4, 3]
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], *, seed: int, group: int = 1) -> None:
        """A stream over sources of these sizes.

        Args:
            sizes: Prompts of each source.
            weights: Shares of draws, in any unit; a number is meant as it is written (0.1 is a tenth).
            seed: Of the orders.
            group: How often each draw is repeated in a row.
        """
        if not sizes or min(sizes) < 1 or group < 1:
            raise ValueError(f"sizes, group: expected integers >= 1, got {list(sizes)} and {group}")
        if len(weights) != len(sizes) or not all(math.isfinite(w) and w > 0 for w in weights):
            raise ValueError(f"weights: expected {len(sizes)} finite numbers > 0, got {list(weights)}")
        self.sizes, self.seed, self.group = list(sizes), seed, group
        self.weights = _integers(weights)
        """In lowest terms, so that no rounding decides a draw."""
        self.position = 0
        """Draws so far, counting each of a group."""
        self.drawn = [0] * len(sizes)
        """Whole groups drawn of each source."""

    def take(self, count: int) -> list[int]:
        """The next `count` prompt indices."""
        offsets = np.cumsum([0, *self.sizes]).tolist()
        orders: dict[tuple[int, int], np.ndarray] = {}
        indices = []
        for _ in range(count):
            source = self._next()
            epoch, place = divmod(self.drawn[source], self.sizes[source])
            if (source, epoch) not in orders:
                orders[source, epoch] = _order(self.sizes[source], self.seed, epoch, source)
            indices.append(offsets[source] + int(orders[source, epoch][place]))
            self.position += 1
            if self.position % self.group == 0:
                self.drawn[source] += 1
        return indices

    def _next(self) -> int:
        total, draws = sum(self.weights), sum(self.drawn)
        behind = [weight * (draws + 1) - total * n for weight, n in zip(self.weights, self.drawn, strict=True)]
        return behind.index(max(behind))

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it belongs to."""
        return {
            "seed": self.seed,
            "position": self.position,
            "group": self.group,
            "sizes": list(self.sizes),
            "weights": list(self.weights),
            "drawn": list(self.drawn),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position in the same stream."""
        for name, mine in (("sizes", self.sizes), ("weights", self.weights), ("group", self.group)):
            if state.get(name) != mine:
                raise ValueError(f"prompts: expected the checkpoint's {name}, {state.get(name)}, got {mine}")
        self.seed, self.position, self.drawn = state["seed"], state["position"], list(state["drawn"])


def _order(size: int, seed: int, epoch: int, source: int = 0) -> np.ndarray:
    """A permutation; trailing zeros do not change a seed of NumPy, so source 0 is also that of a stream without any."""
    return np.random.default_rng((seed, epoch, source)).permutation(size)


def _integers(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the same proportions.

    >>> _integers([0.7, 0.3]), _integers([2, 4])
    ([7, 3], [1, 2])
    """
    parts = [Fraction(str(float(weight))) for weight in weights]
    common = math.lcm(*(part.denominator for part in parts))
    whole = [int(part * common) for part in parts]
    return [number // math.gcd(*whole) for number in whole]
