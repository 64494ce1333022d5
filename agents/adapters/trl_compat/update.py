"""The epochs of one `PPOTrainer.step`, and what it tells about them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from agents.adapters.trl_compat.config import PPOConfig
from agents.adapters.trl_compat.step import Batch, evaluate
from agents.diagnostics import clip_fraction, value_clip_fraction
from agents.losses import aggregate, clipped_surrogate, clipped_value, importance_ratios
from agents.masked import masked_mean, masked_var, whiten
from agents.policy import ValueHeadLM
from agents.returns import masked_gae


@dataclass(frozen=True)
class Targets:
    """What the epochs learn from, each `[B, T]`."""

    logprobs: Tensor
    """log π_old."""
    values: Tensor
    """V_old."""
    advantages: Tensor
    """Whitened."""
    returns: Tensor
    """Targets of the values."""

    def rows(self, index: Tensor, width: int) -> Targets:
        """Some of the rows, their first `width` slots."""
        return Targets(*(x[index, :width] for x in (self.logprobs, self.values, self.advantages, self.returns)))


@dataclass(frozen=True)
class Seen:
    """What the forwards of one optimizer step gave, each `[b, T]`, without gradient."""

    logprobs: Tensor
    """log π before the step."""
    values: Tensor
    """V before it."""
    entropy: Tensor
    """Entropy of π(·|s_t) before it."""


@dataclass(frozen=True)
class StepStats:
    """One optimizer step in numbers."""

    scalars: dict[str, float]
    """By TRL's names, without `ppo/`."""
    advantages: np.ndarray
    """Of the tokens that count, `[n]`."""
    ratios: np.ndarray
    """Likewise."""


def estimate(rewards: Tensor, logprobs: Tensor, values: Tensor, mask: Tensor, config: PPOConfig) -> Targets:
    """GAE of rewards and values, the advantages whitened over the batch; returns come before that. All `[B, T]`."""
    if config.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    estimates = masked_gae(rewards, values, mask, gamma=config.gamma, gae_lambda=config.lam)
    return Targets(logprobs, values, whiten(estimates.advantages, mask), estimates.returns)


def run_epochs(
    policy: ValueHeadLM,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    targets: Targets,
    config: PPOConfig,
    generator: torch.Generator,
) -> list[StepStats]:
    """Learn from a batch, and tell each optimizer step.

    Args:
        policy: What learns.
        optimizer: How.
        batch: The rows.
        targets: What was recorded and estimated about them.
        config: Epochs, sizes, clips and guards.
        generator: Draws the order of the rows, on the CPU.
    """
    told: list[StepStats] = []
    policy.zero_grad()
    for _ in range(config.ppo_epochs):
        order = torch.randperm(len(batch), generator=generator).to(batch.ids.device)
        for rows in order.split(config.backward_batch_size):
            seen = _accumulate_gradient(policy, batch, targets, rows, config)
            mask = batch.mask[rows]
            stats = describe(seen, targets.rows(rows, mask.shape[1]), mask, config)
            _take_step(policy, optimizer, float(stats.ratios.mean()), config)
            told.append(stats)
        if config.early_stopping and told[-1].scalars["policy/policykl"] > 1.5 * config.target_kl:
            break
    return told


