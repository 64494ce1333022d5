"""What a constraint is, and what it becomes beside a loaded task."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

CACHE_BYTES = 2**26
"""How much the masks of states met before may take."""


@dataclass(frozen=True)
class Vocabulary:
    """What a constraint is bound to."""

    size: int
    """V, the width of the logits."""
    stop_token_ids: tuple[int, ...]
    """Ids that end a response."""
    max_new_tokens: int
    """The longest response."""
    tokenizer: Any
    """A Hugging Face tokenizer, or None."""


class Rule(Protocol):
    """A constraint beside its vocabulary: an automaton over token ids.

    The state is a function of the prompt and the response so far, hashable, and of no meaning to others. Two texts in
    one state have one allowed set, which is what lets a batch share masks.
    """

    def start(self, prompt: tuple[int, ...]) -> Hashable:
        """The state before the first token of a response."""
        ...

    def advance(self, state: Any, token: int) -> Hashable:
        """The state after an allowed token that ends nothing."""
        ...

    def allowed(self, state: Any) -> Any:
        """`[V]` bool, an array or a tensor that is not written to later: which tokens may be chosen in this state."""
        ...


@runtime_checkable
class Constraint(Protocol):
    """Something that says, once it knows the vocabulary, which tokens may be chosen in a state."""

    def bind(self, vocabulary: Vocabulary) -> Rule:
        """Its rule over this vocabulary.

        Raises:
            ValueError: If it does not fit.
        """
        ...


def as_constraint(given: Any) -> Constraint | None:
    """A constraint, a function of the response, or several of them (all must allow a token); None: none.

    Raises:
        ValueError: If it is none of these.
    """
    # Here, not at the top: the tools are constraints themselves.
    from textenv.constraints.tokens import AllOf, Allow

    if given is None or isinstance(given, Constraint):
        return given
    if callable(given):
        return Allow(given)
    parts = [as_constraint(part) for part in given] if isinstance(given, list | tuple) else []
    if not parts or None in parts:
        raise ValueError(f"constraint: expected a constraint, a function of the response, or a list, got {given!r}")
    return parts[0] if len(parts) == 1 else AllOf(tuple(part for part in parts if part is not None))


class MaskCache:
    """The masks of states met lately, as many as fit into `CACHE_BYTES`."""

    def __init__(self, vocab_size: int) -> None:
        """Empty."""
        self._room = max(16, CACHE_BYTES // vocab_size)
        self._masks: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, state: Hashable, make: Callable[[], Any]) -> Any:
        """The mask of a state, made if it is not there."""
        if state in self._masks:
            self._masks.move_to_end(state)
            return self._masks[state]
        mask = self._masks[state] = make()
        if len(self._masks) > self._room:
            self._masks.popitem(last=False)
        return mask

    def __len__(self) -> int:
        return len(self._masks)


class BoundConstraint:
    """A constraint at work: rules, and the masks of states met before.

    What an agent needs to draw from the renormalised law: `start` a state for each row, ask `masks(states)`, and
    `advance` each with the token it chose.
    """

    def __init__(self, constraint: Constraint, vocabulary: Vocabulary, device: torch.device) -> None:
        """Bind it.

        Raises:
            ValueError: If it does not fit the vocabulary.
        """
        self.constraint, self.vocabulary, self.device = constraint, vocabulary, device
        self._rule = constraint.bind(vocabulary)
        self._masks = MaskCache(vocabulary.size)

    def __repr__(self) -> str:
        return repr(self.constraint)

    def start(self, prompt: Sequence[int]) -> Hashable:
        """The state of an empty response."""
        return self._rule.start(tuple(prompt))

    def advance(self, state: Hashable, token: int) -> Hashable:
        """The state after one more token."""
        return self._rule.advance(state, token)

    def mask(self, state: Hashable) -> Tensor:
        """`[V]` bool on the host, not to be written to: the allowed set of a state.

        Raises:
            ValueError: If the rule gives something else.
        """
        return self._masks.get(state, lambda: self._ask(state))

    def _ask(self, state: Hashable) -> Tensor:
        given = self._rule.allowed(state)
        mask = given.detach().cpu() if isinstance(given, Tensor) else torch.from_numpy(np.asarray(given))
        if mask.dtype != torch.bool or tuple(mask.shape) != (self.vocabulary.size,):
            raise ValueError(
                f"constraint: expected a boolean mask of shape ({self.vocabulary.size},), got {mask.dtype} of "
                f"{tuple(mask.shape)} from {self.constraint!r}"
            )
        return mask

    def masks(self, states: Sequence[Hashable]) -> Tensor:
        """`[n, V]` bool on the device, not to be written to: the allowed sets of n states."""
        places: dict[Hashable, int] = {}
        index = [places.setdefault(state, len(places)) for state in states]
        table = torch.stack([self.mask(state) for state in places]).to(self.device)
        if len(places) == 1:
            return table.expand(len(index), -1)
        return table if len(places) == len(index) else table[torch.tensor(index, device=self.device)]

    def walk(self, prompt: Sequence[int], response: Sequence[int], where: str) -> list[Hashable]:
        """The state before each token of a response.

        Args:
            prompt: Token ids.
            response: Token ids.
            where: What to call it in an error.

        Raises:
            ValueError: If a token is outside the allowed set.
        """
        states = [self.start(prompt)]
        for step, token in enumerate(response):
            if not self.mask(states[-1])[token]:
                raise ValueError(
                    f"responses: expected tokens that the constraint allows, got {token} at position {step} in {where}"
                )
            if step + 1 < len(response):
                states.append(self.advance(states[-1], token))
        return states

    def grid(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> AllowedGrid:
        """The allowed sets all along whole responses, each token checked; B of both.

        Raises:
            ValueError: Naming row and position of a token that is not allowed.
        """
        pairs = enumerate(zip(prompts, responses, strict=True))
        return AllowedGrid(self, [self.walk(prompt, response, f"row {row}") for row, (prompt, response) in pairs])


@dataclass(frozen=True)
class AllowedGrid:
    """The allowed sets of B responses at each of their tokens; masks are made when they are asked for."""

    constraint: BoundConstraint
    """Whose sets they are."""
    states: list[list[Hashable]]
    """The state before token t of row b."""

    def __call__(self, rows: Tensor, steps: Tensor) -> Tensor:
        """`[n, V]` bool, of rows `[n]` at steps `[n]`."""
        pairs = zip(rows.tolist(), steps.tolist(), strict=True)
        return self.constraint.masks([self.states[row][step] for row, step in pairs])


Allowed = Callable[[Tensor, Tensor], Tensor]
"""`(rows [n], steps [n]) -> [n, V]` bool, as `AllowedGrid`."""
