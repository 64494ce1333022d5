"""Whole recorded responses through the MDP in one batched pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

import textenv.dynamics as dynamics
import textenv.kl as kl
from textenv.constraints.base import AllowedGrid
from textenv.prompts import Prompt
from textenv.task import Task
from textenv.types import FinishReason, ReplayRecord


@torch.no_grad()
def replay(
    task: Task,
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float]] | Tensor | None = None,
    *,
    aborted: Sequence[bool] | None = None,
    reference_scope: Callable[[], AbstractContextManager] = nullcontext,
) -> ReplayRecord:
    """What `step` would have paid for these responses, under the same `kl_source`.

    `agent`: the score part. `policy`: the full reward, from the given `logprobs` or by asking the live policy.
    `reference`: the score part + β·log π_ref.

    Args:
        task: The loaded task.
        prompts: B prompts, text or ids.
        responses: B responses as token ids, a stop token included.
        logprobs: log π of the response tokens, ragged or `[B, T]`; optional.
        aborted: `[B]`, true where something outside the MDP cut the response: unscored, truncated.
        reference_scope: Makes the context of the reference's forward: autocast, where π is computed under it.

    Returns:
        The record; `task` is as it was.

    Raises:
        ValueError: Naming the row, if a response is empty, goes on after its first stop token, is too long, holds an
            id outside the vocabulary or outside what the constraint allows, or ends before either end without being
            aborted.
    """
    if not len(prompts):
        raise ValueError("prompts: expected at least one, got none")
    prompt_ids = task.tokenize(prompts)
    if len(responses) != len(prompt_ids):
        raise ValueError(f"responses: expected {len(prompt_ids)}, one a prompt, got {len(responses)}")
    cut = [False] * len(responses) if aborted is None else [bool(flag) for flag in aborted]
    if len(cut) != len(responses):
        raise ValueError(f"aborted: expected {len(responses)} flags, one a response, got {len(cut)}")
    response_ids = [_check_response(task, row, response) for row, response in enumerate(responses)]
    device = task.device
    prompt_lengths = torch.tensor([len(p) for p in prompt_ids], device=device)
    response_lengths = torch.tensor([len(r) for r in response_ids], device=device)
    steps = torch.arange(int(response_lengths.max()), device=device)
    mask = steps < response_lengths[:, None]
    tokens = _pad(response_ids, 0, device)
    ids = _pad([p + r for p, r in zip(prompt_ids, response_ids, strict=True)], task.pad_token_id, device)
    reasons = _finish_reasons(task, tokens, mask, response_lengths, cut)
    allowed = None if task.constraint is None else task.constraint.grid(prompt_ids, response_ids)
    given = None if logprobs is None else _given_logprobs(logprobs, response_lengths, device)
    ref = torch.zeros(mask.shape, device=device)
    if task.reference is not None:
        with reference_scope():
            ref = task.reference.logprobs(ids, prompt_lengths, response_lengths, allowed)
        if task.kl_source == "policy" and given is None:
            given = _ask_policy(task, ids, prompt_lengths, response_lengths, allowed)
    terminated, truncated = dynamics.endings(reasons, length_end=task.options.length_end)
    paid, parts = _paid(task, prompt_ids, response_ids, terminated)
    last = steps == (response_lengths - 1)[:, None]
    penalty = -task.options.missing_eos_penalty * (last & (reasons == FinishReason.LENGTH)[:, None]).float()
    charges = kl.token_charges(given, ref, kl_coef=task.kl_coef, kl_source=task.kl_source)
    charges = kl.credit(charges, mask, task.options.kl_credit)
    return ReplayRecord(
        ids=ids,
        prompt_lengths=prompt_lengths,
        response_lengths=response_lengths,
        mask=mask,
        rewards=paid + charges + penalty,
        reward_parts={"score": paid, "kl": charges, "missing_eos": penalty, **parts},
        ref_logprobs=ref,
        logprobs=given,
        scores=torch.where(terminated, paid.sum(1), torch.zeros_like(paid[:, 0])),
        scored=terminated,
        finish_reasons=reasons,
        terminated=terminated,
        truncated=truncated,
    )


def _check_response(task: Task, row: int, response: Sequence[int]) -> list[int]:
    ids = response.tolist() if isinstance(response, Tensor | np.ndarray) else list(response)
    limit = task.options.max_new_tokens
    if not ids:
        raise ValueError(f"responses: expected at least one token, got an empty response in row {row}")
    if not all(isinstance(token, int | np.integer) and not isinstance(token, bool) for token in ids):
        raise ValueError(f"responses: expected integer ids, got {ids} in row {row}")
    if len(ids) > limit:
        raise ValueError(f"responses: expected at most max_new_tokens={limit} tokens, got {len(ids)} in row {row}")
    if min(ids) < 0 or max(ids) >= task.vocab_size:
        raise ValueError(f"responses: expected ids in [0, {task.vocab_size}), got {ids} in row {row}")
    return [int(token) for token in ids]


def _finish_reasons(task: Task, tokens: Tensor, mask: Tensor, lengths: Tensor, aborted: Sequence[bool]) -> Tensor:
    """Every token through the MDP's one ending rule; only the last of a row may end it, and must."""
    grid = dynamics.finish_reasons(
        tokens,
        torch.arange(1, tokens.shape[1] + 1, device=tokens.device).expand_as(tokens),
        stop_token_ids=task.stop_tensor,
        max_new_tokens=task.options.max_new_tokens,
    )
    ends = mask & (grid != FinishReason.NONE)
    early = ends & ~(torch.arange(tokens.shape[1], device=tokens.device) == (lengths - 1)[:, None])
    if early.any():
        row = int(early.any(1).nonzero()[0])
        place = int(early[row].nonzero()[0])
        raise ValueError(
            f"responses: expected the first stop token to be the last token, got {int(tokens[row, place])} at position "
            f"{place} of {int(lengths[row])} in row {row}"
        )
    reasons = grid.gather(1, (lengths - 1)[:, None])[:, 0]
    cut = torch.tensor(aborted, device=tokens.device)
    unfinished = (reasons == FinishReason.NONE) & ~cut
    if unfinished.any():
        row = int(unfinished.nonzero()[0])
        raise ValueError(
            f"responses: expected a stop token or max_new_tokens={task.options.max_new_tokens} tokens at the end, got "
            f"{int(lengths[row])} tokens without a stop in row {row}; aborted= marks responses that were cut"
        )
    return torch.where(cut, int(FinishReason.ABORTED), reasons).to(torch.int8)


