"""Rollouts: what a batch of episodes was, and how one is collected."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from agents.config import TrainConfig
from agents.masked import whiten
from agents.policy import Evaluation, ValueHeadLM
from agents.returns import discounted_returns
from agents.sampling.base import Sampler, Samples
from agents.sampling.sync import Fingerprint
from agents.value_head import ValueHead
from agents.value_scale import first_value_scale
from textenv import kl
from textenv.replay import replay
from textenv.rewards.base import Scores
from textenv.task import Task
from textenv.types import ReplayRecord


@dataclass(frozen=True)
class Rollout:
    """B episodes; T the longest response, L the longest prompt + response. `[B, T]` tensors are 0 outside of `mask`.

    Recorded at sampling time, all of it: nothing here depends on the weights that learn from it.
    """

    ids: Tensor
    """`[B, L]` int64: prompt, then response, right-padded."""
    prompt_lengths: Tensor
    """`[B]` int64."""
    response_lengths: Tensor
    """`[B]` int64."""
    mask: Tensor
    """`[B, T]` bool: true where a sampled token counts."""
    rewards: Tensor
    """`[B, T]`: what is learnt from: score, KL and penalties."""
    old_logprobs: Tensor
    """`[B, T]`: log π of the trainer's own forward, before the update; or the sampler's, taken for it."""
    behavior_logprobs: Tensor
    """`[B, T]`: log π as the sampler had it."""
    ref_logprobs: Tensor
    """`[B, T]`: log π_ref; zeros without a reference."""
    entropy: Tensor
    """`[B, T]`: entropy of π(·|s_t); under `old_logprobs="sampler"` −log π(a_t|s_t), of which it is the mean."""
    values: Tensor
    """`[B, T]`: V(s_t), in reward units; zeros without a critic."""
    bootstrap_values: Tensor
    """`[B]`: V after the last token; read where `truncated`."""
    scores: Tensor
    """`[B]`: what the reward function gave."""
    scored: Tensor
    """`[B]` bool: whether it was paid."""
    truncated: Tensor
    """`[B]` bool."""
    finish_reasons: Tensor
    """`[B]` int8 of `FinishReason`."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall-clock time of `sample`, `evaluate` and `reward`."""
    groups: Tensor | None = None
    """`[B]` int64: episodes of one number answer one prompt; None: each is alone."""
    greedy: Tensor | None = None
    """`[B]`: what the greedy response to the same prompt was paid, without its KL; None if it was not asked for."""
    task_rewards: Tensor | None = None
    """`[B, T]`: `rewards` before any KL: score and penalties; None: `rewards` hold no KL."""
    fingerprint: Fingerprint | None = None
    """Of the weights that the sampler says that it drew from; None: it says nothing."""
    memory: Mapping[str, float] = field(default_factory=dict)
    """What the estimator remembers of earlier updates; the agent fills it in."""
    trainer_logprobs: Tensor | None = None
    """`[B, T]`: log π of the trainer's own forward, to hold the sampler against; None: it was spared."""
    score_parts: Mapping[str, Tensor] = field(default_factory=dict)
    """`[B]` each: what the reward function says that the scores were made of."""

    @property
    def kl(self) -> Tensor:
        """`[B, T]`: k_t = log π(a_t|s_t) − log π_ref(a_t|s_t); log π alone, and no KL, without a reference."""
        return torch.where(self.mask, self.old_logprobs - self.ref_logprobs, torch.zeros_like(self.rewards))

    @property
    def paid(self) -> Scores:
        """Scores and parts of the episodes that were scored, float64: what the reward's `update` is told."""
        total, *parts = (
            scores[self.scored].double().cpu().numpy() for scores in (self.scores, *self.score_parts.values())
        )
        return Scores(total, dict(zip(self.score_parts, parts, strict=True)))

    def select(self, rows: Tensor) -> Rollout:
        """Some of the episodes, without the padding that they do not need."""
        whole = {f.name: getattr(self, f.name) for f in fields(self)}
        parts = {name: value[rows] for name, value in whole.items() if isinstance(value, Tensor)}
        steps = int(parts["response_lengths"].max())
        columns = int((parts["prompt_lengths"] + parts["response_lengths"]).max())
        for name, tensor in parts.items():
            if tensor.ndim == 2:
                parts[name] = tensor[:, : columns if name == "ids" else steps]
        return replace(self, **parts, score_parts={name: part[rows] for name, part in self.score_parts.items()})


