"""A reward function that is bound to an environment: its inputs prepared, its answers checked and paid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from textenv.rewards.base import RewardError, RewardFunction, Scores, TextDecoder

Ids = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Reward:
    """A reward function with its inputs prepared and its answers checked. It is asked in token ids, always."""

    function: RewardFunction
    """The user's, bound."""
    decoder: TextDecoder | None
    """None if the function wants ids."""
    per_token: bool
    """Whether it returns one value per token."""
    part_names: tuple[str, ...] = ()
    """What it says its answers are made of."""
    outcome: Reward | None = None
    """With `per_token`: a response-level reward that is paid on top, at the end."""
    label: str = "reward"
    """What errors call it."""

    @property
    def names(self) -> tuple[str, ...]:
        """The parts of what is paid; those of the outcome among them."""
        outcome = () if self.outcome is None else self.outcome.names
        return tuple(dict.fromkeys((*self.part_names, *outcome)))

    # ------------------------------------------------------------------------------------------------- asking

    def scores(self, prompts: Ids, responses: Ids) -> np.ndarray:
        """One score a response, float32 `[n]`; dense values summed."""
        return self.whole(prompts, responses).total

    def whole(self, prompts: Ids, responses: Ids) -> Scores:
        """The score of each response and of its parts, float32 `[n]` each."""
        paid = self.pay(prompts, responses, [True] * len(prompts))
        return Scores(_sums(paid.total), {name: _sums(rows) for name, rows in paid.parts.items()})

    def pay(self, prompts: Ids, responses: Ids, ended: Sequence[bool]) -> Scores:
        """What each token is paid: a float32 array `[T]` for each response, of the total and of each part.

        Args:
            prompts: n prompts.
            responses: n responses, T tokens each, or what there is of them yet.
            ended: n flags: where a response-level score is due, which the last token is paid.

        Raises:
            RewardError: If the function raises or its answer is none.
        """
        if not self.per_token:
            return self._pay_at_end(prompts, responses, ended)
        dense = self.ask(prompts, responses)
        return dense if self.outcome is None else _added(dense, self.outcome.pay(prompts, responses, ended))

    def _pay_at_end(self, prompts: Ids, responses: Ids, ended: Sequence[bool]) -> Scores:
        due = [row for row, flag in enumerate(ended) if flag]
        answer = self.ask([prompts[row] for row in due], [responses[row] for row in due])

        def spread(values: Sequence[np.ndarray]) -> list[np.ndarray]:
            rows = [np.zeros(len(response), dtype=np.float32) for response in responses]
            for row, value in zip(due, values, strict=True):
                rows[row][-1] = value
            return rows

        return Scores(spread(answer.total), {name: spread(values) for name, values in answer.parts.items()})

    def ask(self, prompts: Ids, responses: Ids) -> Scores:
        """The function's own answer, checked: an array of shape `()`, or `[T]` with `per_token`, for each response."""
        if not prompts:
            return Scores([], {name: [] for name in self.part_names})
        shown = ([list(p) for p in prompts], [list(r) for r in responses])
        given = self.decoder(*shown) if self.decoder else shown
        try:
            answers = self.function(*given)
        except (RewardError, ConnectionError, TimeoutError):
            # A server that is down is no response's doing, and to ask for each alone would take n times as long.
            raise
        except Exception as error:
            if len(prompts) > 1:
                self._find_culprit(*given, error)
            raise RewardError(f"{self.label}: raised {_describe(error)} for {_where(given, 0)}") from error
        return self._checked(answers, given)

    # ------------------------------------------------------------------------------------------------- statistics

    @property
    def learns(self) -> bool:
        """Whether it has running statistics that `update` moves."""
        own = getattr(self.function, "learns", callable(getattr(self.function, "update", None)))
        return bool(own) or (self.outcome is not None and self.outcome.learns)

    @property
    def moves_units(self) -> bool:
        """Whether `update` moves the unit of its scores; of a function's own statistics it is supposed."""
        own = getattr(self.function, "moves_units", callable(getattr(self.function, "update", None)))
        return bool(own) or (self.outcome is not None and self.outcome.moves_units)

    def update(self, scores: Scores) -> None:
        """Move running statistics, if there are any; nothing else ever moves them.

        Args:
            scores: Of n finished responses, float `[n]` each: what `whole` said, or the sums of what they were paid.
        """
        if not len(scores.total):
            return
        if self.learns and callable(update := getattr(self.function, "update", None)):
            update(scores)
        if self.outcome is not None:
            self.outcome.update(scores)

    def state_dict(self) -> dict[str, Any]:
        """The statistics, as JSON holds them; empty if there are none."""
        own = getattr(self.function, "state_dict", None)
        state: dict[str, Any] = own() if callable(own) else {}  # type: ignore[assignment]
        if self.outcome is None:
            return state
        states = {"tokens": state, "outcome": self.outcome.state_dict()}
        return {key: value for key, value in states.items() if value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the statistics that `state_dict` gave.

        Raises:
            ValueError: If they are another reward's.
        """
        if self.outcome is not None:
            self._load_own(state.get("tokens", {}))
            self.outcome.load_state_dict(state.get("outcome", {}))
        else:
            self._load_own(state)

    def _load_own(self, state: Mapping[str, Any]) -> None:
        load = getattr(self.function, "load_state_dict", None)
        if callable(load):
            load(state)
        elif state:
            raise ValueError(f"{self.label}: expected the reward whose statistics these are, {state}, got one without")

    # ------------------------------------------------------------------------------------------------- checking

    def _find_culprit(self, prompts: Sequence[Any], responses: Sequence[Any], error: Exception) -> None:
        """Ask again one by one, so that the error can say which response it was."""
        for row in range(len(prompts)):
            try:
                self.function(prompts[row : row + 1], responses[row : row + 1])
            except Exception as again:
                where = _where((prompts, responses), row)
                raise RewardError(f"{self.label}: raised {_describe(again)} for {where}") from error
        raise RewardError(
            f"{self.label}: raised {_describe(error)} for {len(prompts)} responses together, the first being "
            f"{_where((prompts, responses), 0)}"
        ) from error

    def _checked(self, answers: Any, given: tuple[Sequence[Any], Sequence[Any]]) -> Scores:
        answer = answers if isinstance(answers, Scores) else Scores(answers)
        if set(answer.parts) != set(self.part_names):
            got = sorted(map(str, answer.parts))
            raise RewardError(f"{self.label}: expected the parts of part_names, {sorted(self.part_names)}, got {got}")
        parts = {name: self._rows(answer.parts[name], given) for name in self.part_names}
        return Scores(self._rows(answer.total, given), parts)

    def _rows(self, answers: Any, given: tuple[Sequence[Any], Sequence[Any]]) -> list[np.ndarray]:
        responses = given[1]
        if isinstance(answers, torch.Tensor):
            answers = answers.detach().float().cpu().numpy()
        if not isinstance(answers, Sequence | np.ndarray) or len(answers) != len(responses):
            raise RewardError(f"{self.label}: expected {len(responses)} scores, one a response, got {_count(answers)}")
        rows = []
        for row, answer in enumerate(answers):
            values = _as_array(answer)
            expected = (len(responses[row]),) if self.per_token else ()
            if values is None or values.shape != expected:
                wanted = _expected(self.per_token, responses[row])
                raise RewardError(f"{self.label}: expected {wanted}, got {answer!r} for {_where(given, row)}")
            if not np.isfinite(values).all():
                raise RewardError(f"{self.label}: expected finite scores, got {answer!r} for {_where(given, row)}")
            rows.append(values)
        return rows


def _sums(rows: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([row.sum() for row in rows], dtype=np.float32)


def _added(one: Scores, two: Scores) -> Scores:
    """Token by token; a part that both have is the sum of the two."""
    parts = dict(one.parts)
    for name, rows in two.parts.items():
        parts[name] = _sum_of(parts[name], rows) if name in parts else rows
    return Scores(_sum_of(one.total, two.total), parts)


def _sum_of(ones: Sequence[np.ndarray], twos: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [one + two for one, two in zip(ones, twos, strict=True)]


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