def _given_logprobs(logprobs: Sequence[Sequence[float]] | Tensor, lengths: Tensor, device: torch.device) -> Tensor:
    expected = lengths.tolist()
    if isinstance(logprobs, Tensor):
        if tuple(logprobs.shape) != (len(expected), max(expected)):
            raise ValueError(f"logprobs: expected shape {(len(expected), max(expected))}, got {tuple(logprobs.shape)}")
        rows = [row[:length] for row, length in zip(logprobs.float(), expected, strict=True)]
    else:
        rows = [torch.as_tensor(row, dtype=torch.float32) for row in logprobs]
        if [len(row) for row in rows] != expected:
            raise ValueError(f"logprobs: expected one per response token, {expected}, got {[len(row) for row in rows]}")
    for row, values in enumerate(rows):
        if not torch.isfinite(values).all():
            raise ValueError(f"logprobs: expected finite numbers, got {values.tolist()} in row {row}")
    return torch.nn.utils.rnn.pad_sequence([row.to(device) for row in rows], batch_first=True)


def _ask_policy(
    task: Task, ids: Tensor, prompt_lengths: Tensor, response_lengths: Tensor, allowed: AllowedGrid | None
) -> Tensor:
    """The live policy speaks of one state at a time, so it is asked once per position, as in stepping."""
    result = torch.zeros(len(ids), int(response_lengths.max()), device=ids.device)
    for step in range(result.shape[1]):
        rows = (response_lengths > step).nonzero()[:, 0]
        lengths = prompt_lengths[rows] + step
        sets = None if allowed is None else allowed(rows, torch.full_like(rows, step))
        result[rows, step] = task.policy_logprobs(ids[rows], lengths, ids[rows, lengths], sets)
    return result


def _paid(
    task: Task, prompts: list[list[int]], responses: list[list[int]], scored: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the reward function pays each token, and its parts, `[B, T]` each."""
    paid = task.reward.pay(prompts, responses, scored.tolist())

    def grid(rows: Sequence[np.ndarray]) -> Tensor:
        tensors = [torch.tensor(row) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(task.device)

    return grid(paid.total), {name: grid(paid.parts[name]) for name in task.reward.names}


def _pad(rows: list[list[int]], value: int, device: torch.device) -> Tensor:
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value).to(device)