def _accumulate_gradient(policy: ValueHeadLM, batch: Batch, targets: Targets, rows: Tensor, config: PPOConfig) -> Seen:
    """Gradient of the mean loss over the tokens of `rows`, whatever the forwards it is computed in."""
    tokens = batch.mask[rows].sum()
    parts = []
    assert config.mini_batch_size is not None
    for micro in rows.split(config.mini_batch_size):
        part = batch.rows(micro)
        new = evaluate(policy, part, with_entropy=True)
        old = targets.rows(micro, part.mask.shape[1])
        surrogate = clipped_surrogate(new.logprobs, old.logprobs, old.advantages, config.cliprange, mask=part.mask)
        errors = clipped_value(new.values, old.values, old.returns, config.cliprange_value, mask=part.mask)
        aggregate(surrogate + config.vf_coef * errors, part.mask, denominator=tokens).backward()
        slots = batch.mask.shape[1] - part.mask.shape[1]
        parts.append([pad(x.detach(), (0, slots)) for x in (new.logprobs, new.values, new.entropy)])
    return Seen(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _take_step(policy: ValueHeadLM, optimizer: torch.optim.Optimizer, ratio: float, config: PPOConfig) -> None:
    if ratio > config.ratio_threshold:
        warnings.warn(
            f"an optimizer step is left out: its mean ratio {ratio:.2f} exceeds ratio_threshold "
            f"{config.ratio_threshold}",
            stacklevel=4,
        )
    else:
        if config.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_([p for p in policy.parameters() if p.requires_grad], config.max_grad_norm)
        optimizer.step()
    policy.zero_grad()


@torch.no_grad()
def describe(seen: Seen, old: Targets, mask: Tensor, config: PPOConfig) -> StepStats:
    """TRL's numbers about one optimizer step, over the tokens that count.

    Args:
        seen: What the forwards gave.
        old: What was recorded, of the same rows.
        mask: `[b, T]` bool.
        config: Clips and coefficients.
    """
    surrogate = clipped_surrogate(seen.logprobs, old.logprobs, old.advantages, config.cliprange, mask=mask)
    errors = clipped_value(seen.values, old.values, old.returns, config.cliprange_value, mask=mask)
    policy_loss, value_loss = masked_mean(surrogate, mask), masked_mean(errors, mask)
    moved = seen.logprobs - old.logprobs
    ratios = importance_ratios(seen.logprobs, old.logprobs, mask=mask)
    scalars = {
        "loss/policy": policy_loss,
        "loss/value": value_loss,
        "loss/total": policy_loss + config.vf_coef * value_loss,
        "policy/entropy": masked_mean(seen.entropy, mask),
        "policy/approxkl": 0.5 * masked_mean(moved**2, mask),
        "policy/policykl": masked_mean(-moved, mask),
        "policy/clipfrac": clip_fraction(seen.logprobs, old.logprobs, old.advantages, config.cliprange, mask),
        "policy/advantages_mean": masked_mean(old.advantages, mask),
        "returns/mean": masked_mean(old.returns, mask),
        "returns/var": masked_var(old.returns, mask),
        "val/vpred": masked_mean(seen.values, mask),
        "val/error": masked_mean((seen.values - old.returns) ** 2, mask),
        "val/clipfrac": value_clip_fraction(seen.values, old.values, old.returns, config.cliprange_value, mask),
        "val/mean": masked_mean(old.values, mask),
        "val/var": masked_var(old.values, mask),
    }
    numbers = {name: float(value) for name, value in scalars.items()}
    return StepStats(numbers, old.advantages[mask].cpu().numpy(), ratios[mask].cpu().numpy())


def summary(told: Sequence[StepStats]) -> dict[str, float | np.ndarray]:
    """Means over the optimizer steps under `ppo/`, and every token's advantage and ratio, one after the other."""
    stats: dict[str, float | np.ndarray] = {
        f"ppo/{name}": float(np.mean([step.scalars[name] for step in told])) for name in told[0].scalars
    }
    stats["ppo/policy/advantages"] = np.concatenate([step.advantages for step in told])
    stats["ppo/policy/ratio"] = np.concatenate([step.ratios for step in told])
    error, spread = stats["ppo/val/error"], stats["ppo/returns/var"]
    stats["ppo/val/var_explained"] = 1 - error / spread if spread > 0 else 0.0  # type: ignore[operator]
    return stats


def objective(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    kl: Tensor,
    non_score: Tensor,
    scores: Tensor,
    kl_coef: float,
    batch: Batch,
) -> dict[str, float | np.ndarray]:
    """TRL's numbers about the responses themselves.

    Args:
        logprobs: log π_old, `[B, T]`.
        ref_logprobs: log π_ref, `[B, T]`.
        kl: What was charged for, before β, `[B, T]`.
        non_score: The charge, `[B, T]`.
        scores: `[B]`, as they were learnt from.
        kl_coef: β.
        batch: The responses.
    """
    mask = batch.mask
    sequence_kl = torch.where(mask, kl, 0.0).sum(1)
    stats: dict[str, float | np.ndarray] = {
        "objective/kl": float(sequence_kl.mean()),
        "objective/kl_dist": sequence_kl.cpu().numpy(),
        "objective/logprobs": logprobs.cpu().numpy(),
        "objective/ref_logprobs": ref_logprobs.cpu().numpy(),
        "objective/kl_coef": kl_coef,
        "objective/entropy": float(torch.where(mask, -logprobs, 0.0).sum(1).mean()),
        "ppo/mean_non_score_reward": float(masked_mean(non_score, mask)),
        "ppo/mean_scores": float(scores.mean()),
        "ppo/std_scores": _std(scores),
    }
    for name, lengths in (("queries", batch.prompt_lengths), ("responses", batch.response_lengths)):
        stats[f"tokens/{name}_len_mean"] = float(lengths.float().mean())
        stats[f"tokens/{name}_len_std"] = _std(lengths.float())
        stats[f"tokens/{name}_dist"] = lengths.float().cpu().numpy()
    return stats


def _std(x: Tensor) -> float:
    """Unbiased; 0 for one number."""
    return float(x.std()) if len(x) > 1 else 0.0


def warn_of_negative_kl(kl: np.ndarray) -> None:
    """Warn of a KL below 0 by more than chance: then the responses were drawn from another law than the model's."""
    if len(kl) < 2:
        return
    mean, error = float(kl.mean()), float(kl.std(ddof=1)) / math.sqrt(len(kl))
    if mean < min(-1.0, -3 * error):
        warnings.warn(
            f"the KL of the responses is {mean:.2f} ± {error:.2f} nats, below 0 by "
            "more than chance: they were drawn from another law than the model's (top-k, temperature, greedy search?)",
            stacklevel=3,
        )
