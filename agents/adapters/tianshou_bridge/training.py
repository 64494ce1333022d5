"""Tianshou's trainers over text: an iteration is one collection of whole episodes and what is learnt from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from tianshou.trainer import OffPolicyTrainer, OffPolicyTrainerParams, OnPolicyTrainer, OnPolicyTrainerParams
from tianshou.utils import BaseLogger

from agents.adapters.tianshou_bridge.collect import TextCollectStats, charge_of
from agents.adapters.tianshou_bridge.recipes import Setup

Callback = Callable[[int, Mapping[str, float]], Any]
"""`(iterations done, metrics)`; returning False ends `train`."""


class MinibatchTrainer(OnPolicyTrainer):
    """Tianshou's, with a number of minibatches instead of their size: responses differ in length."""

    minibatches = 1

    def _update_step(self, collect_stats: Any = None) -> Any:
        steps = collect_stats.n_collected_steps
        if steps < 2:
            raise ValueError(f"episodes: expected a collection of at least 2 tokens to learn from, got {steps}")
        # Not 1: advantages are normalised within a minibatch, and one number has no deviation.
        self.params.batch_size = max(2, steps // self.minibatches)
        return super()._update_step(collect_stats)


class StepsTrainer(OffPolicyTrainer):
    """Tianshou's, with a number of optimizer steps instead of their share of the steps collected."""

    steps = 1

    def _update_step(self, collect_stats: Any) -> Any:
        self.params.update_step_num_gradient_steps_per_sample = self.steps / collect_stats.n_collected_steps
        return super()._update_step(collect_stats)


def train(
    setup: Setup, *, logger: BaseLogger | None = None, callback: Callback | None = None
) -> list[dict[str, float]]:
    """Run Tianshou's trainer for `setup.config.iterations` iterations.

    Args:
        setup: Of `make_algorithm`.
        logger: One of Tianshou's; an epoch of its own is an iteration.
        callback: Called after each iteration, a tracker's `log` for one.

    Returns:
        The metrics of each iteration: `score/mean`, `kl/sequence`, `objective`, `kl_coef`, `response/length`, the
        seconds of collecting and learning, and Tianshou's losses.
    """
    config = setup.config
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)
    setup.venv.seed(config.seed)
    trainer = _trainer(setup, logger)
    trainer.reset()
    history = []
    for iteration in range(1, config.iterations + 1):
        start = time.perf_counter()
        stats = trainer.execute_epoch()
        collected = charge_of(setup.collector).latest
        assert collected is not None and stats.training_stat is not None
        metrics = _metrics(collected) | {
            f"loss/{name}": float(value) for name, value in stats.training_stat.get_loss_stats_dict().items()
        }
        metrics["time/learn"] = time.perf_counter() - start - collected.collect_time
        history.append(metrics)
        if callback is not None and callback(iteration, metrics) is False:
            break
    return history


def _trainer(setup: Setup, logger: BaseLogger | None) -> Any:
    config = setup.config
    common: dict[str, Any] = {
        "max_epochs": config.iterations,
        "epoch_num_steps": 1,  # any collection is that long: an epoch is an iteration
        "training_collector": setup.collector,
        "collection_step_num_env_steps": None,
        "collection_step_num_episodes": config.episodes,
        "logger": logger,
        "verbose": False,
        "show_progress": False,
    }
    algorithm: Any = setup.algorithm
    if setup.name in ("dqn", "sac"):
        batch = config.batch_episodes * setup.venv.task.options.max_new_tokens
        trainer: Any = StepsTrainer(algorithm, OffPolicyTrainerParams(**common, batch_size=batch))
        trainer.steps = config.gradient_steps
    else:
        params = OnPolicyTrainerParams(**common, update_step_num_repetitions=config.epochs)
        trainer = MinibatchTrainer(algorithm, params)
        trainer.minibatches = config.minibatches
    return trainer


def _metrics(collected: TextCollectStats) -> dict[str, float]:
    return {
        "score/mean": float(collected.scores.mean()),
        "score/sd": float(collected.scores.std()),
        "kl/sequence": float(collected.kls.mean()),
        "kl_coef": collected.kl_coef,
        "objective": float(collected.objectives.mean()),
        "return/mean": float(collected.returns.mean()),
        "response/length": float(collected.lens.mean()),
        "time/collect": collected.collect_time,
    }
