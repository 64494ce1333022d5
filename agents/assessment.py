"""What is measured on every response of a policy to held-out prompts; `agents.evaluation_metrics` sums it up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agents.evaluation import draw, kls_of, responses_of, texts_of
from agents.kl import exact
from agents.policy import ValueHeadLM
from agents.sampling import Sampler
from agents.slots import Slots
from textenv.logprobs import MAX_CHUNK_ELEMENTS, unpack
from textenv.models import Shared, backbone, output_head
from textenv.packing import packed_hidden
from textenv.prompts import Prompt

BATCH_ROWS = 64
"""Responses of one forward."""


@dataclass(frozen=True)
class Assessment:
    """n responses to each of P prompts. Every other list has P·n entries: those of prompt 0, then prompt 1."""

    name: str
    """What the policy is called."""
    per_prompt: int
    """n."""
    prompts: list[str]
    """P texts."""
    responses: list[str]
    """As text."""
    scores: list[float]
    """What the reward function gave, in fixed units."""
    second_scores: list[float] | None
    """What a reward gave that training never saw; None: there is none for single responses."""
    lengths: list[int]
    """Tokens of each response."""
    finish_reasons: list[int]
    """Of `FinishReason`."""
    kls: list[float]
    """Σ_t log π(a_t|s_t) − log π_ref(a_t|s_t), in nats."""
    exact_kls: list[float]
    """Σ_t KL(π(·|s_t)‖π_ref(·|s_t)) over the states that the response visits, in nats."""
    entropies: list[float]
    """Σ_t H(π(·|s_t)) over the same states, in nats."""
    ref_nlls: list[float]
    """−Σ_t log π_ref(a_t|s_t), in nats."""

    def __post_init__(self) -> None:
        """Check that everything has its n entries a prompt.

        Raises:
            ValueError: Naming the list that does not, or if there is nothing.
        """
        count = len(self.prompts) * self.per_prompt
        if self.per_prompt < 1 or not count:
            raise ValueError(f"per_prompt: expected at least one response to at least one prompt, got {count}")
        for name, value in vars(self).items():
            if isinstance(value, list) and name != "prompts" and len(value) != count:
                raise ValueError(f"{name}: expected {count} entries, {self.per_prompt} a prompt, got {len(value)}")

    def by_prompt(self, values: Sequence[float]) -> np.ndarray:
        """One of the lists as `[P, n]` float64."""
        return np.asarray(values, dtype=np.float64).reshape(len(self.prompts), self.per_prompt)

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


class StateLaws(NamedTuple):
    """What two laws are at the states of recorded responses; 0 past a response's end."""

    entropy: Tensor
    """`[B, T]` float32: H(π(·|s_t))."""
    kl: Tensor
    """`[B, T]` float32: KL(π(·|s_t)‖π_ref(·|s_t))."""


@torch.no_grad()
def assess(
    policy: ValueHeadLM,
    envs: Any,
    prompts: Sequence[Prompt],
    *,
    name: str = "model",
    per_prompt: int = 1,
    second_reward: Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], Iterable[float]] | None = None,
    sampler: Sampler | None = None,
    seed: int = 0,
) -> Assessment:
    """Sample n responses to each prompt and measure each.

    Policies that are compared by wins must be given different seeds: with the same draws a response and its
    counterpart are not independent.

    Args:
        policy: What is assessed.
        envs: A `TextEnv` or `TextVectorEnv`, wrapped or not, with a reference (β > 0).
        prompts: P prompts, text or ids.
        name: What the policy is called.
        per_prompt: n.
        second_reward: Scores of (prompts, responses) as token ids, such as `textenv.rewards.base.Reward.scores`.
        sampler: None: `TransformersSampler(policy)`.
        seed: Of the samples.

    Raises:
        ValueError: If there are no prompts, `per_prompt` is below 1, the environment has no reference (β = 0), or the
            policy has another vocabulary.
    """
    task = envs.unwrapped.task
    if per_prompt < 1:
        raise ValueError(f"per_prompt: expected an integer >= 1, got {per_prompt}")
    if task.reference is None:
        raise ValueError("envs: expected an environment with a reference, got kl_coef=0, which loads none")
    repeated = [prompt for prompt in prompts for _ in range(per_prompt)]
    ids, record = draw(policy, envs, repeated, sampler, seed)
    shown, responses = texts_of(task, ids, record)
    laws = [
        state_laws(
            policy,
            task.reference.model,
            record.ids[rows],
            record.prompt_lengths[rows],
            record.response_lengths[rows],
            temperature=task.options.temperature,
        )
        for rows in torch.arange(len(ids), device=task.device).split(BATCH_ROWS)
    ]
    second = None if second_reward is None else [float(s) for s in second_reward(ids, responses_of(record))]
    return Assessment(
        name=name,
        per_prompt=per_prompt,
        prompts=shown[::per_prompt],
        responses=responses,
        scores=record.scores.tolist(),
        second_scores=second,
        lengths=record.response_lengths.tolist(),
        finish_reasons=record.finish_reasons.tolist(),
        kls=kls_of(task, record),
        exact_kls=torch.cat([part.kl.sum(1) for part in laws]).tolist(),
        entropies=torch.cat([part.entropy.sum(1) for part in laws]).tolist(),
        ref_nlls=(-record.ref_logprobs.sum(1)).tolist(),
    )


@torch.no_grad()
def state_laws(
    policy: ValueHeadLM,
    reference: Shared,
    ids: Tensor,
    prompt_lengths: Tensor,
    response_lengths: Tensor,
    *,
    temperature: float,
    max_chunk_elements: int = MAX_CHUNK_ELEMENTS,
) -> StateLaws:
    """Entropy and exact divergence at the states that recorded responses visit.

    Given responses drawn from π, Σ_t KL(π(·|s_t)‖π_ref(·|s_t)) has the mean of Σ_t log π − log π_ref and a smaller
    variance, because the draw of each token given its state is summed over and not sampled (Rao–Blackwell; Amini,
    Vieira & Cotterell 2025, "Better estimation of the KL divergence between language models").

    Args:
        policy: π.
        reference: π_ref.
        ids: `[B, L]`: prompt, then response, right-padded.
        prompt_lengths: `[B]`, at least 1.
        response_lengths: `[B]`.
        temperature: Of both laws.
        max_chunk_elements: Largest number of logits of one model that are held at once.

    Raises:
        ValueError: If the lengths do not fit `ids`.
    """
    slots = Slots(prompt_lengths, response_lengths, ids, False)
    hidden = packed_hidden(backbone(policy.lm), ids, slots.packing, slots.sources)
    with reference.scope():
        ref_hidden = packed_hidden(backbone(reference), ids, slots.packing, slots.sources)
    head, ref_head = output_head(policy.lm), output_head(reference)
    chunk = max(1, max_chunk_elements // policy.vocab_size)
    entropies, kls = [hidden.new_zeros(0).float()], [hidden.new_zeros(0).float()]
    for part, ref_part in zip(hidden.split(chunk), ref_hidden.split(chunk), strict=True):
        logits = head(part).float() / temperature
        with reference.scope():
            ref_logits = ref_head(ref_part).float() / temperature
        entropies.append(torch.special.entr(logits.softmax(-1)).sum(-1))
        kls.append(exact(logits, ref_logits))
    return StateLaws(*(unpack(torch.cat(parts), slots.where, slots.shape) for parts in (entropies, kls)))
