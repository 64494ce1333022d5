"""What a judge is asked and how its answer is read: vLLM's pooling endpoints, and a plain one for servers of your own.

Shapes of requests and replies: `vllm/entrypoints/pooling/{classify,scoring,pooling}/protocol.py` of vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from textenv.rewards.templates import fill


class UnusableReply(ValueError):
    """A reply that holds no score; the judge is asked again."""

    def __init__(self, message: str, row: int | None = None) -> None:
        """Say what is wrong with it.

        Args:
            message: What was expected, and what came.
            row: Which response of the request it is about; None: all of them.
        """
        super().__init__(message)
        self.row = row


class JudgeProtocol(Protocol):
    """How a server is asked and answers.

    One of your own is a frozen dataclass: its `repr` is part of the cache's key.
    """

    batched: ClassVar[bool]
    """Whether one request may hold several responses."""

    def request(self, prompts: Sequence[str], responses: Sequence[str]) -> Mapping[str, Any]:
        """The JSON body of a request for the scores of these."""
        ...

    def scores(self, reply: Any, count: int) -> Sequence[Any]:
        """The scores in the parsed JSON of a reply, one a response, in order.

        They are checked (as many numbers as were asked for, all finite) where they are received. An `UnusableReply`, a
        `ValueError`, `LookupError`, `TypeError` or `AttributeError` means that the reply is not what was asked for.
        """
        ...


@dataclass(frozen=True)
class Plain:
    """`{"prompts": [...], "responses": [...]}` → `{"scores": [...]}`: for a server of your own."""

    batched: ClassVar[bool] = True

    def request(self, prompts: Sequence[str], responses: Sequence[str]) -> Mapping[str, Any]:
        """See `JudgeProtocol`."""
        return {"prompts": list(prompts), "responses": list(responses)}

    def scores(self, reply: Any, count: int) -> Sequence[Any]:
        """See `JudgeProtocol`."""
        return reply["scores"]


@dataclass(frozen=True)
class Classify:
    """vLLM's `/classify`: a sequence classifier that reads prompt and response as one text."""

    model: str
    """The name that it is served under."""
    label: int = 0
    """Whose logit or probability is the score."""
    use_activation: bool = False
    """Whether the server squashes the logit (one label: sigmoid, more: softmax); a reward model's is taken as it is."""
    template: str = "{prompt}{response}"
    """The text of an episode; special tokens are added by the server."""
    batched: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check each field."""
        check_template(self.template)
        if isinstance(self.label, bool) or not isinstance(self.label, int) or self.label < 0:
            raise ValueError(f"label: expected an integer >= 0, got {self.label!r}")

    def request(self, prompts: Sequence[str], responses: Sequence[str]) -> Mapping[str, Any]:
        """See `JudgeProtocol`."""
        texts = [fill(self.template, {"prompt": p, "response": r}) for p, r in zip(prompts, responses, strict=True)]
        return {"model": self.model, "input": texts, "use_activation": self.use_activation}

    def scores(self, reply: Any, count: int) -> Sequence[Any]:
        """See `JudgeProtocol`."""
        return [entry["probs"][self.label] for entry in in_order(reply["data"], count)]


@dataclass(frozen=True)
class Score:
    """vLLM's `/score`: a cross-encoder reads prompt and response as a pair, or two embeddings are compared."""

    model: str
    """The name that it is served under."""
    use_activation: bool = False
    """Whether the server squashes a cross-encoder's logit by a sigmoid."""
    batched: ClassVar[bool] = True

    def request(self, prompts: Sequence[str], responses: Sequence[str]) -> Mapping[str, Any]:
        """See `JudgeProtocol`."""
        pairs = {"text_1": list(prompts), "text_2": list(responses)}
        return {"model": self.model, **pairs, "use_activation": self.use_activation}

    def scores(self, reply: Any, count: int) -> Sequence[Any]:
        """See `JudgeProtocol`."""
        return [entry["score"] for entry in in_order(reply["data"], count)]


@dataclass(frozen=True)
class Pooling:
    """vLLM's `/pooling`: a reward model that answers with one value a text, or one a token, whose last is the score."""

    model: str
    """The name that it is served under."""
    use_activation: bool = False
    """Whether the server squashes the values."""
    template: str = "{prompt}{response}"
    """The text of an episode; special tokens are added by the server."""
    batched: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the template."""
        check_template(self.template)

    def request(self, prompts: Sequence[str], responses: Sequence[str]) -> Mapping[str, Any]:
        """See `JudgeProtocol`."""
        texts = [fill(self.template, {"prompt": p, "response": r}) for p, r in zip(prompts, responses, strict=True)]
        return {"model": self.model, "input": texts, "use_activation": self.use_activation}

    def scores(self, reply: Any, count: int) -> Sequence[Any]:
        """See `JudgeProtocol`."""
        return [_last_value(entry["data"], row) for row, entry in enumerate(in_order(reply["data"], count))]


def _last_value(data: Any, row: int) -> Any:
    """Of `[x]`, or of `[[x], [x], …]` the last; a value of several labels is nothing that could be paid."""
    last = data[-1] if isinstance(data[-1], list) else data
    if len(last) != 1:
        raise UnusableReply(f"expected one value a text or token, got {len(last)}", row)
    return last[0]


def in_order(data: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """The entries of a reply, ordered by their own `index`.

    Raises:
        UnusableReply: If there is not exactly one for each response.
    """
    if len(data) != count:
        raise UnusableReply(f"expected {count} scores, got {len(data)}")
    entries = sorted(data, key=lambda entry: entry["index"])
    if [entry["index"] for entry in entries] != list(range(count)):
        raise UnusableReply(f"expected indices 0 to {count - 1}, got {[entry['index'] for entry in data]}")
    return entries


def check_template(template: str) -> None:
    """Raise a ValueError unless it has a place for the response."""
    if not isinstance(template, str) or "{response}" not in template:
        raise ValueError(f"template: expected a text with {{response}} and, as a rule, {{prompt}}, got {template!r}")
