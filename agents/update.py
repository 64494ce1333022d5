"""One PPO update as functions: targets, minibatches, an optimizer step, the loss of a microbatch, its statistics."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from agents.config import PPOConfig
from agents.diagnostics import approx_kl, clip_fraction, ratio_stats, value_clip_fraction
from agents.losses import aggregate, clipped_surrogate, clipped_value
from agents.masked import masked_sum, whiten
from agents.policy import Evaluation, ValueHeadLM
from agents.returns import masked_gae
from agents.rollout import Rollout


class Targets(NamedTuple):
    """What a rollout is learnt towards, `[B, T]` each."""

    advantages: Tensor
    """Â, whitened if the config says so."""
    returns: Tensor
    """R = Â + V before whitening, in reward units."""


def targets(rollout: Rollout, config: PPOConfig) -> Targets:
    """Advantages and returns of a rollout."""
    rewards = rollout.rewards
    if config.whiten_rewards:
        rewards = whiten(rewards, rollout.mask, shift_mean=False)
    estimates = masked_gae(
        rewards,
        rollout.values,
        rollout.mask,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        truncated=rollout.truncated,
        bootstrap_values=rollout.bootstrap_values,
    )
    advantages = estimates.advantages
    if config.whiten_advantages:
        advantages = whiten(advantages, rollout.mask)
    return Targets(advantages, estimates.returns)


def minibatches(episodes: int, config: PPOConfig, seed: int) -> Iterator[Tensor]:
    """Row indices of each optimizer step, reshuffled every epoch.

    >>> [rows.tolist() for rows in minibatches(3, PPOConfig(epochs=1, minibatches=2), seed=0)]
    [[2, 0], [1]]
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(config.epochs):
        yield from torch.randperm(episodes, generator=generator).tensor_split(min(config.minibatches, episodes))


def optimizer_step(
    policy: ValueHeadLM,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    target: Targets,
    config: PPOConfig,
    *,
    temperature: float,
    critic_only: bool = False,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, float] | None:
    """One optimizer step on a minibatch, its gradient summed over microbatches.

    Args:
        policy: Learns.
        optimizer: Its optimizer.
        rollout: The episodes of the minibatch.
        target: Theirs.
        config: Of the loss, the microbatches and the clip of the gradient.
        temperature: That of sampling.
        critic_only: As in `microbatch_loss`.
        autocast: Makes the context of each forward.

    Returns:
        Sums over the tokens under the metrics' names; None, and no step, if the policy has moved too far already.

    Raises:
        ValueError: If a loss or a gradient is not finite; no step is taken.
    """
    tokens = int(rollout.mask.sum())
    sums: defaultdict[str, float] = defaultdict(float)
    optimizer.zero_grad(set_to_none=True)
    for rows in torch.arange(len(rollout.ids), device=rollout.ids.device).split(config.forward_episodes):
        part = rollout.select(rows)
        with autocast():
            loss, found = microbatch_loss(
                policy,
                part,
                Targets(*(t[rows, : part.mask.shape[1]] for t in target)),
                config,
                tokens=tokens,
                temperature=temperature,
                critic_only=critic_only,
            )
        loss.backward()
        for name, value in found.items():
            sums[name] += float(value)
    if config.max_update_kl is not None and sums["kl/update"] / tokens > config.max_update_kl:
        return None
    sums["grad_norm/policy"] = tokens * _clip(policy.policy_parameters(), config.max_grad_norm)
    sums["grad_norm/critic"] = tokens * _clip(policy.critic_parameters(), config.max_grad_norm)
    if not all(math.isfinite(value) for value in sums.values()):
        wrong = ", ".join(name for name, value in sums.items() if not math.isfinite(value))
        raise ValueError(
            f"rollout: expected finite losses and gradients, got NaN or infinity in {wrong}; no step was taken"
        )
    optimizer.step()
    return {**sums, "tokens": tokens, "steps": 1}


def microbatch_loss(
    policy: ValueHeadLM,
    rollout: Rollout,
    target: Targets,
    config: PPOConfig,
    *,
    tokens: int,
    temperature: float,
    critic_only: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = L_clip + value_coef·L_V − entropy_coef·H, a token mean over the whole minibatch.

    Args:
        policy: Evaluated at its present weights.
        rollout: The episodes of the microbatch.
        target: Theirs.
        config: Of the loss.
        tokens: Tokens of the *minibatch*: losses of its microbatches add up to the minibatch's.
        temperature: That of sampling.
        critic_only: Whether only the critic learns; a shared trunk then gets no gradient.

    Returns:
        The loss, and sums over the microbatch's tokens under the metrics' names.
    """
    mask, head = rollout.mask, policy.value_head
    now = policy.evaluate(
        rollout.ids,
        rollout.prompt_lengths,
        rollout.response_lengths,
        temperature=temperature,
        with_entropy=config.entropy_coef != 0,
        trunk_value_coef=0.0 if critic_only else config.trunk_value_coef,
    )
    old_values, returns = head.normalize(rollout.values), head.normalize(target.returns)
    value_loss = clipped_value(now.normalized_values, old_values, returns, config.value_clip_eps, mask=mask)
    policy_loss = clipped_surrogate(
        now.logprobs,
        rollout.old_logprobs,
        target.advantages,
        config.clip_eps,
        clip_eps_high=config.clip_eps_high,
        dual_clip=config.dual_clip,
        mask=mask,
    )
    loss = config.value_coef * aggregate(value_loss, mask, "token", tokens)
    if not critic_only:
        loss = loss + aggregate(policy_loss - config.entropy_coef * now.entropy, mask, "token", tokens)
    sums = {"loss/policy": masked_sum(policy_loss.detach(), mask), "loss/value": masked_sum(value_loss.detach(), mask)}
    sums |= _ratio_sums(now, rollout, target, config)
    if config.value_clip_eps is not None:
        fraction = value_clip_fraction(now.normalized_values, old_values, returns, config.value_clip_eps, mask)
        sums["clip/value"] = fraction * mask.sum()
    return loss, sums


@torch.no_grad()
def _ratio_sums(now: Evaluation, rollout: Rollout, target: Targets, config: PPOConfig) -> dict[str, Tensor]:
    """How far the policy has moved, summed over tokens."""
    new, old, mask = now.logprobs, rollout.old_logprobs, rollout.mask
    clipped = clip_fraction(new, old, target.advantages, config.clip_eps, mask, clip_eps_high=config.clip_eps_high)
    means = {
        "ratio/mean": ratio_stats(new, old, mask).mean,
        "kl/update": approx_kl(new, old, mask),
        "clip/policy": clipped,
    }
    return {name: mean * mask.sum() for name, mean in means.items()}


def _clip(parameters: Iterator[torch.nn.Parameter], max_norm: float | None) -> float:
    """The norm of a gradient, which is scaled to `max_norm` where it is larger."""
    learning = [p for p in parameters if p.grad is not None]
    if not learning:
        return 0.0
    return float(torch.nn.utils.clip_grad_norm_(learning, float("inf") if max_norm is None else max_norm))
