"""Rewards of tokens and of steps: functions, process rewards, and what makes one number of many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from textenv.rewards.base import RewardContext, Scores
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
