"""Rewards of tokens and of steps: token classifiers, process rewards, and what makes one number of many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from textenv.models import load_classifier
from textenv.rewards.base import RewardContext, Scores
from textenv.rewards.batching import by_length, check_lengths, padded
from textenv.rewards.binding import per_token
from textenv.rewards.composition import Composed, parts_of
from textenv.rewards.reward import Ids, Reward


@dataclass(frozen=True)
class TokenFunction:
    """A plain function `(prompt ids, response ids) -> one value per token` as a reward that is paid token by token.

    Value t may depend only on the prompt and the tokens up to t.

    >>> TokenFunction(lambda prompt, response: [float(token == 7) for token in response])([[1]], [[7, 2]])
    [[1.0, 0.0]]
    """

    function: Callable[[list[int], list[int]], Sequence[float]]
    """Of one prompt and one response."""
    wants_ids = True
    per_token = True

    def __call__(self, prompts: Ids, responses: Ids) -> list[list[float]]:
        """One value per token."""
        return [list(self.function(list(p), list(r))) for p, r in zip(prompts, responses, strict=True)]


class TokenClassifierReward:
    """Value t = the head's answer at response token t, of a causal model with a token-classification head.

    The ids are the policy's, so the model must have the policy's vocabulary. With one label the value is the logit,
    with more the probability of `label`. A model that looks ahead (BERT) is refused: what it says of token t would not
    be known at step t.
    """

    wants_ids = True
    per_token = True

    def __init__(
        self,
        source: str | Path,
        *,
        label: int | str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_tokens: int = 16_384,
        trust_remote_code: bool = False,
    ) -> None:
        """Load a token classifier.

        Args:
            source: Folder or hub name; safetensors only.
            label: Whose probability is the value, by number or name; None: the only one's logit.
            device: Where it runs.
            dtype: Its floating-point type.
            batch_tokens: How many padded tokens one forward may hold.
            trust_remote_code: Whether the folder may bring Python code.

        Raises:
            ValueError: If the folder is unknown or holds something else, if the label is unknown, or if the model looks
                ahead.
        """
        model, self.tokenizer = load_classifier(
            source, argument="reward", device=device, dtype=dtype, trust_remote_code=trust_remote_code, of_tokens=True
        )
        self.model: Any = model
        self.model.config.use_cache = False
        self.label, self.batch_tokens = _label(self.model.config, label), batch_tokens
        self.context = getattr(self.model.config, "max_position_embeddings", None)
        if not _is_causal(self.values_of):
            raise ValueError(f"reward: expected a causal model, got {type(model).__name__}, which looks ahead")

    def bind(self, context: RewardContext) -> TokenClassifierReward:
        """Itself, if the vocabulary is the policy's.

        Raises:
            ValueError: If it is another.
        """
        given = context.tokenizer
        if given is not None and given.get_vocab() != self.tokenizer.get_vocab():
            raise ValueError("reward: expected a token classifier with the policy's vocabulary, got another")
        return self

    def __call__(self, prompts: Ids, responses: Ids) -> list[Tensor]:
        """One value per token of each response."""
        rows = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
        check_lengths([len(row) for row in rows], self.context)
        return [values[len(p) :] for p, values in zip(prompts, self.values_of(rows), strict=True)]

    @torch.no_grad()
    def values_of(self, rows: Ids) -> list[Tensor]:
        """One value per token of each row."""
        found: dict[int, Tensor] = {}
        for batch in by_length([len(row) for row in rows], self.batch_tokens):
            ids, _ = padded([rows[row] for row in batch], self.model.device)
            logits = self.model(input_ids=ids).logits.float()
            values = logits[..., 0] if self.label is None else logits.softmax(-1)[..., self.label]
            found |= {row: values[place, : len(rows[row])].cpu() for place, row in enumerate(batch)}
        return [found[row] for row in range(len(rows))]


def _label(config: Any, label: int | str | None) -> int | None:
    names = dict(config.id2label)
    if label is None and len(names) == 1:
        return None
    for number, name in names.items():
        if label is not None and label in (number, name):
            return int(number)
    raise ValueError(f"label: expected one of {names}, got {label!r}")


def _is_causal(values_of: Callable[[Ids], list[Tensor]]) -> bool:
    """Whether the first value stays when the second token changes."""
    one, two = values_of([[1, 1], [1, 0]])
    return bool(torch.allclose(one[0], two[0], rtol=1e-3, atol=1e-5))


@dataclass(frozen=True)
class StepReward:
    """A process reward: another reward's values where a step of the response ends, 0 elsewhere.

    A step ends with one of `separators` and with a stop token, as the steps of a process reward model that reads a
    mark after each (Lightman et al. 2023, arXiv 2305.20050; Wang et al. 2023, arXiv 2312.08935). A last step that the
    length cuts off is paid nothing, since at its last token nobody knows yet that it is.
    """

    reward: Any
    """A reward of one value per token."""
    separators: Sequence[int]
    """Token ids that end a step."""

    def __post_init__(self) -> None:
        """Check the ids."""
        if not self.separators or not all(isinstance(token, int) and token >= 0 for token in self.separators):
            raise ValueError(f"separators: expected token ids, got {self.separators!r}")

    def bind(self, context: RewardContext) -> BoundSteps:
        """The reward of steps."""
        return BoundSteps(
            per_token(self.reward, context, label="reward 'raw'", by="StepReward"),
            frozenset(self.separators) | context.stop_token_ids,
        )


class BoundSteps(Composed):
    """Values at the ends of steps; the values everywhere are told as the part `raw`."""

    per_token = True

    def __init__(self, reward: Reward, ends: frozenset[int]) -> None:
        """The reward, and the ids that end a step."""
        super().__init__({"raw": reward})
        self.ends = ends

    def __call__(self, prompts: Ids, responses: Ids) -> Scores:
        """One value per token."""
        raw = self.children["raw"].ask(prompts, responses)
        kept = [
            np.where([token in self.ends for token in response], values, np.float32(0))
            for response, values in zip(responses, raw.total, strict=True)
        ]
        return Scores(kept, parts_of("raw", raw))


Way = Literal["sum", "mean", "min", "last", "product"]
_WAYS: dict[str, Callable[[np.ndarray], np.floating]] = {
    "sum": np.sum,
    "mean": np.mean,
    "min": np.min,
    "last": lambda values: values[-1],
    "product": np.prod,
}


@dataclass(frozen=True)
class TokenAggregate:
    """One number a response, from one value per token.

    The product and the minimum of step values are what Lightman et al. 2023 (arXiv 2305.20050) and Wang et al. 2023
    (arXiv 2312.08935) rank solutions by. With `separators` only the values at these tokens and at a stop
    token count; a response without any is worth `none`.
    """

    reward: Any
    """A reward of one value per token."""
    how: Way = "sum"
    """`sum`, `mean`, `min`, `last` or `product`."""
    separators: Sequence[int] | None = None
    """Token ids that end a step; None: every token counts."""
    none: float = 0.0
    """The score of a response in which nothing counts."""

    def __post_init__(self) -> None:
        """Check the way."""
        if self.how not in get_args(Way):
            raise ValueError(f"how: expected one of {', '.join(map(repr, get_args(Way)))}, got {self.how!r}")

    def bind(self, context: RewardContext) -> BoundAggregate:
        """The response-level reward."""
        reward = per_token(self.reward, context, label="reward 'raw'", by="TokenAggregate")
        ends = None if self.separators is None else frozenset(self.separators) | context.stop_token_ids
        return BoundAggregate(reward, self, ends)


class BoundAggregate(Composed):
    """A response-level reward of token values, whose sum is told as the part `raw`."""

    def __init__(self, reward: Reward, terms: TokenAggregate, ends: frozenset[int] | None) -> None:
        """The reward, how it is put together, and which tokens count; None: all."""
        super().__init__({"raw": reward})
        self.terms, self.ends = terms, ends

    def __call__(self, prompts: Ids, responses: Ids) -> Scores:
        """One score a response."""
        answer = self.children["raw"].ask(prompts, responses)
        totals = [self._one(response, values) for response, values in zip(responses, answer.total, strict=True)]
        sums = Scores(*([v.sum() for v in answer.total], {n: [v.sum() for v in p] for n, p in answer.parts.items()}))
        return Scores(totals, parts_of("raw", sums))

    def _one(self, response: Sequence[int], values: np.ndarray) -> float:
        counted = values if self.ends is None else values[[token in self.ends for token in response]]
        return float(_WAYS[self.terms.how](counted.astype(np.float64))) if len(counted) else self.terms.none
