"""From queries, responses and scores to rewards and advantages: the data of one `PPOTrainer.step`.

Shapes: B responses, T tokens of the longest. Slot t of a row is its t-th response token. Every row starts at position 0
and is padded on the right, whatever side the tokenizer pads on, and masks come from lengths: no padding id is special.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.adapters.trl_compat.config import KLPenalty, PPOConfig
from agents.kl import exact, k1, k2
from agents.masked import same_shape
from agents.policy import Evaluation, ValueHeadLM
from textenv.dynamics import last_slots
from textenv.logprobs import MAX_CHUNK_ELEMENTS
from textenv.models import Shared, context_length, hidden_states, logit_width, output_head, unwrap


@dataclass(frozen=True)
class Batch:
    """Queries and responses of one step."""

    ids: Tensor
    """`[B, L]`: query, then response, right-padded with 0."""
    prompt_lengths: Tensor
    """`[B]`."""
    response_lengths: Tensor
    """`[B]`."""
    mask: Tensor
    """`[B, T]` bool: response tokens that are learnt from."""

    def __len__(self) -> int:
        """B."""
        return len(self.ids)

    def rows(self, index: Tensor) -> Batch:
        """Some of the rows, with their own T."""
        responses = self.response_lengths[index]
        return Batch(self.ids[index], self.prompt_lengths[index], responses, self.mask[index, : int(responses.max())])


def checked_scores(queries: Any, responses: Any, scores: Any, response_masks: Any, batch_size: int) -> Tensor:
    """The scores as `[B]` float32, once the four lists are checked.

    Raises:
        ValueError: Naming the list, what was expected and what came.
    """
    if isinstance(scores, Tensor):
        if scores.ndim != 1 or not scores.is_floating_point():
            kind = f"shape {tuple(scores.shape)} of {scores.dtype}"
            raise ValueError(f"scores: expected list(scores), or a tensor of floats of shape [batch_size], got {kind}")
        scores = list(scores)
    lists = {"queries": queries, "responses": responses, "scores": scores}
    if response_masks is not None:
        lists["response_masks"] = response_masks
    for name, items in lists.items():
        if not isinstance(items, list) or len(items) != batch_size:
            got = f"{len(items)} of them" if isinstance(items, list) else type(items).__name__
            raise ValueError(f"{name}: expected a list of batch_size={batch_size} tensors, got {got}")
        for row, item in enumerate(items):
            if not isinstance(item, Tensor) and not (name == "scores" and isinstance(item, int | float)):
                raise ValueError(f"{name}[{row}]: expected a tensor, got {type(item).__name__}")
            if name == "scores" and (torch.as_tensor(item).numel() != 1 or not math.isfinite(float(item))):
                raise ValueError(f"scores[{row}]: expected one finite number, got {item!r}")
    return torch.tensor([float(score) for score in scores])


def pack(
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    response_masks: Sequence[Tensor] | None,
    device: torch.device,
) -> Batch:
    """Lay queries and responses out in rows.

    Args:
        queries: Token ids, each `[l]`, at least one.
        responses: Token ids, each `[n]`, at least one.
        response_masks: Which tokens of each response count, each `[n]`; None: all.
        device: Where the rows go.

    Raises:
        ValueError: Naming the argument and the row, if a shape is another, or a row has no token to learn from.

    >>> batch = pack([torch.tensor([5])], [torch.tensor([6, 7])], None, torch.device("cpu"))
    >>> batch.ids, batch.mask
    (tensor([[5, 6, 7]]), tensor([[True, True]]))
    """
    for name, tensors in (("queries", queries), ("responses", responses)):
        for row, tensor in enumerate(tensors):
            if tensor.ndim != 1 or len(tensor) == 0 or tensor.is_floating_point():
                kind = f"{tuple(tensor.shape)} of {tensor.dtype}"
                raise ValueError(f"{name}[{row}]: expected token ids of shape [n], at least one, got {kind}")
    prompt_lengths = torch.tensor([len(query) for query in queries])
    response_lengths = torch.tensor([len(response) for response in responses])
    ids = torch.zeros(len(queries), int((prompt_lengths + response_lengths).max()), dtype=torch.long)
    mask = torch.zeros(len(queries), int(response_lengths.max()), dtype=torch.bool)
    for row, (query, response) in enumerate(zip(queries, responses, strict=True)):
        ids[row, : len(query) + len(response)] = torch.cat([query.cpu(), response.cpu()])
        counts = torch.ones(len(response)) if response_masks is None else response_masks[row].cpu()
        if counts.shape != response.shape or not counts.any():
            raise ValueError(
                f"response_masks[{row}]: expected shape {tuple(response.shape)} with a token that counts, "
                f"got {tuple(counts.shape)} with {int(counts.count_nonzero())}"
            )
        mask[row, : len(response)] = counts != 0
    return Batch(ids.to(device), prompt_lengths.to(device), response_lengths.to(device), mask.to(device))


def check_context(model: Any, batch: Batch) -> None:
    """Raise unless every row is within the model's context; a GPT-2 has no positions beyond it.

    Raises:
        ValueError: Naming the longest row.
    """
    context, longest = context_length(unwrap(model).config), batch.ids.shape[1]
    if context is not None and longest > context:
        row = int((batch.prompt_lengths + batch.response_lengths).argmax())
        raise ValueError(
            f"responses[{row}]: expected query and response within the model's context of {context}, got {longest}"
        )


def evaluate(policy: ValueHeadLM, batch: Batch, *, with_entropy: bool = False) -> Evaluation:
    """Log-probs at temperature 1, values and entropies of a batch's responses."""
    return policy.evaluate(
        batch.ids, batch.prompt_lengths, batch.response_lengths, temperature=1.0, with_entropy=with_entropy
    )


