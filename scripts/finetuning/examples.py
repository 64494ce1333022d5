"""Rows of text, pairs or chats become token ids, each with what of it is learnt."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from textenv.prompts import as_chat, chat_ids, closing_count, is_messages
from textenv.table_files import Record, read_lines, read_records, shown, source_name
from textenv.tables import Names, Reading, sift

Form = Literal["text", "pairs", "messages"]
IGNORED = -100
"""The label of a token that is not learnt, as PyTorch's cross-entropy has it."""


@dataclass(frozen=True)
class Columns:
    """Names of columns."""

    text: str = "text"
    """Text that is learnt as a whole."""
    prompt: str = "prompt"
    """What comes before a response, text or messages; it is not learnt."""
    response: str = "response"
    """What is learnt after a prompt."""
    messages: str = "messages"
    """A chat, a list of messages with `role` and `content`; what the assistant says is learnt."""

    def of(self, form: Form) -> Names:
        """What a form asks of a row."""
        ours = ["prompt", "response"] if form == "pairs" else [form]
        return Names(ours, columns={name: getattr(self, name) for name in ours})


@dataclass(frozen=True)
class Example:
    """One row as token ids."""

    input_ids: list[int]
    """The whole, with the EOS that ends it unless it was cut."""
    labels: list[int]
    """The ids that are learnt, elsewhere −100. Each is predicted from those before it, so the first never counts."""
    cut: bool = False
    """Whether its end was cut off."""

    @property
    def learnt(self) -> int:
        """How many tokens are predicted."""
        return sum(label != IGNORED for label in self.labels[1:])

    @property
    def prompt(self) -> tuple[int, ...]:
        """What stands before the first token that is learnt; empty for a text."""
        first = next((place for place, label in enumerate(self.labels) if label != IGNORED), len(self.labels))
        return tuple(self.input_ids[:first])

    @property
    def features(self) -> dict[str, list[int]]:
        """What transformers' collators take."""
        return {"input_ids": self.input_ids, "labels": self.labels}


@dataclass(frozen=True)
class Encoder:
    """How rows become examples."""

    tokenizer: Any
    """One with an EOS token, which ends a response."""
    max_tokens: int | None = None
    """Longest example; a longer one loses its end. None: any."""
    chat_template: bool = False
    """Whether a prompt that is text is what the user says in the tokenizer's chat template."""

    def __post_init__(self) -> None:
        """Check that a response can end."""
        if self.tokenizer.eos_token_id is None:
            raise ValueError("tokenizer: expected one with an EOS token, which ends a response, got none")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ValueError(f"max_tokens: expected an integer >= 2, got {self.max_tokens}")

    def text(self, text: Any) -> Example:
        """All of a text is learnt, and that it ends.

        Raises:
            ValueError: `expected ..., got ...`, as for every form, if this is none, is blank, or nothing of it is left
                to learn.
        """
        ids = self._opened(_written(text, "text"))
        return self._ended(ids, [True] * len(ids))

    def pair(self, prompt: Any, response: Any) -> Example:
        """The response is learnt, and that it ends; the ids of the prompt are those of the prompt alone.

        Prompt and response are tokenized as one text where that begins with the prompt's own ids, else apart, because
        in the environment a response begins after a prompt's own ids.
        """
        response = _written(response, "a response")
        if isinstance(prompt, str) and self.chat_template:
            prompt = as_chat(prompt)
        if is_messages(prompt):
            said: list[Any] = [*prompt, {"role": "assistant", "content": response}]
            return self._chat(said, answers=[len(prompt)])
        start = self._opened(_text(prompt, "a prompt"))
        ids = self._opened(prompt + response)
        if ids[: len(start)] != start:
            ids = start + self.tokenizer(response, add_special_tokens=False)["input_ids"]
        return self._ended(ids, [False] * len(start) + [True] * (len(ids) - len(start)))

    def chat(self, messages: Any) -> Example:
        """Each answer of the assistant is learnt, with what the template ends it with."""
        if not is_messages(messages) or not all(isinstance(message, Mapping) for message in messages):
            raise ValueError(f"expected messages with 'role' and 'content', got {shown(messages)}")
        return self._chat(messages, [i for i, message in enumerate(messages) if message.get("role") == "assistant"])

    def _chat(self, messages: Sequence[Mapping[str, Any]], answers: Sequence[int]) -> Example:
        if not answers:
            raise ValueError(f"expected at least one message of the assistant, got {shown(messages)}")
        messages = messages[: answers[-1] + 1]  # what follows the last answer is neither seen nor learnt
        ids = self._templated(messages, answer=False)
        for place in answers:
            if isinstance(messages[place]["content"], str) and not messages[place].get("tool_calls"):
                _written(messages[place]["content"], "an answer")
        learnt, answered = [False] * len(ids), ids
        for place in answers:
            before = self._templated(messages[:place], answer=True)
            after = self._templated(messages[: place + 1], answer=False)
            if after[: len(before)] != before or ids[: len(after)] != after:
                raise ValueError("expected a chat template that leaves earlier messages alone, got one that does not")
            learnt[len(before) : len(after)] = [True] * (len(after) - len(before))
            answered = after[len(before) :]
        if self.tokenizer.eos_token_id in answered:  # the template ends an answer by itself
            return self._cut(ids, learnt)
        return self._ended(ids, learnt)

    def _templated(self, messages: Sequence[Mapping[str, Any]], *, answer: bool) -> list[int]:
        return chat_ids(messages, self.tokenizer, answer=answer) if messages else []

    def _opened(self, text: str) -> list[int]:
        """Ids of a text that may go on: with what the tokenizer puts before it, without what it puts behind."""
        ids = self.tokenizer(text)["input_ids"]
        return ids[: len(ids) - self._closing]

    @cached_property
    def _closing(self) -> int:
        """How many ids the tokenizer puts behind a text by itself."""
        return closing_count(self.tokenizer)

    def _ended(self, ids: list[int], learnt: list[bool]) -> Example:
        return self._cut([*ids, self.tokenizer.eos_token_id], [*learnt, True])

    def _cut(self, ids: list[int], learnt: list[bool]) -> Example:
        labels = [i if yes else IGNORED for i, yes in zip(ids, learnt, strict=True)]
        example = Example(
            ids[: self.max_tokens], labels[: self.max_tokens], cut=len(ids) > (self.max_tokens or len(ids))
        )
        if not example.learnt:
            raise ValueError(f"expected a token to learn, got none in the first {len(example.input_ids)} of {len(ids)}")
        return example


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected {what} that is a string, got {shown(value)}")
    return value


