"""What rewards made of other rewards have in common: what each part is called, and whose statistics are whose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from textenv.rewards.base import Scores
from textenv.rewards.reward import Ids, Reward


def part_names(children: Mapping[str, Reward]) -> tuple[str, ...]:
    """Each child's score under its name, and the child's own parts below it: `style`, `style/raw`."""
    return tuple(
        path for name, child in children.items() for path in (name, *(f"{name}/{part}" for part in child.names))
    )


def parts_of(name: str, answer: Scores) -> dict[str, Any]:
    """One child's answer, under the names of `part_names`."""
    return {name: answer.total, **{f"{name}/{part}": values for part, values in answer.parts.items()}}


def answer_in(name: str, scores: Scores) -> Scores:
    """The child's answer again: the inverse of `parts_of`."""
    prefix = f"{name}/"
    below = {path.removeprefix(prefix): part for path, part in scores.parts.items() if path.startswith(prefix)}
    return Scores(scores.parts[name], below)


class Composed:
    """A bound reward made of others. What they say is told as its parts, from which `update` gives each its own."""

    wants_ids = True

    def __init__(self, children: Mapping[str, Reward]) -> None:
        """Children by name."""
        self.children = dict(children)
        self.part_names = part_names(children)

    def __call__(self, prompts: Ids, responses: Ids) -> Scores:
        """Score responses."""
        raise NotImplementedError

    @property
    def learns(self) -> bool:
        """Whether a child has running statistics."""
        return any(child.learns for child in self.children.values())

    @property
    def moves_units(self) -> bool:
        """Whether a child's statistics move the unit of its scores."""
        return any(child.moves_units for child in self.children.values())

    def update(self, scores: Scores) -> None:
        """Give each child what it said itself."""
        for name, child in self.children.items():
            child.update(answer_in(name, scores))

    def state_dict(self) -> dict[str, Any]:
        """The states of those children that have one."""
        states = {name: child.state_dict() for name, child in self.children.items()}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give each child its state.

        Raises:
            ValueError: If there is one of a child that is not here.
        """
        unknown = sorted(state.keys() - self.children.keys())
        if unknown:
            raise ValueError(f"reward: expected statistics of {list(self.children)}, got those of {unknown[0]!r}")
        for name, child in self.children.items():
            child.load_state_dict(state.get(name, {}))


def float64(values: Any) -> np.ndarray:
    """As float64, in which combinators compute; answers are rounded to float32 once, at the end."""
    return np.asarray(values, dtype=np.float64)
