"""Rewards by rule: patterns, lengths, endings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from textenv.rewards.base import RewardContext
from textenv.rewards.combinators import check_number
from textenv.rewards.reward import Ids

Unit = Literal["tokens", "words", "characters"]


@dataclass(frozen=True)
class RegexMatch:
    r"""score = 1 if the pattern is found in the response, or with `full` if it is all of it, else 0.

    >>> RegexMatch(r"[.!?]$")(["", ""], ["The end.", "The"])
    [1.0, 0.0]
    """

    pattern: str
    """A regular expression of Python's `re`."""
    full: bool = False
    """Whether the whole response must match."""
    flags: int = 0
    """Such as `re.IGNORECASE`."""

    def __post_init__(self) -> None:
        """Check the pattern."""
        try:
            re.compile(self.pattern, self.flags)
        except (re.error, TypeError, ValueError) as error:
            raise ValueError(f"pattern: expected a regular expression, got {self.pattern!r} ({error})") from error

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """1.0 or 0.0 a response."""
        compiled = re.compile(self.pattern, self.flags)
        ask = compiled.fullmatch if self.full else compiled.search
        return [float(ask(response) is not None) for response in responses]


@dataclass(frozen=True)
class LengthTarget:
    """score = −| |y| − target | / target: 0 at the target, −1 for an empty response.

    >>> LengthTarget(4, "words")(["", ""], ["one two three", " a b c d e f"])
    [-0.25, -0.5]
    """

    target: int
    """Best length, ≥ 1."""
    unit: Unit = "tokens"
    """What is counted: `tokens` (a stop token among them), `words` (divided by white space) or `characters`."""

    def __post_init__(self) -> None:
        """Check both."""
        if isinstance(self.target, bool) or not isinstance(self.target, int) or self.target < 1:
            raise ValueError(f"target: expected an integer >= 1, got {self.target!r}")
        if self.unit not in get_args(Unit):
            raise ValueError(f"unit: expected one of {', '.join(map(repr, get_args(Unit)))}, got {self.unit!r}")

    @property
    def wants_ids(self) -> bool:
        """Whether it counts tokens."""
        return self.unit == "tokens"

    def __call__(self, prompts: Sequence, responses: Sequence) -> list[float]:
        """One score a response."""
        lengths = (len(response.split() if self.unit == "words" else response) for response in responses)
        return [-abs(length - self.target) / self.target for length in lengths]


@dataclass(frozen=True)
class SoftOverlong:
    """A penalty that grows over the last tokens before the limit (DAPO, arXiv 2503.14476, eq. 13).

    score = 0 if |y| ≤ L − b;  (L − b − |y|)/b if L − b < |y| ≤ L;  −1 if |y| > L

    L is the longest response, b the buffer; |y| counts a stop token.
    """

    buffer_tokens: int
    """b ≥ 1."""
    max_tokens: int | None = None
    """L > b; None: the environment's `max_new_tokens`."""
    wants_ids = True

    def __post_init__(self) -> None:
        """Check the two."""
        if isinstance(self.buffer_tokens, bool) or not isinstance(self.buffer_tokens, int) or self.buffer_tokens < 1:
            raise ValueError(f"buffer_tokens: expected an integer >= 1, got {self.buffer_tokens!r}")
        if self.max_tokens is not None and not self.max_tokens > self.buffer_tokens:
            raise ValueError(
                f"max_tokens: expected more than buffer_tokens={self.buffer_tokens}, got {self.max_tokens!r}"
            )

    def bind(self, context: RewardContext) -> SoftOverlong:
        """With the environment's limit, if it has none of its own."""
        return self if self.max_tokens is not None else SoftOverlong(self.buffer_tokens, context.max_new_tokens)

    def __call__(self, prompts: Ids, responses: Ids) -> list[float]:
        """One score a response."""
        if self.max_tokens is None:
            raise ValueError("max_tokens: expected a limit, because there is no environment to take it from, got None")
        free, buffer = self.max_tokens - self.buffer_tokens, self.buffer_tokens
        return [max(-1.0, min(0, free - len(response)) / buffer) for response in responses]


@dataclass(frozen=True)
class MissingEOS:
    """score = −penalty for a response that does not end with a stop token, else 0.

    The environment's own `missing_eos_penalty` does the same outside of the score; this one is a part of it, so it can
    be weighted, clipped and counted.
    """

    penalty: float = 1.0
    """≥ 0."""
    stop_token_ids: frozenset[int] | None = None
    """Ids that end a response; None: the environment's."""
    wants_ids = True

    def __post_init__(self) -> None:
        """Check the penalty."""
        check_number("penalty", self.penalty, low=0.0)

    def bind(self, context: RewardContext) -> MissingEOS:
        """With the environment's stop tokens, if it has none of its own."""
        return self if self.stop_token_ids is not None else MissingEOS(self.penalty, context.stop_token_ids)

    def __call__(self, prompts: Ids, responses: Ids) -> list[float]:
        """One score a response."""
        if self.stop_token_ids is None:
            raise ValueError(
                "stop_token_ids: expected some, because there is no environment to take them from, got None"
            )
        return [0.0 if response and response[-1] in self.stop_token_ids else -self.penalty for response in responses]
