"""A chat model as a judge: OpenAI-compatible chat completions, and three ways to read a score from the reply."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from textenv.rewards.judge.protocols import UnusableReply, check_template
from textenv.rewards.templates import fill


class Reader(Protocol):
    """Reads a score from one choice of a chat completion; a frozen dataclass, as protocols are."""

    def options(self) -> Mapping[str, Any]:
        """What the request must ask for besides."""
        ...

    def read(self, choice: Mapping[str, Any]) -> Any:
        """The score.

        Raises:
            UnusableReply: If there is none.
        """
        ...


@dataclass(frozen=True)
class Match:
    """The number in the last match of a regular expression: the last, because models reason before they judge."""

    pattern: str = r"[Ss]core:\s*(-?\d+(?:\.\d+)?)"
    """With one group, which holds the number."""

    def __post_init__(self) -> None:
        """Check the pattern."""
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(f"pattern: expected a regular expression, got {self.pattern!r} ({error})") from error
        if groups != 1:
            raise ValueError(f"pattern: expected exactly one group, got {groups} in {self.pattern!r}")

    def options(self) -> Mapping[str, Any]:
        """See `Reader`."""
        return {}

    def read(self, choice: Mapping[str, Any]) -> float:
        """See `Reader`."""
        text = _text(choice)
        try:
            return float(re.findall(self.pattern, text)[-1])
        except (IndexError, ValueError) as error:
            raise UnusableReply(f"expected a number where {self.pattern!r} has it, got {text[:200]!r}") from error


@dataclass(frozen=True)
class JSONField:
    """A field of the JSON object in the reply, which may stand in other text."""

    field: str = "score"
    """Its name."""

    def options(self) -> Mapping[str, Any]:
        """See `Reader`."""
        return {}

    def read(self, choice: Mapping[str, Any]) -> Any:
        """See `Reader`."""
        text = _text(choice)
        try:
            answer, _ = json.JSONDecoder().raw_decode(text, max(0, text.find("{")))
            return answer[self.field]
        except (ValueError, LookupError, TypeError) as error:
            raise UnusableReply(f"expected JSON with the field {self.field!r}, got {text[:200]!r}") from error


@dataclass(frozen=True)
class ExpectedDigit:
    """score = Σ_d d·p(d) / Σ_d p(d) over the digits d that the model could have said, from its log-probs.

    The place is the first token of the reply that is one of the digits; p is the probability that the server gives each
    there, with and without a space. Finer than the digit that was said, and without its noise (Liu et al. 2023,
    arXiv:2303.16634, equation 1, which estimates the same sum by sampling).
    """

    low: int = 1
    """Least digit."""
    high: int = 9
    """Greatest digit; a number of two digits is two tokens for most models."""
    min_mass: float = 0.5
    """Least Σ_d p(d): below it the model is saying something else than a digit."""

    def __post_init__(self) -> None:
        """Check each field."""
        if not 0 <= self.low < self.high <= 9:
            raise ValueError(f"low, high: expected 0 <= low < high <= 9, got {self.low!r} and {self.high!r}")
        if not 0 < self.min_mass <= 1:
            raise ValueError(f"min_mass: expected a number in (0, 1], got {self.min_mass!r}")

    def options(self) -> Mapping[str, Any]:
        """See `Reader`; 20 is the most that OpenAI gives and the most that vLLM gives unless told otherwise."""
        return {"logprobs": True, "top_logprobs": 20}

    def read(self, choice: Mapping[str, Any]) -> float:
        """See `Reader`."""
        logprobs = choice.get("logprobs")
        if not logprobs or logprobs.get("content") is None:
            raise UnusableReply("expected log-probs, which this server does not give")
        digits = {str(digit): digit for digit in range(self.low, self.high + 1)}
        place = next((place for place in logprobs["content"] if place["token"].strip() in digits), None)
        if place is None:
            said = "".join(place["token"] for place in logprobs["content"])
            raise UnusableReply(f"expected a digit from {self.low} to {self.high}, got {said[:200]!r}")
        # By token, because the one that was said is as a rule also among the most probable.
        laws = {entry["token"]: math.exp(entry["logprob"]) for entry in (place, *place["top_logprobs"])}
        said = [(digits[token.strip()], p) for token, p in laws.items() if token.strip() in digits]
        mass = sum(p for _, p in said)
        if mass < self.min_mass:
            raise UnusableReply(f"expected digits with a probability of {self.min_mass:g} together, got {mass:.3g}")
        return sum(digit * p for digit, p in said) / mass


def _text(choice: Mapping[str, Any]) -> str:
    text = choice["message"]["content"]
    if not isinstance(text, str):
        raise UnusableReply(f"expected a reply in text, got {text!r}")
    return text


@dataclass(frozen=True)
class Chat:
    """OpenAI's chat completions, as vLLM, llama.cpp and others serve them too; one response a request."""

    model: str
    """The name that it is served under."""
    template: str
    """What the model is asked, with {prompt} and {response}; other braces stay as they are."""
    reader: Reader = field(default_factory=Match)
    """How the score is read from the reply."""
    system: str | None = None
    """The system message, if any."""
    low: float = -math.inf
    """Least score; a reply below it is unusable."""
    high: float = math.inf
    """Greatest score; a reply above it is unusable."""
    temperature: float | None = 0.0
    """Of the judge; None: the server's."""
    max_tokens: int | None = 256
    """Longest reply; None: the server's, for models that know `max_completion_tokens` alone (put it in `options`)."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the request, `{"response_format": {"type": "json_object"}}` for one."""
    batched: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check each field."""
        check_template(self.template)
        if not self.low < self.high:
            raise ValueError(f"low, high: expected low < high, got {self.low!r} and {self.high!r}")
        try:
            json.dumps(dict(self.options), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"options: expected what JSON can hold, got {self.options!r}") from error

    def request(self, prompts: Sequence[str], responses: Sequence[str]) -> Mapping[str, Any]:
        """See `JudgeProtocol`."""
        (prompt,), (response,) = prompts, responses
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        asked = fill(self.template, {"prompt": prompt, "response": response})
        body = {
            "model": self.model,
            "messages": [*system, {"role": "user", "content": asked}],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        given = {name: value for name, value in body.items() if value is not None}
        return {**given, **self.reader.options(), **self.options}

    def scores(self, reply: Any, count: int) -> Sequence[Any]:
        """See `JudgeProtocol`."""
        score = self.reader.read(reply["choices"][0])
        if not self.low <= score <= self.high:
            raise UnusableReply(f"expected a score from {self.low:g} to {self.high:g}, got {score!r}", 0)
        return [score]
