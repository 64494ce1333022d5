"""Prompts: read them, tokenize them, and draw them in a seeded order."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Prompt = str | Sequence[int]


def read_prompts(source: Any) -> list[Prompt]:
    """Prompts as the user names them, still as text or ids.

    Args:
        source: A `.txt` file (one a line), a `.jsonl` file (strings, id lists, or objects with `prompt`), a sequence
            of strings or id lists, or a `datasets.Dataset` with a column `prompt`.

    Returns:
        A list that is not empty.

    Raises:
        ValueError: If there are none, a file is missing, or a row is neither text nor ids.
    """
    if isinstance(source, Path) or (isinstance(source, str) and source.endswith((".txt", ".jsonl"))):
        prompts: list[Prompt] = _read_file(Path(source))
    elif isinstance(source, str | Mapping) or not isinstance(source, Iterable):
        raise ValueError(f"prompts: expected a list, a dataset, or a .txt or .jsonl file, got {_short(source)}")
    else:
        columns = getattr(source, "column_names", None)
        if columns is not None and "prompt" not in columns:
            raise ValueError(f"prompts: expected a dataset with a column 'prompt', got columns {columns}")
        rows: Any = source
        prompts = list(rows if columns is None else rows["prompt"])
    if not prompts:
        raise ValueError(f"prompts: expected at least one prompt, got none from {_short(source)}")
    return prompts


def _short(source: Any) -> str:
    text = repr(source)
    return text if len(text) <= 80 else text[:77] + "..."


def _read_file(path: Path) -> list[Prompt]:
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"prompts: expected a .txt or .jsonl file, got {str(path)!r}")
    try:
        # Not splitlines(): it also splits at U+2028 and its like, which JSON strings may hold.
        lines = path.read_text(encoding="utf8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts: expected a readable text file, got {str(path)!r} ({error})") from error
    if path.suffix == ".txt":
        return [line for line in lines if line.strip()]
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            prompts.append(_json_prompt(line, f"{path}:{number}"))
    return prompts


def _json_prompt(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"prompts: expected JSON at {where}, got {_short(line)} ({error.msg})") from error
    prompt = row.get("prompt") if isinstance(row, dict) else row
    if not isinstance(prompt, str | list):
        raise ValueError(f"prompts: expected text, ids, or an object with 'prompt' at {where}, got {_short(row)}")
    return prompt


def tokenize_prompts(
    prompts: Iterable[Prompt],
    tokenizer: Any,
    *,
    vocab_size: int,
    max_prompt_tokens: int | None = None,
    overflow: str = "error",
) -> list[list[int]]:
    """Token ids of prompts, each checked.

    Args:
        prompts: Strings (encoded with the tokenizer's own special tokens) or id lists (taken as they are).
        tokenizer: None is enough for id lists.
        vocab_size: V; ids are in [0, V).
        max_prompt_tokens: The longest allowed; None: any.
        overflow: `error`, or `left`: keep the last `max_prompt_tokens` ids.

    Raises:
        ValueError: For an empty prompt, an id out of range, a prompt that is too long, or text without a tokenizer.
    """
    rows = list(prompts)
    texts = [row for row in rows if isinstance(row, str)]
    if texts and tokenizer is None:
        raise ValueError("tokenizer: expected one, because prompts holds text, got None")
    encoded = iter(tokenizer(texts)["input_ids"] if texts else ())
    result = []
    for number, row in enumerate(rows):
        ids = _check_ids(next(encoded) if isinstance(row, str) else row, row, number, vocab_size)
        if max_prompt_tokens is not None and len(ids) > max_prompt_tokens:
            if overflow == "error":
                raise ValueError(
                    f"prompts: expected at most max_prompt_tokens={max_prompt_tokens} tokens, got {len(ids)} in prompt "
                    f"{number} ({_short(row)}); a larger max_prompt_tokens would take it, prompt_overflow='left' cut it"
                )
            ids = ids[-max_prompt_tokens:]
        result.append(ids)
    return result


def _check_ids(ids: Sequence[int], prompt: Prompt, number: int, vocab_size: int) -> list[int]:
    if isinstance(prompt, str) and not prompt:
        raise ValueError(f"prompts: expected text or ids, got an empty prompt at {number}")
    try:
        array = np.asarray(ids)
    except ValueError:
        array = np.empty((0, 0))
    if array.ndim == 1 and array.size == 0:
        raise ValueError(f"prompts: expected at least one token, got an empty prompt at {number} ({_short(prompt)})")
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"prompts: expected a string or a list of integer ids at {number}, got {_short(prompt)}")
    if array.min() < 0 or array.max() >= vocab_size:
        raise ValueError(f"prompts: expected ids in [0, {vocab_size}), got {_short(prompt)} at {number}")
    return [int(token) for token in array]


class PromptStream:
    """Prompt indices in seeded epochs without repetition, each repeated `group` times in a row.

    The order is a pure function of `(seed, epoch)`; the position is all that a checkpoint keeps.

    >>> sorted(PromptStream(3, seed=0).take(3))
    [0, 1, 2]
    """

    def __init__(self, size: int, *, seed: int, group: int = 1) -> None:
        """A stream over `size` prompts."""
        if size < 1 or group < 1:
            raise ValueError(f"size, group: expected integers >= 1, got {size} and {group}")
        self.size, self.seed, self.group = size, seed, group
        self.position = 0
        """Draws so far, counting each of a group."""

    def take(self, count: int) -> list[int]:
        """The next `count` prompt indices."""
        draws = range(self.position, self.position + count)
        self.position += count
        orders: dict[int, np.ndarray] = {}
        indices = []
        for draw in draws:
            epoch, place = divmod(draw // self.group, self.size)
            if epoch not in orders:
                orders[epoch] = np.random.default_rng((self.seed, epoch)).permutation(self.size)
            indices.append(int(orders[epoch][place]))
        return indices

    def state_dict(self) -> dict[str, int]:
        """The position."""
        return {"seed": self.seed, "position": self.position, "group": self.group, "size": self.size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a position in the same stream."""
        if (state["size"], state["group"]) != (self.size, self.group):
            raise ValueError(
                f"prompts: expected the checkpoint's {state['size']} prompts in groups of {state['group']}, "
                f"got {self.size} in groups of {self.group}"
            )
        self.seed, self.position = state["seed"], state["position"]
