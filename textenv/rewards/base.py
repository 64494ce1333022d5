"""The reward protocol: what a reward function is given, what it may return, and what it may say of itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch


class RewardFunction(Protocol):
    """A callable `(prompts, responses) -> scores`, one number a response.

    It is given strings. Three attributes, which a plain function does not have, change that:

    - `wants_ids = True`: it is given lists of token ids, a stop token included.
    - `per_token = True` (with `wants_ids`): it returns, for each response, one value per token. Value t may depend only
      on the prompt and the tokens up to t, because the environment pays it at step t, before the rest is known.
    - `part_names = ("a", "b")`: it returns `Scores(total, parts)`, the parts under these names and of the same form as
      the total. Infos, records and metrics show them; only the total is paid.
    """

    def __call__(self, prompts: Sequence[Any], responses: Sequence[Any]) -> Any:
        """Score responses."""
        ...


class Scores(NamedTuple):
    """An answer that says what it was made of."""

    total: Any
    """What is paid: one number a response, or one array a response of a function with `per_token`."""
    parts: Mapping[str, Any] = MappingProxyType({})
    """By name, each of the form of `total`."""


class RewardError(ValueError):
    """A reward function raised, or gave an answer that is none; the message shows prompt and response."""


@dataclass(frozen=True)
class RewardContext:
    """What a reward learns of the environment that it will serve: the argument of the optional method `bind`."""

    tokenizer: Any = None
    """The environment's tokenizer; None if it has none."""
    stop_token_ids: frozenset[int] = frozenset()
    """Ids that end a response."""
    max_new_tokens: int | None = None
    """Longest response; None: not known."""
    device: str | torch.device = "cpu"
    """Where a reward model that is named by its folder runs."""
    dtype: torch.dtype = torch.float32
    """Its floating-point type."""
    trust_remote_code: bool = False
    """Whether its folder may bring Python code."""
    place: str = "reward"
    """What errors call the reward that is bound."""

    def within(self, label: str) -> RewardContext:
        """What a reward learns that this one is made of.

        >>> RewardContext().within("reward 'style'").within("reward 'raw'").place
        "reward 'raw' of reward 'style'"
        """
        return replace(self, place=label if self.place == "reward" else f"{label} of {self.place}")

    @property
    def decoder(self) -> TextDecoder:
        """How ids read.

        Raises:
            ValueError: If there is no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("tokenizer: expected one, because the reward is given text, got None")
        return TextDecoder(self.tokenizer, self.stop_token_ids)


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


_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*", re.ASCII)
RESERVED = frozenset({"score", "kl", "missing_eos", "mean", "std"})
"""What infos and metrics call their own beside the parts."""


def check_names(names: Sequence[str], *, argument: str, reserved: bool = False) -> tuple[str, ...]:
    """Names of parts: letters, digits and `_.-`, in levels divided by slashes.

    Args:
        names: Of the parts.
        argument: For error messages.
        reserved: Whether the names of the environment's own parts are refused.

    Raises:
        ValueError: For a name of another form, a name given twice, or a reserved one.
    """
    if isinstance(names, str):
        raise ValueError(f"{argument}: expected a sequence of names, got the string {names!r}")
    for name in names:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{argument}: expected names of letters, digits and '_.-', got {name!r}")
        if reserved and name in RESERVED:
            raise ValueError(f"{argument}: expected none of {', '.join(sorted(RESERVED))}, got {name!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"{argument}: expected each name once, got {list(names)}")
    return tuple(names)
