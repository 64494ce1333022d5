"""Prompts: read them from where they are, mix them, and tokenize them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from textenv.table_files import SUFFIXES, Record, read_lines, read_records, shown
from textenv.tables import sift

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or messages (`role` and `content` each) for the tokenizer's chat template."""


PROMPT_SUFFIXES = (".txt", *SUFFIXES)
"""The files that `read_prompts` takes."""


@dataclass(frozen=True)
class PromptMixture:
    """Several sources of prompts, each drawn by its share.

    Raises:
        ValueError: If there are none, or a weight is no finite number > 0.
    """

    sources: Sequence[tuple[Any, float]]
    """Each a source as `read_prompts` takes it and its weight, the share of draws in any unit."""

    def __post_init__(self) -> None:
        """Check the weights."""
        if not self.sources:
            raise ValueError("prompts: expected at least one source, got none")
        for source, weight in self.sources:
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not number or not math.isfinite(weight) or weight <= 0:
                raise ValueError(f"prompts: expected a finite weight > 0 for {shown(source)}, got {shown(weight)}")

    @classmethod
    def of(cls, prompts: Any) -> PromptMixture:
        """A mixture as it is, a mapping from source to weight, or one source."""
        if isinstance(prompts, PromptMixture):
            return prompts
        return cls(tuple(prompts.items()) if isinstance(prompts, Mapping) else ((prompts, 1.0),))


def read_prompts(
    source: Any, *, column: str = "prompt", strict: bool = True, tell: Callable[[str], object] | None = None
) -> list[Prompt]:
    """Prompts as the user names them, still as text, ids or messages.

    Args:
        source: A `.txt` file (one a line); a `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file or a
            `datasets.Dataset`, or its folder on disk, with a column of prompts (in `.jsonl` and `.json` also bare
            strings and lists); or a sequence of strings, id lists, message lists or mappings.
        column: The column's name.
        strict: Whether a row that is no prompt is an error; otherwise it is skipped, and later indices move up.
        tell: Takes the line about skipped rows; None: `warnings.warn`.

    Returns:
        A list that is not empty.

    Raises:
        ValueError: If there are none, a file is missing, the name of one stands in a list, or, with `strict`, a row is
            no prompt.
    """
    if not _is_prompts(source):
        raise ValueError(
            f"prompts: expected a list, a dataset, or a {', '.join(PROMPT_SUFFIXES)} file, got {shown(source)}"
        )
    try:
        records = list(_records(source, column))
        if not records:
            raise ValueError(f"expected at least one prompt, got none from {shown(source)}")
        if not isinstance(source, str | Path):
            _check_no_files(records)
        return sift(source, records, lambda value: _prompt(value, column), strict=strict).told(tell)
    except ValueError as error:
        raise ValueError(f"prompts: {error}") from error


def _is_prompts(source: Any) -> bool:
    if isinstance(source, str | Path):
        # Here and below not Path's own methods, which raise for what is too long to be a name.
        return Path(source).suffix in PROMPT_SUFFIXES or os.path.isdir(source)
    one_split = not isinstance(getattr(source, "column_names", None), Mapping)
    return isinstance(source, Iterable) and not isinstance(source, Mapping) and one_split


def _records(source: Any, column: str) -> Iterator[Record]:
    if isinstance(source, str | Path) and Path(source).suffix == ".txt":
        return read_lines(Path(source))
    return read_records(source, [column])


def _check_no_files(records: Sequence[Record]) -> None:
    """Raise if the name of a file was given where a prompt was to be: it would be taken for a text."""
    for record in records:
        name = record.value
        if isinstance(name, str | Path) and Path(name).suffix in PROMPT_SUFFIXES and os.path.isfile(name):
            raise ValueError(
                f"{record.where}: expected a prompt, got the name of a file, {str(name)!r}; several files are given as "
                f"a mapping from each to its weight, {{{str(name)!r}: 1.0, ...}}"
            )


def _prompt(value: Any, column: str) -> Any:
    prompt = value.get(column) if isinstance(value, Mapping) else value
    if not isinstance(prompt, str | Sequence | np.ndarray):
        raise ValueError(f"expected text, ids, messages, or an object with {column!r}, got {shown(value)}")
    _check_form(prompt)
    return prompt


