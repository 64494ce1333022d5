"""Rows of a file as texts: columns by name, messages as the text that a reward function reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from scripts.reward_modelling.examples import COLUMNS, GROUP, Task, Text, as_label
from textenv.prompts import as_chat, chat_ids, is_messages
from textenv.table_files import shown
from textenv.tables import Names, Reading, parse_rows

_RESPONSES = ("chosen", "rejected", "response")


@dataclass(frozen=True)
class Columns:
    """What the columns are called; one that may be absent must be there if it is called otherwise than here."""

    prompt: str = "prompt"
    """Text or messages before the response; may be absent or empty."""
    chosen: str = "chosen"
    """The better response of a pair."""
    rejected: str = "rejected"
    """The worse response of a pair."""
    margin: str = "margin"
    """By how much the better one must win, in log-odds; may be absent."""
    response: str = "response"
    """A response that was rated or labelled."""
    rating: str = "rating"
    """A number; more is better."""
    label: str = "label"
    """1, true, good or yes; 0, false, bad or no."""


def read(
    source: Any,
    task: Task,
    columns: Columns,
    tokenizer: Any,
    *,
    split_by: str | None = None,
    chat_template: bool = False,
    strict: bool = False,
) -> Reading[dict[str, Any]]:
    """Rows with plain texts and numbers.

    Args:
        source: As of `textenv.tables.read_rows`.
        task: Says which columns are needed.
        columns: What they are called.
        tokenizer: Renders messages; None: there are none.
        split_by: A column that each row must have, whose values are the groups of `split`; that of the prompts is as
            None: what has no prompt is a group of its own.
        chat_template: Whether a prompt that is text is what the user says in the tokenizer's chat template.
        strict: Whether bad rows are an error, or counted and skipped.

    Raises:
        ValueError: If nothing is left, or a column is missing; with `strict`, if a row is bad.
    """
    required, optional = [*COLUMNS[task]], ["prompt", *(["margin"] if task == "pairs" else [])]
    names = _names(required, optional, columns)
    if split_by not in (None, columns.prompt):
        names = replace(names, required=[*required, GROUP], columns={**names.columns, GROUP: split_by})
    return parse_rows(source, names, lambda row: _plain_row(row, names, tokenizer, chat_template), strict=strict)


def read_texts(
    source: Any, columns: Columns, tokenizer: Any, *, chat_template: bool = False, strict: bool = False
) -> Reading[Text]:
    """Prompts and responses alone, read alike: the samples that scores are normalised on."""
    names = _names(["response"], ["prompt"], columns)

    def text(row: dict[str, Any]) -> Text:
        plain = _plain_row(row, names, tokenizer, chat_template)
        return Text(plain["prompt"] or "", plain["response"])

    return parse_rows(source, names, text, strict=strict)


def _names(required: Sequence[str], optional: Sequence[str], columns: Columns) -> Names:
    called = {name: column for name, column in asdict(columns).items() if name in (*required, *optional)}
    return Names(required, optional, called, [name for name in ("rating", "margin") if name in called])


def _plain_row(row: dict[str, Any], names: Names, tokenizer: Any, chat_template: bool) -> dict[str, Any]:
    """The row with text for messages and a number for a label."""
    for name in _RESPONSES:
        if name in row:
            row[name] = _response(row[name], names.column(name))
    row["prompt"] = _prompt(row["prompt"], names.column("prompt"), tokenizer, chat_template)
    if "label" in row:
        row["label"] = as_label(row["label"], names.column("label"))
    return row


def _response(value: Any, column: str) -> str:
    """Text as it is, or what the one message of an answer says."""
    said = value[0].get("content") if is_messages(value) and len(value) == 1 else value
    if not isinstance(said, str):
        raise ValueError(f"expected text or one message, the answer to the prompt, for {column!r}, got {shown(value)}")
    return said


def _prompt(value: Any, column: str, tokenizer: Any, chat_template: bool) -> str | None:
    """Text as it is, a chat as a reward function of strings reads it: rendered, without special tokens."""
    if value and isinstance(value, str) and chat_template:
        value = as_chat(value)
    if is_messages(value):
        ids = chat_ids(value, tokenizer)
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"expected text or messages for {column!r}, got {shown(value)}")
    return value
