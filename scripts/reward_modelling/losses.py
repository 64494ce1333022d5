"""What a reward model minimises, as functions of its raw outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from scripts.reward_modelling.examples import Example, Task

Loss = Callable[[Tensor, Tensor], Tensor]


def comparison_loss(raw: Tensor, margins: Tensor) -> Tensor:
    """−log σ(raw_chosen − raw_rejected − margin): Bradley and Terry 1952, with margins Touvron et al. 2023, eq. 2.

    >>> import torch
    >>> comparison_loss(torch.tensor([2.0, 1.0]), torch.tensor([1.0]))
    tensor([0.6931])

    Args:
        raw: `[2 P]`, each chosen one before its rejected one.
        margins: `[P]`.

    Returns:
        `[P]`.

    Raises:
        ValueError: If the shapes do not fit each other.
    """
    _check(raw, margins, 2)
    chosen, rejected = raw.view(-1, 2).unbind(1)
    return -F.logsigmoid(chosen - rejected - margins)


def rating_loss(raw: Tensor, ratings: Tensor, unit: float = 1.0) -> Tensor:
    """((raw − rating) / unit)².

    >>> import torch
    >>> rating_loss(torch.tensor([2.0]), torch.tensor([5.0]), unit=2.0)
    tensor([2.2500])

    Args:
        raw: `[P]`.
        ratings: `[P]`.
        unit: Standard deviation of the ratings, so that their scale decides nothing.

    Returns:
        `[P]`.

    Raises:
        ValueError: If the shapes do not fit each other.
    """
    _check(raw, ratings, 1)
    return ((raw - ratings) / unit).square()


def label_loss(raw: Tensor, labels: Tensor) -> Tensor:
    """−log σ(raw) for a good text, −log σ(−raw) for a bad one.

    >>> import torch
    >>> label_loss(torch.tensor([0.0, 3.0]), torch.tensor([1.0, 0.0]))
    tensor([0.6931, 3.0486])

    Args:
        raw: `[P]`.
        labels: `[P]`, 1 good, 0 bad.

    Returns:
        `[P]`.

    Raises:
        ValueError: If the shapes do not fit each other.
    """
    _check(raw, labels, 1)
    return F.binary_cross_entropy_with_logits(raw, labels, reduction="none")


def _check(raw: Tensor, targets: Tensor, texts: int) -> None:
    if targets.ndim != 1 or raw.shape != (texts * len(targets),):
        raise ValueError(f"raw: expected [{texts} P] outputs for targets [P], got {raw.shape} and {targets.shape}")


@dataclass(frozen=True)
class Objective:
    """A loss of raw = unit · network output + centre, which starts near the data's own level."""

    loss: Loss
    """Of the raw outputs `[texts]` and the targets `[P]`; one number an example."""
    unit: float = 1.0
    """Raw units of 1 of the network's output."""
    centre: float = 0.0
    """Raw value of the network's output 0."""


def objective_of(task: Task, examples: Sequence[Example]) -> Objective:
    """What suits a task: raw is the log-odds of a comparison or of a good label, or the rating itself.

    Raises:
        ValueError: If all ratings or all labels are the same.
    """
    if task in ("pairs", "ranked"):
        return Objective(comparison_loss)
    targets = np.array([example.target for example in examples])
    if targets.std() == 0:
        raise ValueError(f"{task}: expected values that differ, got {targets[0]} in all {len(targets)} examples")
    if task == "ratings":
        unit = float(targets.std())
        return Objective(partial(rating_loss, unit=unit), unit, float(targets.mean()))
    good = float(targets.mean())
    return Objective(label_loss, centre=math.log(good / (1 - good)))
