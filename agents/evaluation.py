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
from agents.sampling import Sampler, TransformersSampler
from textenv.prompts import Prompt


@dataclass(frozen=True)
class Evaluation:
    """One response a prompt."""

    prompts: list[str]
    """As text."""
    responses: list[str]
    """As text."""
    scores: list[float]
    """What the reward function gave; 0 where the response was cut unscored."""
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
    words = [text.lower().split() for text in texts]
    grams = [tuple(row[i : i + n]) for row in words for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


@torch.no_grad()
def evaluate(
    policy: ValueHeadLM,
    envs: Any,
    prompts: Sequence[Prompt],
    *,
    sampler: Sampler | None = None,
    seed: int = 0,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Evaluation:
    """Sample one response a prompt and score it.

    Args:
        policy: What is evaluated.
        envs: A `TextEnv` or `TextVectorEnv`, wrapped or not; says how to sample and what it is worth.
        prompts: Text or ids.
        sampler: None: `TransformersSampler(policy)`.
        seed: Of the samples; the same seed gives the same responses.
        autocast: Makes the context of sampling; reference and reward stay in the environment's precision.

    Raises:
        ValueError: If there are no prompts, or the policy has another vocabulary than the environment.
    """
    task = envs.unwrapped.task
    if not len(prompts):
        raise ValueError("prompts: expected at least one, got none")
    if policy.vocab_size != task.vocab_size:
        raise ValueError(f"policy: expected the environment's vocabulary of {task.vocab_size}, got {policy.vocab_size}")
    ids = task.tokenize(prompts)
    with autocast():
        samples = sample_responses(sampler or TransformersSampler(policy), task, ids, seed)
    # The sampler's own log-probs: these are the sampled policy's.
    record = envs.unwrapped.replay(ids, samples.responses, samples.logprobs)
    kls = torch.zeros(len(ids))
    if task.reference is not None and record.logprobs is not None:
        kls = torch.where(record.mask, record.logprobs - record.ref_logprobs, 0.0).sum(1)
    if task.tokenizer is None:
        texts = [str(row) for row in ids], [str(row) for row in samples.responses]
    else:
        texts = task.text_decoder(ids, samples.responses)
    return Evaluation(
        prompts=list(texts[0]),
        responses=list(texts[1]),
        scores=record.scores.tolist(),
        kls=kls.tolist(),
        lengths=record.response_lengths.tolist(),
        finish_reasons=record.finish_reasons.tolist(),
    )
