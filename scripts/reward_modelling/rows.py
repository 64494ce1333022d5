"""Rows of a file as texts: columns by name, messages as the text that a reward function reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scripts.reward_modelling.examples import COLUMNS, Task, Text, as_label
from textenv.tables import read_rows

_TEXTS = ("prompt", "chosen", "rejected", "response")


@dataclass(frozen=True)
class Columns:
    """What the columns are called."""

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
    strict: bool = False,
    tell: Callable[[str], object],
) -> list[Mapping[str, Any]]:
    """Rows with plain texts and numbers.

    A row that is wrong is skipped and counted, and one line tells of it; with `strict` it is an error.

    Args:
        source: As of `textenv.tables.read_rows`.
        task: Says which columns are needed.
        columns: What they are called.
        tokenizer: Renders messages; None: there are none.
        split_by: A further column that is kept, under its own name.
        strict: Whether a bad row is an error.
        tell: Takes the line.

    Raises:
        ValueError: If nothing is left, or for the first bad row if `strict`.
    """
    names = asdict(columns)
    required, optional = [*COLUMNS[task]], ["prompt", *(["margin"] if task == "pairs" else [])]
    if split_by is not None and split_by not in (*required, *optional):
        required.append(split_by)
    used = {name: names[name] for name in (*required, *optional) if name in names}
    numbers = [name for name in ("rating", "margin") if name in used]
    rows = read_rows(source, required, optional=optional, columns=used, numbers=numbers, strict=strict, tell=tell)
    found, bad = [], []
    for number, row in enumerate(rows):
        try:
            found.append(_plain_row(row, tokenizer))
        except ValueError as error:
            bad.append(f"row {number}: {error}")
            if strict:
                raise ValueError(bad[0]) from error
    if not found:
        raise ValueError(f"data: expected rows of texts, got none of {len(rows)}; the first: {bad[0]}")
    if bad:
        tell(f"skipped {len(bad)} of {len(rows)} rows; the first: {bad[0]}")
    return found


def read_texts(
    source: Any, columns: Columns, tokenizer: Any, *, strict: bool, tell: Callable[[str], object]
) -> list[Text]:
    """Prompts and responses alone: the samples that scores are normalised on."""
    used = {"prompt": columns.prompt, "response": columns.response}
    rows = read_rows(source, ["response"], optional=["prompt"], columns=used, strict=strict, tell=tell)
    plain = [_plain_row(row, tokenizer) for row in rows]
    return [Text(row["prompt"] or "", row["response"]) for row in plain]


def _plain_row(row: Mapping[str, Any], tokenizer: Any) -> Mapping[str, Any]:
    plain = dict(row)
    for name in _TEXTS:
        if row.get(name) is not None:
            plain[name] = _plain(name, row[name], tokenizer)
    if "label" in row:
        plain["label"] = as_label(row["label"])
    return plain


def _plain(name: str, value: Any, tokenizer: Any) -> str:
    """Text as it is, messages as a reward function of strings reads them: rendered, without special tokens."""
    if isinstance(value, str):
        return value
    messages = isinstance(value, Sequence) and all(isinstance(m, Mapping) and "content" in m for m in value)
    if not messages or not value:
        raise ValueError(f"{name}: expected text or messages, got {value!r}")
    if name != "prompt":
        if len(value) != 1:
            raise ValueError(f"{name}: expected one message, the answer to the prompt, got {len(value)}")
        return value[0]["content"]
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("prompt: expected text, because the tokenizer has no chat template, got messages")
    rendered = tokenizer.apply_chat_template(list(value), tokenize=False, add_generation_prompt=True)
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