def _written(value: Any, what: str) -> str:
    """Text that says something: learning that a blank response ends teaches to say nothing."""
    if not _text(value, what).strip():
        raise ValueError(f"expected {what} that is not blank, got {value!r}")
    return value


def read_examples(
    source: Any,
    encoder: Encoder,
    *,
    form: Form | None = None,
    columns: Columns | None = None,
    strict: bool = False,
    tell: Callable[[str], object] | None = None,
) -> Reading[Example]:
    """Examples of a file or dataset.

    Args:
        source: A `.txt` file, of which each line is a text, or what `textenv.read_rows` takes.
        encoder: How rows become examples.
        form: What the rows are; None: chats, pairs or texts, the first of which the first row has the columns of.
        columns: Their names.
        strict: Whether bad rows are an error; otherwise they are counted, told and skipped.
        tell: Takes what there is to say about skipped and cut rows; None: `warnings.warn`.

    Raises:
        ValueError: If the source cannot be read, has no such columns, or leaves no example; with `strict`, if a row is
            bad.
    """
    columns = columns or Columns()
    records = list(_records(source, columns, form))
    form = form or _form(source, records, columns)
    names = columns.of(form)
    make = {"text": encoder.text, "pairs": encoder.pair, "messages": encoder.chat}[form]
    reading = sift(source, records, lambda value: make(*names.row(value).values()), strict=strict)
    examples = reading.told(tell)
    cut = sum(example.cut for example in examples)
    if cut:
        (tell or warnings.warn)(
            f"{reading.source}: cut {cut} of {len(examples)} examples to {encoder.max_tokens} tokens"
        )
    return reading


def _records(source: Any, columns: Columns, form: Form | None) -> Iterator[Record]:
    if isinstance(source, str | Path) and Path(source).suffix == ".txt":
        return (replace(line, value={columns.text: line.value}) for line in read_lines(Path(source)))
    return read_records(source, columns.of(form).needed if form else ())


def _form(source: Any, records: Sequence[Record], columns: Columns) -> Form:
    first: Any = next((record.value for record in records if isinstance(record.value, Mapping)), {})
    forms: tuple[Form, ...] = ("messages", "pairs", "text")
    for form in forms:
        if all(name in first for name in columns.of(form).needed):
            return form
    needed, where = [columns.of(form).needed for form in forms], source_name(source)
    raise ValueError(f"columns: expected one of {needed} in {where}, got {list(first)}")
