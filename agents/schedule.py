"""Learning-rate schedules."""

from __future__ import annotations

import math

from agents.config import TrainConfig


def lr_factor(update: int, config: TrainConfig, schedule_updates: int | None) -> float:
    """What the learning rates are multiplied by in an update.

    A linear rise over `warmup_updates`, times the decay at p = update / schedule_updates: linear 1 − p, cosine
    ½(1 + cos πp), constant 1.

    Args:
        update: Updates done before this one.
        config: Its `lr_schedule` and `warmup_updates`.
        schedule_updates: Length of the schedule; None: no decay.

    >>> [lr_factor(u, TrainConfig(lr_schedule="linear", warmup_updates=2), 4) for u in range(4)]
    [0.5, 0.75, 0.5, 0.25]
    """
    rise = min(1.0, (update + 1) / config.warmup_updates) if config.warmup_updates else 1.0
    if config.lr_schedule == "constant" or schedule_updates is None:
        return rise
    progress = min(1.0, update / schedule_updates)
    return rise * (1.0 - progress if config.lr_schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress)))
