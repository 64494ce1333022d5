"""Constraints on text: regular expressions and JSON schemas, compiled by `outlines-core`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from textenv.constraints.base import MaskCache, Rule, Vocabulary
from textenv.constraints.pieces import token_bytes


def _outlines() -> ModuleType:
    try:
        import outlines_core
    except ImportError as error:
        raise ImportError("Regex and JSONSchema need outlines-core: pip install 'textenv[grammar]'") from error
    return outlines_core


@dataclass(frozen=True)
class Regex:
    r"""The text of a response matches a regular expression as a whole.

    The text is what a reward function of strings reads: with the leading space that SentencePiece and byte-level
    tokenizers put before a word, so a pattern usually begins with a space and a question mark. Special tokens are not
    text, and are barred. A stop token is allowed exactly where the text matches already.

    The syntax is that of `outlines-core`: no anchors, no look-around, no back-references.
    """

    pattern: str
    """Regular expression."""
    finish: bool = True
    """Whether a token is allowed only if the rest of the pattern and a stop token still fit into `max_new_tokens`, so
    that every response matches. False: one that reaches the limit is cut in the middle, and ends as LENGTH."""

    def bind(self, vocabulary: Vocabulary) -> Rule:
        """See `Constraint`."""
        return _compile(self.pattern, vocabulary, self.finish, "Regex.pattern")


@dataclass(frozen=True)
class JSONSchema:
    """The text of a response is JSON that fits a schema; see `Regex` for what the text is."""

    schema: Mapping[str, Any] | str
    """JSON schema, as a mapping or as text."""
    before: str = " ?"
    """Regular expression of what may stand before the JSON: by default the space that tokenizers put there."""
    whitespace: str | None = None
    """Regular expression of white space between tokens of JSON; None: that of `outlines-core`."""
    finish: bool = True
    """See `Regex`."""

    def bind(self, vocabulary: Vocabulary) -> Rule:
        """See `Constraint`."""
        text = self.schema if isinstance(self.schema, str) else json.dumps(self.schema)
        build = _outlines().json_schema.build_regex_from_schema
        try:
            pattern = build(text, self.whitespace)
        except (ValueError, TypeError) as error:
            raise ValueError(f"JSONSchema.schema: expected one that can be compiled, got {text} ({error})") from error
        return _compile(f"({self.before})({pattern})", vocabulary, self.finish, "JSONSchema.schema")


def _compile(pattern: str, vocabulary: Vocabulary, finish: bool, name: str) -> _Pattern:
    if vocabulary.tokenizer is None:
        raise ValueError("tokenizer: expected one, because a pattern speaks of text, got None")
    if not vocabulary.stop_token_ids:
        raise ValueError("stop_token_ids: expected at least one, for a text that matches must be able to end, got none")
    pieces = token_bytes(vocabulary.tokenizer, vocabulary.size, vocabulary.stop_token_ids)
    try:
        return _Pattern(_Index(pattern, pieces, vocabulary.size), vocabulary, finish)
    except ValueError as error:
        raise ValueError(f"{name}: expected what these tokens can spell and end, got {pattern!r} ({error})") from error


class _Index:
    """A pattern as an automaton over tokens.

    The pattern is compiled with a NUL behind it, which is a token of its own and part of no other: the text matches
    where NUL may follow. Without it, `outlines-core` 0.2.14 finds `1` and `1.5` in `1([.]5)?` but cannot spell the
    second as `1`, `.`, `5`: its automaton sees a match one byte late, and it drops tokens after which a shorter text
    has matched and the longer one has not yet.
    """

    def __init__(self, pattern: str, pieces: Mapping[int, bytes], size: int) -> None:
        self._end, outlines = size, _outlines()
        by_text: dict[bytes, list[int]] = {b"\0": [self._end]}
        for token, text in pieces.items():
            if b"\0" not in text:
                by_text.setdefault(text, []).append(token)
        # An end token that there is none of: which of ours end a response is the environment's business.
        self._index = outlines.Index(f"({pattern})\\x00", outlines.Vocabulary(size + 1, by_text))
        self.first: int = self._index.get_initial_state()

    def tokens(self, state: int) -> list[int]:
        """What may follow; at the end of the list `size`, if the text matches."""
        return sorted(t for t in self._index.get_allowed_tokens(state) or () if t <= self._end)

    def matches(self, tokens: list[int]) -> bool:
        """Whether the text matches where these may follow."""
        return bool(tokens) and tokens[-1] == self._end

    def following(self, state: int, token: int) -> int:
        """The state after a token."""
        return self._index.get_next_state(state, token)

    def distances(self) -> dict[int, float]:
        """How many tokens each state is from the nearest one where the text matches; infinite if there is no way."""
        before: dict[int, set[int]] = {self.first: set()}
        waiting, ring = [self.first], set()
        while waiting:
            state = waiting.pop()
            tokens = self.tokens(state)
            if self.matches(tokens):
                ring.add(state)
                tokens.pop()
            for following in {self.following(state, token) for token in tokens}:
                if following not in before:
                    before[following] = set()
                    waiting.append(following)
                before[following].add(state)
        distances, steps = dict.fromkeys(before, float("inf")), 0
        while ring:
            distances |= dict.fromkeys(ring, float(steps))
            ring = {earlier for state in ring for earlier in before[state] if distances[earlier] == float("inf")}
            steps += 1
        return distances


class _Pattern:
    """States are `(state of the index, tokens left)`."""

    def __init__(self, index: _Index, vocabulary: Vocabulary, finish: bool) -> None:
        self.index, self.vocabulary = index, vocabulary
        self._masks = MaskCache(vocabulary.size)
        self._distances = index.distances() if finish else None
        self._horizon = 0.0  # with so many tokens left it does not matter how many there are
        if self._distances is not None:
            self._horizon = max(self._distances.values()) + 2
            shortest = self._distances[index.first] + 1
            if shortest > vocabulary.max_new_tokens:
                raise ValueError(f"it needs {shortest:.0f} tokens, and max_new_tokens is {vocabulary.max_new_tokens}")

    def start(self, prompt: tuple[int, ...]) -> tuple[int, int]:
        return self.index.first, self.vocabulary.max_new_tokens

    def advance(self, state: tuple[int, int], token: int) -> tuple[int, int]:
        return self.index.following(state[0], token), state[1] - 1

    def allowed(self, state: tuple[int, int]) -> np.ndarray:
        # Few tokens left are a state of their own; otherwise all rows at one place of the pattern share a mask.
        place, left = state[0], min(state[1], self._horizon)
        return self._masks.get((place, left), lambda: self._mask(place, left))

    def _mask(self, place: int, left: float) -> np.ndarray:
        tokens = self.index.tokens(place)
        matches = self.index.matches(tokens)
        if matches:
            tokens.pop()
        if self._distances is not None and left < self._horizon:
            # After this token there must be room for the rest and for the stop token.
            room = left - 2
            tokens = [token for token in tokens if self._distances[self.index.following(place, token)] <= room]
        mask = np.zeros(self.vocabulary.size, dtype=bool)
        mask[tokens] = True
        mask[list(self.vocabulary.stop_token_ids)] = matches
        return mask