@torch.no_grad()
def recorded(policy: ValueHeadLM, batch: Batch, size: int) -> tuple[Tensor, Tensor]:
    """The recorded log π_old and V_old, each `[B, T]`, in forwards of `size` rows."""
    logprobs = torch.zeros_like(batch.mask, dtype=torch.float32)
    values = torch.zeros_like(logprobs)
    for rows in torch.arange(len(batch), device=batch.ids.device).split(size):
        part = evaluate(policy, batch.rows(rows))
        width = part.logprobs.shape[1]
        logprobs[rows, :width], values[rows, :width] = part.logprobs, part.values
    return logprobs, values


@torch.no_grad()
def exact_kl(lm: Any, reference: Shared, batch: Batch, size: int) -> Tensor:
    """KL(π(·|s_t)‖π_ref(·|s_t)) of each state, `[B, T]`, in forwards of `size` rows and bounded pieces of logits."""
    result = torch.zeros_like(batch.mask, dtype=torch.float32)
    chunk = max(1, MAX_CHUNK_ELEMENTS // logit_width(lm))
    for rows in torch.arange(len(batch), device=batch.ids.device).split(size):
        part = batch.rows(rows)
        row, slot = part.mask.nonzero(as_tuple=True)
        before = part.prompt_lengths[row] - 1 + slot
        ours, theirs = (hidden_states(model, part.ids)[row, before] for model in (lm, reference))
        pieces = []
        for h, h_ref in zip(ours.split(chunk), theirs.split(chunk), strict=True):
            logits = output_head(lm)(h)
            with reference.scope():
                ref_logits = output_head(reference)(h_ref)
            pieces.append(exact(logits, ref_logits))
        result[rows[row], slot] = torch.cat(pieces)
    return result


def token_kl(kind: KLPenalty, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """What a token is charged for, before β: k1, |k1| or k2 of log π and log π_ref, each `[B, T]`.

    Raises:
        ValueError: For "full", which needs more than the log-probs of the tokens: `exact_kl`.

    >>> token_kl("abs", torch.tensor([[-3.0]]), torch.tensor([[-1.0]]), torch.tensor([[True]]))
    tensor([[2.]])
    """
    if kind == "kl":
        return k1(logprobs, ref_logprobs, mask=mask)
    if kind == "abs":
        return k1(logprobs, ref_logprobs, mask=mask).abs()
    if kind == "mse":
        return k2(logprobs, ref_logprobs, mask=mask)
    raise ValueError(f'kind: expected "kl", "abs" or "mse", got {kind!r}')


def charged_kl(
    lm: Any, reference: Shared, batch: Batch, logprobs: Tensor, ref_logprobs: Tensor, config: PPOConfig
) -> Tensor:
    """What each token is charged for, before β, `[B, T]`, of the kind that `kl_penalty` names.

    Args:
        lm: π.
        reference: π_ref.
        batch: The responses.
        logprobs: log π of their tokens, `[B, T]`.
        ref_logprobs: log π_ref, `[B, T]`.
        config: `kl_penalty` and `mini_batch_size`.
    """
    if config.kl_penalty == "full":
        assert config.mini_batch_size is not None
        return exact_kl(lm, reference, batch, config.mini_batch_size)
    return token_kl(config.kl_penalty, logprobs, ref_logprobs, batch.mask)


def token_rewards(scores: Tensor, kl: Tensor, kl_coef: float, mask: Tensor) -> tuple[Tensor, Tensor]:
    """r_t = score·[t is the last that counts] − β·kl_t, and its part without the score.

    Args:
        scores: `[B]`.
        kl: `[B, T]`.
        kl_coef: β.
        mask: `[B, T]` bool.

    Returns:
        Rewards and non-score rewards, each `[B, T]`.

    Raises:
        ValueError: If shapes differ.

    >>> token_rewards(torch.tensor([1.0]), torch.tensor([[1.0, 2.0]]), 0.5, torch.tensor([[True, True]]))[0]
    tensor([[-0.5000,  0.0000]])
    """
    same_shape(kl=kl, mask=mask)
    same_shape(**{"mask[:, 0]": mask[:, 0], "scores": scores})
    non_score = torch.where(mask, -kl_coef * kl, torch.zeros_like(kl))
    return non_score + torch.where(last_slots(mask), scores[:, None], torch.zeros_like(kl)), non_score


class RunningScores:
    """Mean and unbiased standard deviation of all scores so far (Chan et al. 1979, pairwise update, in float64)."""

    def __init__(self) -> None:
        """Know nothing."""
        self.count, self.mean, self._squares = 0, 0.0, 0.0

    @property
    def std(self) -> float:
        """The standard deviation; 0 while there are no two scores."""
        return math.sqrt(self._squares / (self.count - 1)) if self.count > 1 else 0.0

    def update(self, scores: Tensor) -> None:
        """Take more scores `[B]` in."""
        new, count = scores.double(), len(scores)
        mean, total = float(new.mean()), self.count + count
        shift = mean - self.mean
        self._squares += float(((new - mean) ** 2).sum()) + shift**2 * self.count * count / total
        self.mean += shift * count / total
        self.count = total

    def scale(self, scores: Tensor, *, center: bool) -> Tensor:
        """Divide by the deviation, without an ε; where it is 0 there is no scale, and nothing is divided.

        >>> running = RunningScores()
        >>> running.update(torch.tensor([1.0, 3.0, 5.0]))
        >>> running.scale(torch.tensor([5.0]), center=True)
        tensor([1.])
        """
        return (scores - (self.mean if center else 0.0)) / (self.std or 1.0)


def learnt_scores(scores: Tensor, running: RunningScores, config: PPOConfig) -> Tensor:
    """Scores `[B]` as they are learnt from: scaled by the moments of all so far, these among them, then clipped."""
    if config.use_score_scaling:
        running.update(scores)
        scores = running.scale(scores, center=config.use_score_norm)
    return scores if config.score_clip is None else scores.clamp(-config.score_clip, config.score_clip)