def _check_form(prompt: Any) -> None:
    """Raise unless this is text, a list of ids, or messages, and not empty."""
    if is_messages(prompt):
        _check_messages(prompt)
        return
    if not isinstance(prompt, str):
        try:
            array = np.asarray(prompt)
        except ValueError:  # lists of different lengths
            array = np.empty((0, 0))
        if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
            raise ValueError(f"expected text, a list of integer ids, or messages, got {shown(prompt)}")
    if not len(prompt):
        raise ValueError(f"expected at least one token, got an empty prompt, {prompt!r}")


def tokenize_prompts(
    prompts: Iterable[Prompt],
    tokenizer: Any,
    *,
    vocab_size: int,
    max_prompt_tokens: int | None = None,
    overflow: str = "error",
    chat_template: bool = False,
) -> list[list[int]]:
    """Token ids of prompts, each checked.

    Args:
        prompts: Strings (encoded with the tokenizer's own special tokens), messages (encoded by its chat template, up
            to where the answer begins) or id lists (taken as they are).
        tokenizer: None is enough for id lists.
        vocab_size: V; ids are in [0, V).
        max_prompt_tokens: The longest allowed; None: any.
        overflow: `error`, or `left`: keep the last `max_prompt_tokens` ids.
        chat_template: Whether a string is what the user says in a chat.

    Raises:
        ValueError: For an empty prompt, an id out of range, a prompt that is too long, text without a tokenizer, or
            messages without a chat template.
    """
    rows = list(prompts)
    given = [as_chat(row) if chat_template and isinstance(row, str) and row else row for row in rows]
    texts = [row for row in given if isinstance(row, str)]
    if texts and tokenizer is None:
        raise ValueError("tokenizer: expected one, because prompts holds text, got None")
    encoded = iter(tokenizer(texts)["input_ids"] if texts else ())
    result = []
    for number, (row, form) in enumerate(zip(rows, given, strict=True)):
        try:
            _check_form(row)
            if isinstance(form, str):
                ids: Any = next(encoded)
            else:
                ids = chat_ids(form, tokenizer) if is_messages(form) else form
            _check_ids(ids, row, vocab_size)
            if max_prompt_tokens is not None and len(ids) > max_prompt_tokens:
                if overflow == "error":
                    raise ValueError(
                        f"expected at most max_prompt_tokens={max_prompt_tokens} tokens, got {len(ids)} in "
                        f"{shown(row)}; a larger max_prompt_tokens would take it, prompt_overflow='left' cut it"
                    )
                ids = ids[-max_prompt_tokens:]
        except ValueError as error:
            raise ValueError(f"prompts: at {number}: {error}") from error
        result.append([int(token) for token in ids])
    return result


def closing_count(tokenizer: Any) -> int:
    """How many ids the tokenizer puts behind every text by itself, an EOS for instance."""
    bare, dressed = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    before = next(i for i in range(len(dressed) + 1) if dressed[i : i + len(bare)] == bare)
    return len(dressed) - before - len(bare)


def as_chat(text: str) -> list[Mapping[str, Any]]:
    """Messages in which the user says it."""
    return [{"role": "user", "content": text}]


def is_messages(prompt: Any) -> bool:
    """Whether this is a list of messages, not ids."""
    return isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping)


def chat_ids(messages: Any, tokenizer: Any, *, answer: bool = True) -> list[int]:
    """Token ids of messages by the tokenizer's chat template.

    Args:
        messages: Each with `role` and `content`.
        tokenizer: One with a chat template.
        answer: Whether the ids go on to where the assistant's answer begins.

    Raises:
        ValueError: `expected ..., got ...`, if there is no template, a message lacks a part, or the template refuses
            them.
    """
    if tokenizer is None or tokenizer.chat_template is None:
        raise ValueError("expected a tokenizer with a chat template for messages, got one without")
    _check_messages(messages)
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(messages), add_generation_prompt=answer, return_dict=False)
    except TemplateError as error:
        raise ValueError(f"expected messages that the chat template takes, got {error}") from error


def _check_messages(messages: Any) -> None:
    for message in messages:
        if not (isinstance(message, Mapping) and isinstance(message.get("role"), str) and "content" in message):
            raise ValueError(f"expected messages with 'role' and 'content', got {shown(message)}")


def _check_ids(ids: Sequence[int], prompt: Prompt, vocab_size: int) -> None:
    if not len(ids):
        raise ValueError(f"expected at least one token, got none from {shown(prompt)}")
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise ValueError(f"expected ids in [0, {vocab_size}), got {shown(prompt)}")
