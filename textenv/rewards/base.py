"""The reward protocol: what a reward function is given, what it may return, and how that is checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch


class RewardFunction(Protocol):
    """A callable `(prompts, responses) -> scores`, one number a response.

    It is given strings. Two attributes, both False where absent, change that:

    - `wants_ids = True`: it is given lists of token ids, a stop token included.
    - `per_token = True` (with `wants_ids`): it returns, for each response, one value per token. Value t may depend only
      on the prompt and the tokens up to t, because the environment pays it at step t, before the rest is known.
    """

    def __call__(self, prompts: Sequence[Any], responses: Sequence[Any]) -> Any:
        """Score responses."""
        ...


@dataclass(frozen=True)
class TextDecoder:
    """Strings of token ids, the way reward functions see them."""

    tokenizer: Any
    """A Hugging Face tokenizer."""
    stop_token_ids: frozenset[int]
    """Ids that are cut off the end of a response."""

    def __call__(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> tuple[list[str], list[str]]:
        """Prompt and response texts, without special and stop tokens.

        A response is decode(prompt + response) with decode(prompt) cut off: decoded alone it would lose the leading
        space of SentencePiece. Where the two share a character (bytes of one letter on both sides), the common part
        is the prompt's.
        """
        bodies = [list(r[:-1]) if len(r) and r[-1] in self.stop_token_ids else list(r) for r in responses]
        wholes = self._decode([list(p) + body for p, body in zip(prompts, bodies, strict=True)])
        starts = self._decode([list(p) for p in prompts])
        return starts, [whole[_common(whole, start) :] for whole, start in zip(wholes, starts, strict=True)]

    def _decode(self, rows: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _common(whole: str, start: str) -> int:
    """How many characters the two begin with in common."""
    if whole.startswith(start):
        return len(start)
    return next(i for i, (a, b) in enumerate(zip(whole + "\0", start + "\1", strict=False)) if a != b)


@dataclass(frozen=True)
class Reward:
    """A reward function with its inputs prepared and its answers checked."""

    function: RewardFunction
    """The user's."""
    decoder: TextDecoder | None
    """None if the function wants ids."""
    per_token: bool
    """Whether it returns one value per token."""

    def scores(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> np.ndarray:
        """One score a response, float32 `[n]`."""
        return np.array([values.sum() for values in self._ask(prompts, responses)], dtype=np.float32)

    def token_values(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """One value per token, a float32 array for each response."""
        return self._ask(prompts, responses)

    def _ask(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[np.ndarray]:
        if not prompts:
            return []
        shown = ([list(p) for p in prompts], [list(r) for r in responses])
        given = self.decoder(*shown) if self.decoder else shown
        try:
            answers = self.function(*given)
        except Exception as error:
            if len(prompts) > 1:
                self._find_culprit(*given, error)
            raise ValueError(f"reward: raised {_describe(error)} for {_where(given, 0)}") from error
        return self._checked(answers, given)

    def _find_culprit(self, prompts: Sequence[Any], responses: Sequence[Any], error: Exception) -> None:
        """Ask again one by one, so that the error can say which response it was."""
        for row in range(len(prompts)):
            try:
                self.function(prompts[row : row + 1], responses[row : row + 1])
            except Exception as again:
                where = _where((prompts, responses), row)
                raise ValueError(f"reward: raised {_describe(again)} for {where}") from error
        raise ValueError(
            f"reward: raised {_describe(error)} for {len(prompts)} responses together, the first being "
            f"{_where((prompts, responses), 0)}"
        ) from error

    def _checked(self, answers: Any, given: tuple[Sequence[Any], Sequence[Any]]) -> list[np.ndarray]:
        responses = given[1]
        if isinstance(answers, torch.Tensor):
            answers = answers.detach().float().cpu().numpy()
        if not isinstance(answers, Sequence | np.ndarray) or len(answers) != len(responses):
            raise ValueError(f"reward: expected {len(responses)} scores, one a response, got {_count(answers)}")
        rows = []
        for row, answer in enumerate(answers):
            values = _as_array(answer)
            expected = (len(responses[row]),) if self.per_token else ()
            if values is None or values.shape != expected:
                wanted = _expected(self.per_token, responses[row])
                raise ValueError(f"reward: expected {wanted}, got {answer!r} for {_where(given, row)}")
            if not np.isfinite(values).all():
                raise ValueError(f"reward: expected finite scores, got {answer!r} for {_where(given, row)}")
            rows.append(values)
        return rows


def _as_array(answer: Any) -> np.ndarray | None:
    try:
        if isinstance(answer, torch.Tensor):
            answer = answer.detach().float().cpu().numpy()
        return np.asarray(answer, dtype=np.float32)
    except (TypeError, ValueError):
        return None


def _expected(per_token: bool, response: Any) -> str:
    if per_token:
        return f"{len(response)} values, one per token"
    return "one number a response (an object that returns one value per token says so with per_token = True)"


def _count(answers: Any) -> str:
    return f"{len(answers)}" if isinstance(answers, Sequence | np.ndarray) else repr(answers)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _where(given: tuple[Sequence[Any], Sequence[Any]], row: int) -> str:
    return f"prompt {given[0][row]!r} and response {given[1][row]!r}"


def as_reward(function: Any, *, tokenizer: Any, stop_token_ids: Sequence[int]) -> Reward:
    """Prepare a reward function.

    Args:
        function: A callable or reward object.
        tokenizer: Decodes for functions that want strings; may be None for those that want ids.
        stop_token_ids: Cut off the end of the strings.

    Raises:
        ValueError: If it is not callable, wants strings without a tokenizer, or is per token without ids.
    """
    if not callable(function):
        raise ValueError(
            f"reward: expected a folder, a hub name or a callable (prompts, responses) -> scores, got {function!r}"
        )
    wants_ids = bool(getattr(function, "wants_ids", False))
    per_token = bool(getattr(function, "per_token", False))
    if per_token and not wants_ids:
        raise ValueError("reward: expected wants_ids = True with per_token = True (text has no tokens), got False")
    if not wants_ids and tokenizer is None:
        raise ValueError("tokenizer: expected one, because the reward is given text, got None")
    decoder = None if wants_ids else TextDecoder(tokenizer, frozenset(stop_token_ids))
    return Reward(function, decoder, per_token)
