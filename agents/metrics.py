"""What is logged of a rollout and of an update; every statistic is masked, and the PPO page defines each by formula."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from agents.diagnostics import explained_variance
from agents.masked import masked_mean, masked_sum
from agents.mismatch import mismatch
from agents.rollout import Rollout
from textenv.task import Task
from textenv.types import FinishReason


@torch.no_grad()
def rollout_metrics(rollout: Rollout, returns: Tensor | None, task: Task) -> dict[str, float]:
    """Score, KL, entropy, lengths and endings of the episodes, and how well the values foresaw the returns.

    Args:
        rollout: What was recorded.
        returns: `[B, T]`, what the values were to foresee; None without a critic.
        task: The environment's.
    """
    lengths, scores = rollout.response_lengths.float(), rollout.scores[rollout.scored]
    metrics = {
        "reward/sequence": float(masked_sum(rollout.rewards, rollout.mask, dim=1).mean()),
        "entropy": float(masked_mean(rollout.entropy, rollout.mask)),
        "length/mean": float(lengths.mean()),
        "length/max": float(lengths.max()),
    }
    if rollout.trainer_logprobs is not None:
        gap = mismatch(rollout.trainer_logprobs, rollout.behavior_logprobs, rollout.mask)
        metrics |= {f"sampler/{name}": float(value) for name, value in gap._asdict().items()}
    if returns is not None:
        metrics["value/mean"] = float(masked_mean(rollout.values, rollout.mask))
        metrics["value/explained_variance"] = float(explained_variance(rollout.values, returns, rollout.mask))
    if rollout.greedy is not None:
        metrics["greedy/reward"] = float(rollout.greedy.mean())
    if len(scores):
        metrics |= {"score/mean": float(scores.mean()), "score/std": float(scores.std(unbiased=False))}
        parts = rollout.score_parts.items()
        metrics |= {f"score/{name}": float(part[rollout.scored].mean()) for name, part in parts}
    for reason in (FinishReason.STOP, FinishReason.LENGTH):
        metrics[f"finish/{reason.name.lower()}"] = float((rollout.finish_reasons == reason).float().mean())
    if task.reference is not None:
        sequence_kl = float(rollout.kl.sum(1).mean())
        metrics |= {
            "kl/sequence": sequence_kl,
            "kl/token": float(masked_mean(rollout.kl, rollout.mask)),
            "kl/coef": task.kl_coef,
        }
        if len(scores):
            metrics["objective"] = metrics["score/mean"] - task.kl_coef * sequence_kl
    return metrics | {f"time/{phase}": seconds for phase, seconds in rollout.seconds.items()}


def update_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Means over the tokens of all optimizer steps of an update, from their sums."""
    tokens = sums.get("tokens", 0.0)
    names = [name for name in sums if name not in ("tokens", "steps")]
    metrics = {name: sums[name] / tokens for name in names} if tokens else {}
    return metrics | {"steps": sums.get("steps", 0.0)}