def sample_responses(
    sampler: Sampler, task: Task, prompts: Sequence[Sequence[int]], seed: int, *, greedy: bool = False
) -> Samples:
    """One response a prompt, at the environment's temperature, stop tokens and length; or the most likely tokens."""
    return sampler.sample(
        prompts,
        max_new_tokens=task.options.max_new_tokens,
        stop_token_ids=task.stop_token_ids,
        temperature=task.options.temperature,
        seed=seed,
        greedy=greedy,
    )


@torch.no_grad()
def collect(
    policy: ValueHeadLM,
    task: Task,
    sampler: Sampler,
    prompts: Sequence[Sequence[int]],
    config: TrainConfig,
    *,
    seed: int,
    compare: bool = True,
    group_size: int = 1,
    with_values: bool = True,
    with_greedy: bool = False,
    charge_kl: bool = True,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Rollout:
    """Sample the episodes of each prompt and record all that learning needs.

    Args:
        policy: Its log-probs and values are recorded.
        task: The environment's; pays the rewards.
        sampler: Draws the responses from the same weights.
        prompts: As token ids; B is their number times `group_size`.
        config: Of these settings, those of forwards and rewards act.
        seed: Of the samples.
        compare: Whether the trainer's log-probs are computed, too, where the sampler's are taken; they always are of
            a sampler that does not say which weights it drew from.
        group_size: Responses to each prompt, side by side.
        with_values: Whether there is a critic to ask.
        with_greedy: Whether each prompt's greedy response is sampled and scored too.
        charge_kl: Whether the rewards are charged; False where a loss is.
        autocast: Makes the context of each forward, the reference's too, so that both round alike; not the reward's.

    Raises:
        ValueError: If there are no prompts, or as `sample` and `replay`.
    """
    if not len(prompts):
        raise ValueError("prompts: expected at least one, got none")
    each, prompts = prompts, [prompt for prompt in prompts for _ in range(group_size)]
    start = time.perf_counter()
    with autocast():
        samples = sample_responses(sampler, task, prompts, seed)
        greedy = sample_responses(sampler, task, each, 0, greedy=True) if with_greedy else None
    sampled = time.perf_counter()
    ids, starts, lengths, behavior = _padded(prompts, samples, task.device)
    with_logprobs = compare or config.old_logprobs == "forward" or samples.fingerprint is None
    with autocast():
        old = _evaluate(policy, task, ids, starts, lengths, config, with_values, with_logprobs)
    own = old.logprobs if with_logprobs else None
    if config.old_logprobs == "sampler":
        old = old._replace(logprobs=behavior, entropy=-behavior)
    evaluated = time.perf_counter()
    record = replay(task, prompts, samples.responses, old.logprobs, reference_scope=autocast)
    rewards = _rewards(task, record, config.score_clip, old.logprobs if charge_kl else None)
    if with_values and policy.value_head.value_count == 0:
        old = _with_first_values(policy.value_head, old, rewards, record.mask, config)
    rewarded = time.perf_counter()
    return Rollout(
        ids=record.ids,
        prompt_lengths=starts,
        response_lengths=lengths,
        mask=record.mask,
        rewards=rewards,
        old_logprobs=old.logprobs,
        behavior_logprobs=behavior,
        ref_logprobs=record.ref_logprobs,
        entropy=old.entropy,
        values=old.values,
        bootstrap_values=old.bootstrap_values,
        scores=record.scores,
        scored=record.scored,
        truncated=record.truncated,
        finish_reasons=record.finish_reasons,
        seconds={"sample": sampled - start, "evaluate": evaluated - sampled, "reward": rewarded - evaluated},
        groups=torch.arange(len(prompts), device=task.device) // group_size,
        greedy=None if greedy is None else _greedy_returns(task, prompts, greedy, config.score_clip, group_size),
        task_rewards=_without_kl(record, config.score_clip),
        fingerprint=samples.fingerprint,
        trainer_logprobs=own,
        score_parts=record.score_parts,
    )


def _padded(
    prompts: Sequence[Sequence[int]], samples: Samples, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids `[B, L]`, lengths of prompts and of responses `[B]`, and the sampler's log-probs `[B, T]`."""
    rows = [torch.tensor([*p, *r]) for p, r in zip(prompts, samples.responses, strict=True)]
    behavior = [torch.tensor(row) for row in samples.logprobs]
    return (
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device),
        torch.tensor([len(prompt) for prompt in prompts], device=device),
        torch.tensor([len(response) for response in samples.responses], device=device),
        torch.nn.utils.rnn.pad_sequence(behavior, batch_first=True).to(device),
    )


def _with_first_values(
    head: ValueHead, old: Evaluation, rewards: Tensor, mask: Tensor, config: TrainConfig
) -> Evaluation:
    """What a critic that has no scale yet foresees: the first returns set it."""
    learnt = whiten(rewards, mask, shift_mean=False) if config.whiten_rewards else rewards
    if not first_value_scale(head, discounted_returns(learnt, config.gamma), mask):
        return old
    # A new critic foresees the mean of the first returns, from these episodes on.
    mean = head.value_mean.float()
    return old._replace(values=torch.where(mask, mean, 0.0), bootstrap_values=mean.expand_as(old.bootstrap_values))


def _without_kl(record: ReplayRecord, score_clip: float | None) -> Tensor:
    """Score and penalties, whoever charges the KL: added up, because taking the KL away again would round."""
    return _paid(record, score_clip) + record.reward_parts["missing_eos"]


def _paid(record: ReplayRecord, score_clip: float | None) -> Tensor:
    paid = record.reward_parts["score"]
    return paid if score_clip is None else paid.clamp(-score_clip, score_clip)


def _rewards(task: Task, record: ReplayRecord, score_clip: float | None, logprobs: Tensor | None) -> Tensor:
    """The environment's, the scores in them clipped, with the KL charged exactly once; None: a loss charges it."""
    rewards = record.rewards
    if score_clip is not None:
        rewards = rewards - record.reward_parts["score"] + _paid(record, score_clip)
    if logprobs is None:
        return rewards
    return kl.charge(
        rewards,
        logprobs,
        record.ref_logprobs,
        record.mask,
        kl_coef=task.kl_coef,
        kl_source=task.kl_source,
        kl_credit=task.options.kl_credit,
    )


def _greedy_returns(
    task: Task, prompts: Sequence[Sequence[int]], samples: Samples, score_clip: float | None, group_size: int
) -> Tensor:
    """What the greedy response to each group's prompt was paid, `[B]`: score and penalties, whoever charges the KL."""
    record = replay(task, prompts[::group_size], samples.responses)
    return _without_kl(record, score_clip).sum(1).repeat_interleave(group_size)


def _evaluate(
    policy: ValueHeadLM,
    task: Task,
    ids: Tensor,
    starts: Tensor,
    lengths: Tensor,
    config: TrainConfig,
    with_values: bool,
    with_logprobs: bool,
) -> Evaluation:
    """`policy.evaluate` in microbatches."""
    parts = [
        policy.evaluate(
            ids[rows],
            starts[rows],
            lengths[rows],
            temperature=task.options.temperature,
            with_logprobs=with_logprobs,
            with_entropy=with_logprobs,
            with_values=with_values,
            with_bootstrap=with_values and task.options.length_end == "truncate",
        )
        for rows in torch.arange(len(ids), device=ids.device).split(config.forward_episodes)
    ]
    steps = int(lengths.max())

    def join(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([torch.nn.functional.pad(t, (0, steps - t.shape[1])) if t.ndim == 2 else t for t in tensors])

    return Evaluation(*(join(tensors) for tensors in zip(*parts, strict=True)))
