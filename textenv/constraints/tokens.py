"""Constraints on token ids: lists, prefixes, lengths, and functions of one's own."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from textenv.constraints.base import Constraint, Rule, Vocabulary


def _ids(name: str, given: Any, vocabulary: Vocabulary) -> list[int]:
    ids: list[Any] = list(given) if isinstance(given, Sequence | np.ndarray | frozenset | set) else [None]
    if not all(isinstance(i, int | np.integer) and not isinstance(i, bool) and 0 <= i < vocabulary.size for i in ids):
        raise ValueError(f"{name}: expected token ids in [0, {vocabulary.size}), got {given!r}")
    return [int(i) for i in ids]


def _length(name: str, given: Any, vocabulary: Vocabulary) -> int:
    limit = vocabulary.max_new_tokens
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given <= limit:
        raise ValueError(f"{name}: expected an integer in [0, max_new_tokens={limit}], got {given!r}")
    return given


@dataclass(frozen=True)
class _Positions:
    """A rule that looks only at how many tokens there are; from the last mask on nothing changes."""

    masks: tuple[np.ndarray, ...]

    def start(self, prompt: tuple[int, ...]) -> int:
        return 0

    def advance(self, state: int, token: int) -> int:
        return min(state + 1, len(self.masks) - 1)

    def allowed(self, state: int) -> np.ndarray:
        return self.masks[state]


@dataclass(frozen=True)
class BadTokens:
    """These tokens are never chosen."""

    ids: Sequence[int]
    """Token ids; a stop token among them ends no response."""

    def bind(self, vocabulary: Vocabulary) -> Rule:
        """See `Constraint`."""
        mask = np.ones(vocabulary.size, dtype=bool)
        mask[_ids("BadTokens.ids", self.ids, vocabulary)] = False
        return _Positions((mask,))


@dataclass(frozen=True)
class KnownTokens:
    """Only tokens that the tokenizer has: the logits are often wider than that."""

    special: bool = False
    """Whether special tokens that are no stop tokens may be chosen too."""

    def bind(self, vocabulary: Vocabulary) -> Rule:
        """See `Constraint`."""
        if vocabulary.tokenizer is None:
            raise ValueError("tokenizer: expected one, because KnownTokens asks what it has, got None")
        mask = np.zeros(vocabulary.size, dtype=bool)
        mask[[i for i in vocabulary.tokenizer.get_vocab().values() if i < vocabulary.size]] = True
        if not self.special:
            mask[[i for i in vocabulary.tokenizer.all_special_ids if i < vocabulary.size]] = False
        mask[list(vocabulary.stop_token_ids)] = True
        return _Positions((mask,))


@dataclass(frozen=True)
class ForcedPrefix:
    """A response begins with these tokens."""

    ids: Sequence[int]
    """Token ids, at most `max_new_tokens`; only the last may be a stop token."""

    def bind(self, vocabulary: Vocabulary) -> Rule:
        """See `Constraint`."""
        ids = _ids("ForcedPrefix.ids", self.ids, vocabulary)
        _length("len(ForcedPrefix.ids)", len(ids), vocabulary)
        if set(ids[:-1]) & set(vocabulary.stop_token_ids):
            raise ValueError(f"ForcedPrefix.ids: expected no stop token before the last, got {ids}")
        masks = np.zeros((len(ids) + 1, vocabulary.size), dtype=bool)
        masks[range(len(ids)), ids] = True
        masks[-1] = True
        return _Positions(tuple(masks))


@dataclass(frozen=True)
class MinLength:
    """No stop token before the response has so many tokens without it."""

    tokens: int
    """At most `max_new_tokens`."""

    def bind(self, vocabulary: Vocabulary) -> Rule:
        """See `Constraint`."""
        count = _length("MinLength.tokens", self.tokens, vocabulary)
        free = np.ones(vocabulary.size, dtype=bool)
        barred = free.copy()
        barred[list(vocabulary.stop_token_ids)] = False
        return _Positions((barred,) * count + (free,))


@dataclass(frozen=True)
class Allow:
    """A function of the response so far says which tokens may follow.

    It is asked once for each state that is met, and must always answer the same.
    """

    function: Callable[[list[int]], Any]
    """`(response ids) -> allowed`: a boolean mask of V entries, or a list of token ids."""

    def bind(self, vocabulary: Vocabulary) -> Rule:
        """See `Constraint`."""
        return _Asked(self.function, vocabulary)


@dataclass(frozen=True)
class _Asked:
    function: Callable[[list[int]], Any]
    vocabulary: Vocabulary

    def start(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        return ()

    def advance(self, state: tuple[int, ...], token: int) -> tuple[int, ...]:
        return (*state, token)

    def allowed(self, state: tuple[int, ...]) -> np.ndarray:
        given = self.function(list(state))
        array = given.detach().cpu().numpy() if isinstance(given, torch.Tensor) else np.asarray(given)
        if array.dtype == bool and array.shape == (self.vocabulary.size,):
            return array.copy()  # the function may write to its own again
        mask = np.zeros(self.vocabulary.size, dtype=bool)
        if array.size == 0:
            return mask
        integers = np.issubdtype(array.dtype, np.integer) and array.ndim == 1
        if not integers or array.min() < 0 or array.max() >= self.vocabulary.size:
            raise ValueError(
                f"constraint: expected a boolean mask of {self.vocabulary.size} entries or ids below that, got "
                f"{array.dtype} of shape {array.shape} after the response {list(state)}"
            )
        mask[array] = True
        return mask


@dataclass(frozen=True)
class AllOf:
    """Tokens that every one of these allows."""

    parts: tuple[Constraint, ...]
    """At least one."""

    def bind(self, vocabulary: Vocabulary) -> Rule:
        """See `Constraint`."""
        return _Every(tuple(part.bind(vocabulary) for part in self.parts))


@dataclass(frozen=True)
class _Every:
    rules: tuple[Rule, ...]

    def start(self, prompt: tuple[int, ...]) -> tuple[Hashable, ...]:
        return tuple(rule.start(prompt) for rule in self.rules)

    def advance(self, state: tuple[Hashable, ...], token: int) -> tuple[Hashable, ...]:
        return tuple(rule.advance(part, token) for rule, part in zip(self.rules, state, strict=True))

    def allowed(self, state: tuple[Hashable, ...]) -> np.ndarray:
        masks = [np.asarray(rule.allowed(part)) for rule, part in zip(self.rules, state, strict=True)]
        return np.logical_and.reduce(masks)
