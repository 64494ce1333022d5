"""One update as functions: targets, minibatches, an optimizer step, the loss of a microbatch, its statistics."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from agents.algorithms.base import Algorithm, ClippedObjective, Targets, ValueLoss
from agents.config import TrainConfig
from agents.diagnostics import approx_kl, value_clip_fraction
from agents.losses import aggregate, clipped_value, importance_ratios
from agents.masked import masked_sum, same_shape, whiten
from agents.mismatch import correction_weights
from agents.policy import Evaluation, ValueHeadLM
from agents.rollout import Rollout


@dataclass(frozen=True)
class Step:
    """What all microbatches of an update have in common."""

    algorithm: Algorithm
    """Its objective, aggregation and critic are the loss."""
    config: TrainConfig
    """Of the entropy bonus, the microbatches and the clip of the gradient."""
    temperature: float
    """That of sampling."""
    max_new_tokens: int
    """The longest response there may be."""
    kl_coef: float = 0.0
    """β; read where the KL is a loss."""
    critic_only: bool = False
    """Whether only the critic learns; a shared trunk then gets no gradient."""


def targets(rollout: Rollout, algorithm: Algorithm, config: TrainConfig) -> Targets:
    """What the algorithm's estimator makes of a rollout.

    Raises:
        ValueError: If it gives advantages of another shape, no returns though there is a critic, or a memory that a
            checkpoint could not keep.
    """
    if config.whiten_rewards:
        rollout = replace(rollout, rewards=whiten(rollout.rewards, rollout.mask, shift_mean=False))
    found = algorithm.estimator(rollout, config.gamma)
    if not isinstance(found, Targets):
        raise ValueError(f"estimator: expected it to return Targets, got {type(found).__name__}")
    for name, value in found.memory.items():
        if not isinstance(name, str) or isinstance(value, bool) or not isinstance(value, int | float):
            got = f"{type(value).__name__} under {name!r}"
            raise ValueError(f"estimator: expected Targets with a memory of numbers by name, got {got}")
    same_shape(mask=rollout.mask, advantages=found.advantages)
    if algorithm.critic is not None:
        if found.returns is None:
            raise ValueError("estimator: expected Targets with returns, because the algorithm has a critic, got None")
        same_shape(mask=rollout.mask, returns=found.returns)
    return found


def minibatches(episodes: int, config: TrainConfig, seed: int) -> Iterator[Tensor]:
    """Row indices of each optimizer step, reshuffled every epoch.

    Ascending, so that episodes of one prompt, which a microbatch computes once, tend to be in one.

    >>> [rows.tolist() for rows in minibatches(3, TrainConfig(epochs=1, minibatches=2), seed=0)]
    [[0, 2], [1]]
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(config.epochs):
        shuffled = torch.randperm(episodes, generator=generator)
        yield from (rows.sort().values for rows in shuffled.tensor_split(min(config.minibatches, episodes)))


