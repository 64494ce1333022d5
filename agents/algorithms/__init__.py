"""Algorithms as objects: an estimator, an objective and an aggregation, and named recipes made of them."""

from __future__ import annotations

from agents.algorithms.aggregation import FixedLength, SequenceMean, TokenMean
from agents.algorithms.base import Aggregation, Algorithm, Estimator, KLLoss, Objective, Targets, ValueLoss
from agents.algorithms.estimators import (
    GAE,
    DecoupledGAE,
    GreedyBaseline,
    GroupNormalized,
    LeaveOneOut,
    LengthAdaptiveGAE,
    ReturnToGo,
    RunningBaseline,
    Scaled,
    Whitened,
)
from agents.algorithms.objectives import Clipped, PolicyGradient, ReferenceKL, SequenceClipped
from agents.algorithms.recipes import (
    RECIPES,
    a2c,
    dr_grpo,
    from_config,
    grpo,
    gspo,
    ppo,
    reinforce,
    reinforce_baseline,
    reinforce_plus_plus,
    remax,
    rloo,
    vapo,
)

__all__ = [
    "GAE",
    "RECIPES",
    "Aggregation",
    "Algorithm",
    "Clipped",
    "DecoupledGAE",
    "Estimator",
    "FixedLength",
    "GreedyBaseline",
    "GroupNormalized",
    "KLLoss",
    "LeaveOneOut",
    "LengthAdaptiveGAE",
    "Objective",
    "PolicyGradient",
    "ReferenceKL",
    "ReturnToGo",
    "RunningBaseline",
    "Scaled",
    "SequenceClipped",
    "SequenceMean",
    "Targets",
    "TokenMean",
    "ValueLoss",
    "Whitened",
    "a2c",
    "dr_grpo",
    "from_config",
    "grpo",
    "gspo",
    "ppo",
    "reinforce",
    "reinforce_baseline",
    "reinforce_plus_plus",
    "remax",
    "rloo",
    "vapo",
]
