"""One PPO update as functions: targets, the loss of a microbatch, and the statistics it leaves."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from agents.config import PPOConfig
from agents.diagnostics import approx_kl, clip_fraction, ratio_stats, value_clip_fraction
from agents.losses import aggregate, clipped_surrogate, clipped_value
from agents.masked import masked_sum, whiten
from agents.policy import ValueHeadLM
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
    with torch.no_grad():
        sums = {"loss/policy": masked_sum(policy_loss, mask), "loss/value": masked_sum(value_loss, mask)}
        count = mask.sum()
        logprobs, ratios = now.logprobs.detach(), ratio_stats(now.logprobs.detach(), rollout.old_logprobs, mask)
        sums["ratio/mean"] = ratios.mean * count
        sums["kl/update"] = approx_kl(logprobs, rollout.old_logprobs, mask) * count
        sums["clip/policy"] = count * clip_fraction(
            logprobs, rollout.old_logprobs, target.advantages, config.clip_eps, mask, clip_eps_high=config.clip_eps_high
        )
        if config.value_clip_eps is not None:
            values = now.normalized_values.detach()
            clipped = value_clip_fraction(values, old_values, returns, config.value_clip_eps, mask)
            sums["clip/value"] = clipped * count
    return loss, sums
