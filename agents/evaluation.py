"""What a policy writes on given prompts, and what it is worth."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from agents.policy import ValueHeadLM
from agents.rollout import sample_responses
from agents.sampling import Fingerprint, Sampler, TransformersSampler
from agents.sampling.sync import check_synced
from textenv.prompts import Prompt
from textenv.rewards.running import in_fixed_units
from textenv.task import Task
from textenv.types import ReplayRecord


@dataclass(frozen=True)
class Evaluation:
    """One response a prompt."""

    prompts: list[str]
    """As text."""
    responses: list[str]
    """As text."""
    scores: list[float]
    """What the reward function gave, in fixed units; 0 where the response was cut unscored."""
    kls: list[float]
    """Σ_t log π − log π_ref of each response, in nats; zeros without a reference."""
    lengths: list[int]
    """Tokens of each response."""
    finish_reasons: list[int]
    """Of `FinishReason`."""

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf8")

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read what `save` wrote."""
        return cls(**json.loads(Path(path).read_text(encoding="utf8")))

    @property
    def summary(self) -> dict[str, float]:
        """`score_mean`, `score_sd`, `score_se`, `kl_mean`, `length_mean`, `distinct_2`."""
        count = len(self.scores)
        mean = sum(self.scores) / count
        sd = math.sqrt(sum((score - mean) ** 2 for score in self.scores) / max(1, count - 1))
        return {
            "score_mean": mean,
            "score_sd": sd,
            "score_se": sd / math.sqrt(count),
            "kl_mean": sum(self.kls) / count,
            "length_mean": sum(self.lengths) / count,
            "distinct_2": distinct_n(self.responses, 2),
        }


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of the word n-grams of all texts together that differ (Li et al. 2016, §5).

    Compare only corpora of the same size: the share falls as text grows.

    >>> distinct_n(["a b a b", "a b"], 2)
    0.5
    """
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """A text's word n-grams, in lower case, split at white space.

    >>> ngrams("The cat sat.", 2)
    [('the', 'cat'), ('cat', 'sat.')]
    """
    words = text.lower().split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


@torch.no_grad()
def evaluate(
    policy: ValueHeadLM,
    envs: Any,
    prompts: Sequence[Prompt],
    *,
    sampler: Sampler | None = None,
    seed: int = 0,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    trained: Fingerprint | None = None,
) -> Evaluation:
    """Sample one response a prompt and score it.

    A reward with running statistics scores in the units it had before their first update, so that evaluations of
    different times compare.

    Args:
        policy: What is evaluated.
        envs: A `TextEnv` or `TextVectorEnv`, wrapped or not; says how to sample and what it is worth.
        prompts: Text or ids.
        sampler: None: `TransformersSampler(policy)`.
        seed: Of the samples; the same seed gives the same responses.
        autocast: Makes the context of sampling; reference and reward stay in the environment's precision.
        trained: The weights that the sampler was given; None: it is not asked whether it has them.

    Raises:
        ValueError: If there are no prompts, the policy has another vocabulary than the environment, or the reward has
            no score in fixed units.
        SamplerMismatch: If the sampler drew from other weights than `trained`.
    """
    task = envs.unwrapped.task
    ids, record = draw(policy, envs, prompts, sampler, seed, autocast, trained)
    texts = texts_of(task, ids, record)
    return Evaluation(
        prompts=list(texts[0]),
        responses=list(texts[1]),
        scores=record.scores.tolist(),
        kls=kls_of(task, record),
        lengths=record.response_lengths.tolist(),
        finish_reasons=record.finish_reasons.tolist(),
    )


def draw(
    policy: ValueHeadLM,
    envs: Any,
    prompts: Sequence[Prompt],
    sampler: Sampler | None,
    seed: int,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    trained: Fingerprint | None = None,
) -> tuple[list[list[int]], ReplayRecord]:
    """The prompts as ids, and one response to each through the MDP; arguments and errors as of `evaluate`."""
    task = envs.unwrapped.task
    if not len(prompts):
        raise ValueError("prompts: expected at least one, got none")
    if policy.vocab_size != task.vocab_size:
        raise ValueError(f"policy: expected the environment's vocabulary of {task.vocab_size}, got {policy.vocab_size}")
    ids = task.tokenize(prompts)
    with autocast():
        samples = sample_responses(sampler or TransformersSampler(policy), task, ids, seed)
    if trained is not None:
        check_synced(trained, samples.fingerprint)
    with in_fixed_units(task.reward):
        # The sampler's own log-probs: these are the sampled policy's.
        return ids, envs.unwrapped.replay(ids, samples.responses, samples.logprobs)


def kls_of(task: Task, record: ReplayRecord) -> list[float]:
    """Σ_t log π − log π_ref of each response; zeros without a reference."""
    if task.reference is None or record.logprobs is None:
        return [0.0] * len(record.mask)
    return torch.where(record.mask, record.logprobs - record.ref_logprobs, 0.0).sum(1).tolist()


def responses_of(record: ReplayRecord) -> list[list[int]]:
    """The token ids of each response, stop tokens included."""
    spans = zip(record.ids.tolist(), record.prompt_lengths.tolist(), record.response_lengths.tolist(), strict=True)
    return [row[prompt : prompt + response] for row, prompt, response in spans]


def texts_of(task: Task, ids: Sequence[Sequence[int]], record: ReplayRecord) -> tuple[list[str], list[str]]:
    """Prompts and responses as text, as the ids where there is no tokenizer."""
    responses = responses_of(record)
    if task.tokenizer is None:
        return [str(list(row)) for row in ids], [str(row) for row in responses]
    return task.text_decoder(ids, responses)
