"""Which prompt each row begins with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from textenv.task import Task


def choose_prompts(
    task: Task, rows: np.ndarray, rngs: Sequence[np.random.Generator], options: Mapping[str, Any]
) -> tuple[list[int], list[list[int]]]:
    """A prompt for each row that begins, and its index in the task's prompts (−1: it is none of them).

    Args:
        task: Its prompts and limits.
        rows: `[r]` int64, ascending.
        rngs: One generator for each of the N rows; a row draws its prompt from its own.
        options: `prompt_index` (an int, or one for each of the N rows) or `prompt` (text, ids or messages, or a list of
            N).

    Raises:
        ValueError: For an unknown option or an impossible prompt.
    """
    unknown = set(options) - {"prompt_index", "prompt"}
    if unknown or len(options) > 1:
        raise ValueError(f"options: expected 'prompt_index' or 'prompt', got {sorted(map(str, options))}")
    if "prompt" in options:
        return [-1] * len(rows), task.tokenize(_per_row_prompts(options["prompt"], rows, len(rngs)))
    count = len(task.prompts)
    if "prompt_index" in options:
        indices = _per_row_indices(options["prompt_index"], rows, len(rngs), count)
    else:
        indices = [task.draw_prompt(rngs[row]) for row in rows]
    return indices, [task.prompts[index] for index in indices]


def _per_row_prompts(prompt: Any, rows: np.ndarray, count: int) -> list[Any]:
    """One prompt for all, or one for each of the N rows."""
    if not isinstance(prompt, str | Sequence | np.ndarray):
        raise ValueError(f"options['prompt']: expected text, ids, or a list of {count} of them, got {prompt!r}")
    if isinstance(prompt, str) or len(prompt) == 0 or isinstance(prompt[0], int | np.integer | Mapping):
        return [prompt] * len(rows)
    if len(prompt) != count:
        raise ValueError(f"options['prompt']: expected one prompt or a list of {count}, got {len(prompt)}")
    return [prompt[row] for row in rows]


def _per_row_indices(index: Any, rows: np.ndarray, count: int, prompts: int) -> list[int]:
    try:
        array = np.asarray(index)
    except ValueError:  # ragged
        array = np.empty(0)
    if not np.issubdtype(array.dtype, np.integer) or array.shape not in ((), (count,)):
        raise ValueError(f"options['prompt_index']: expected an integer or {count} of them, got {index!r}")
    chosen = np.broadcast_to(array, (count,))[rows]
    if (chosen < 0).any() or (chosen >= prompts).any():
        raise ValueError(f"options['prompt_index']: expected indices in [0, {prompts}), got {index!r}")
    return chosen.tolist()