def optimizer_steps(
    policy: ValueHeadLM,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    target: Targets,
    batches: Iterable[Tensor],
    step: Step,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Mapping[str, float]:
    """One optimizer step on each of these rows, until the policy has moved too far; the sums of `optimizer_step`."""
    sums: defaultdict[str, float] = defaultdict(float)
    learning = {"policy": list(policy.policy_parameters())}
    if step.algorithm.critic is not None:
        learning["critic"] = list(policy.critic_parameters())
    for rows in batches:
        part = rollout.select(rows.to(rollout.ids.device))
        found = optimizer_step(policy, optimizer, part, target.select(rows), step, learning, autocast)
        if found is None:
            break
        for name, value in found.items():
            sums[name] += value
    return sums


def optimizer_step(
    policy: ValueHeadLM,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    target: Targets,
    step: Step,
    learning: Mapping[str, Sequence[torch.nn.Parameter]],
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, float] | None:
    """One optimizer step on a minibatch, its gradient summed over microbatches.

    Args:
        policy: Learns.
        optimizer: Its optimizer.
        rollout: The episodes of the minibatch.
        target: Theirs.
        step: The loss.
        learning: The parameters that learn, by name: the gradients of each are clipped together.
        autocast: Makes the context of each forward.

    Returns:
        Sums over the tokens under the metrics' names; None, and no step, if the policy has moved too far already.

    Raises:
        ValueError: If a loss or a gradient is not finite; no step is taken.
    """
    config, tokens = step.config, int(rollout.mask.sum())
    count = step.algorithm.aggregation.count(rollout.mask, step.max_new_tokens)
    found_sums: dict[str, Tensor] = {}
    optimizer.zero_grad(set_to_none=True)
    every = torch.arange(len(rollout.ids), device=rollout.ids.device)
    for rows in every.split(config.forward_episodes):
        part = rollout if len(rows) == len(every) else rollout.select(rows)
        with autocast():
            loss, found = microbatch_loss(
                policy, part, target.select(rows, part.mask.shape[1]), step, tokens=tokens, count=count
            )
        loss.backward()
        for name, value in found.items():
            found_sums[name] = found_sums.get(name, 0.0) + value.double()
    for name, parameters in learning.items():
        found_sums[f"grad_norm/{name}"] = tokens * _clip(parameters, config.max_grad_norm, policy.device)
    # All numbers at once: each reading waits for the device.
    sums = dict(zip(found_sums, torch.stack(list(found_sums.values())).tolist(), strict=True))
    if config.max_update_kl is not None and sums["kl/update"] / tokens > config.max_update_kl:
        return None
    if not all(math.isfinite(value) for value in sums.values()):
        wrong = ", ".join(name for name, value in sums.items() if not math.isfinite(value))
        raise ValueError(
            f"rollout: expected finite losses and gradients, got NaN or infinity in {wrong}; no step was taken"
        )
    optimizer.step()
    return {**sums, "tokens": tokens, "steps": 1}


def microbatch_loss(
    policy: ValueHeadLM, rollout: Rollout, target: Targets, step: Step, *, tokens: int, count: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = agg(w·(L_policy + β·L_KL) − entropy_coef·H) + coef·mean(L_V), each divided by counts of the whole minibatch.

    w are the weights of `agents.mismatch.correction_weights`.

    Args:
        policy: Evaluated at its present weights.
        rollout: The episodes of the microbatch.
        target: Theirs.
        step: The loss.
        tokens: Tokens of the *minibatch*: losses of its microbatches add up to the minibatch's.
        count: What the aggregation counts in the minibatch.

    Returns:
        The loss, and sums over the microbatch's tokens under the metrics' names.
    """
    mask, algorithm, config = rollout.mask, step.algorithm, step.config
    critic = algorithm.critic
    now = policy.evaluate(
        rollout.ids,
        rollout.prompt_lengths,
        rollout.response_lengths,
        temperature=step.temperature,
        with_entropy=config.entropy_coef != 0,
        with_values=critic is not None,
        trunk_value_coef=0.0 if critic is None or step.critic_only else critic.trunk_coef,
    )
    correction = correction_weights(
        rollout.old_logprobs,
        rollout.behavior_logprobs,
        mask,
        level=config.correction,
        cap=config.correction_cap,
        drop=config.correction_drop,
    )
    policy_loss = correction * algorithm.objective(now.logprobs, rollout, target.advantages)
    sums = {"loss/policy": masked_sum(policy_loss.detach(), mask)}
    losses = []
    if critic is not None:
        value_loss, found = _value_loss(policy, now, rollout, target, critic)
        losses.append(critic.coef * aggregate(value_loss, mask, "token", tokens))
        sums |= found
    if not step.critic_only:
        total = policy_loss - config.entropy_coef * now.entropy
        if algorithm.kl_loss is not None and step.kl_coef != 0:
            divergence = correction * algorithm.kl_loss(now.logprobs, rollout)
            sums["loss/kl"] = masked_sum(divergence.detach(), mask)
            total = total + step.kl_coef * divergence
        losses.append(algorithm.aggregation(total, mask, count))
    return sum(losses[1:], losses[0]), sums | _ratio_sums(now, rollout, target, algorithm)


def _value_loss(
    policy: ValueHeadLM, now: Evaluation, rollout: Rollout, target: Targets, critic: ValueLoss
) -> tuple[Tensor, dict[str, Tensor]]:
    """The critic's loss per token, in units of the returns' variance, and its sums."""
    mask, head = rollout.mask, policy.value_head
    assert target.returns is not None
    old_values, returns = head.normalize(rollout.values), head.normalize(target.returns)
    loss = clipped_value(now.normalized_values, old_values, returns, critic.clip_eps, mask=mask)
    sums = {"loss/value": masked_sum(loss.detach(), mask)}
    if critic.clip_eps is not None:
        fraction = value_clip_fraction(now.normalized_values, old_values, returns, critic.clip_eps, mask)
        sums["clip/value"] = fraction * mask.sum()
    return loss, sums


@torch.no_grad()
def _ratio_sums(now: Evaluation, rollout: Rollout, target: Targets, algorithm: Algorithm) -> dict[str, Tensor]:
    """How far the policy has moved, summed over tokens."""
    new, old, mask = now.logprobs, rollout.old_logprobs, rollout.mask
    sums = {
        "ratio/mean": masked_sum(importance_ratios(new, old, mask=mask), mask),
        "kl/update": approx_kl(new, old, mask) * mask.sum(),
    }
    if isinstance(algorithm.objective, ClippedObjective):
        sums["clip/policy"] = algorithm.objective.clip_fraction(new, rollout, target.advantages) * mask.sum()
    return sums


def _clip(parameters: Sequence[torch.nn.Parameter], max_norm: float | None, device: torch.device) -> Tensor:
    """The norm of a gradient, which is scaled to `max_norm` where it is larger."""
    moved = [p for p in parameters if p.grad is not None]
    if not moved:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.nn.utils.clip_grad_norm_(moved, float("inf") if max_norm is None else max_norm).double()
