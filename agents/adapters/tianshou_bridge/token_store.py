"""Episodes of tokens that observations point to: memory in proportion to tokens, not to tokens times context.

A library that stores every token as a transition of its own would store its whole prefix with it. Here an observation
is a handle `(episode, length)`, two integers, and the tokens of an episode are kept once.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from agents.prefix import Prefixes

HANDLE_DTYPE = np.int32


class Handles(Protocol):
    """A buffer of transitions whose observations are handles; Tianshou's have these methods."""

    def __len__(self) -> int: ...

    def sample_indices(self, batch_size: int | None) -> np.ndarray:
        """All indices for 0."""
        ...

    def get(self, index: Any, key: str) -> Any:
        """The values of a key."""
        ...


class Episode(NamedTuple):
    """An episode that has ended."""

    tokens: np.ndarray
    """Prompt and response."""
    prompt_length: int
    """How many of the tokens are the prompt."""
    candidates: np.ndarray | None
    """`[T + 1, k]`: the tokens to choose from in each state, the last one too; None where every token is one."""


class RunningRows:
    """The episodes that run in the rows of one batched environment.

    Attributes:
        episodes: `[N]`: number of the episode in each row; -1 before the first.
        lengths: `[N]`: its tokens so far.
    """

    def __init__(self, rows: int, columns: int, steps: int, candidates: int, dtype: Any) -> None:
        """Hold N rows, none of them running."""
        self.episodes, self.lengths = np.full(rows, -1), np.zeros(rows, dtype=np.int64)
        self._prompt_lengths = np.zeros(rows, dtype=np.int64)
        self._tokens = np.zeros((rows, columns), dtype=dtype)
        self._candidates = np.zeros((rows, steps + 1, candidates), dtype=dtype) if candidates else None

    def __deepcopy__(self, memo: dict[int, Any]) -> RunningRows:
        """Itself: whoever copies a network that reads it wants to read the same episodes."""
        return self

    def handles(self, rows: np.ndarray) -> np.ndarray:
        """The states that some rows are in, `[r, 2]`."""
        return np.stack([self.episodes[rows], self.lengths[rows]], axis=1, dtype=HANDLE_DTYPE)

    def look(self, row: int) -> Episode:
        """The episode of a row so far; views, valid until the row moves."""
        length, start = int(self.lengths[row]), int(self._prompt_lengths[row])
        candidates = None if self._candidates is None else self._candidates[row, : length - start + 1]
        return Episode(self._tokens[row, :length], start, candidates)

    def end(self, row: int) -> Episode:
        """The episode of a row as a copy of its own; a cut episode is bootstrapped from its last state."""
        tokens, start, candidates = self.look(row)
        return Episode(tokens.copy(), start, None if candidates is None else candidates.copy())

    def write(self, rows: np.ndarray, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Prompts of rows that begin: `tokens` `[r, L]` right-padded, `lengths` `[r]`."""
        self._tokens[rows, : tokens.shape[1]] = tokens
        self.lengths[rows] = self._prompt_lengths[rows] = lengths

    def append(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        """One token a row, `[r]`."""
        self._tokens[rows, self.lengths[rows]] = tokens
        self.lengths[rows] += 1

    def offer(self, rows: np.ndarray, candidates: np.ndarray) -> None:
        """What may be chosen now, `[r, k]`."""
        assert self._candidates is not None
        self._candidates[rows, self.lengths[rows] - self._prompt_lengths[rows]] = candidates


class TokenStore:
    """Running and ended episodes by number.

    Ended episodes are dropped when no watched buffer holds a transition of theirs, so memory follows the buffers'. If
    no buffer is watched nothing is ever dropped. A deep copy is the store itself: target networks read the same
    episodes. A pickle holds all episodes and watches no buffer.
    """

    def __init__(self, vocab_size: int, *, candidates: int = 0, slack: int = 256) -> None:
        """Hold nothing.

        Args:
            vocab_size: V; tokens take 2 bytes up to 65,536, else 4.
            candidates: How many tokens there are to choose from in a state; 0: all of them.
            slack: Ended episodes that may always lie about; more are looked through when twice as many have ended as
                were needed last time.
        """
        self.vocab_size, self.candidate_count, self.slack = vocab_size, candidates, slack
        self._dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
        self._ended: dict[int, Episode] = {}
        self._running: dict[int, tuple[RunningRows, int]] = {}
        self._next = 0
        self._sweep_at = slack
        self._buffers: list[weakref.ref[Any]] = []
        self.owes_kl = False
        """Whether nobody has charged the KL of the last step yet, which `kl_source="agent"` leaves to the agent."""

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenStore:
        """Itself."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the buffers, which are others' and hold the store."""
        return self.__dict__ | {"_buffers": []}

    def __len__(self) -> int:
        return len(self._ended) + len(self._running)

    def __contains__(self, episode: int) -> bool:
        return episode in self._ended or episode in self._running

    # ------------------------------------------------------------------------------------------------- writing

    def rows(self, count: int, columns: int, steps: int) -> RunningRows:
        """Room for the episodes of one environment.

        Args:
            count: N rows.
            columns: Longest prompt plus response.
            steps: Longest response.
        """
        return RunningRows(count, columns, steps, self.candidate_count, self._dtype)

    def begin(self, running: RunningRows, rows: np.ndarray, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Start episodes; those that ran in these rows end as they are.

        Args:
            running: Of one environment.
            rows: `[r]`.
            tokens: `[r, L]`, right-padded prompts.
            lengths: `[r]`.
        """
        self.end(running, rows[running.episodes[rows] >= 0])
        running.write(rows, tokens, lengths)
        for row in rows.tolist():
            running.episodes[row] = self._next
            self._running[self._next] = (running, row)
            self._next += 1

    def end(self, running: RunningRows, rows: np.ndarray) -> None:
        """Keep what some rows hold as ended episodes."""
        for row in rows.tolist():
            episode = int(running.episodes[row])
            if self._running.pop(episode, None) is not None:
                self._ended[episode] = running.end(row)

    def watch(self, buffer: Handles) -> None:
        """Keep the episodes of this buffer's transitions, and drop the others now and then."""
        if all(known() is not buffer for known in self._buffers):
            self._buffers.append(weakref.ref(buffer))

    def sweep(self, *, force: bool = False) -> None:
        """Drop ended episodes that no watched buffer holds.

        Called at each step, it acts when there are many; see `slack`.

        Args:
            force: Whether to act at once.
        """
        buffers = [buffer for known in self._buffers if (buffer := known()) is not None]
        if not buffers or not (force or len(self._ended) >= self._sweep_at):
            return
        needed = {episode for buffer in buffers for episode in _episodes(buffer)}
        self._ended = {number: episode for number, episode in self._ended.items() if number in needed}
        self._sweep_at = max(self.slack, 2 * len(self._ended))

    # ------------------------------------------------------------------------------------------------- reading

    def episode(self, number: int) -> Episode:
        """An episode, running or ended.

        Raises:
            ValueError: If the store has never had it, or dropped it.
        """
        ended = self._ended.get(number)
        if ended is not None:
            return ended
        if number not in self._running:
            raise ValueError(
                f"handles: expected episodes that the store holds, got {number}; a buffer that holds handles "
                "must be watched: store.watch(buffer)"
            )
        running, row = self._running[number]
        return running.look(row)

    def states(self, handles: np.ndarray, device: torch.device | str = "cpu", *, whole: bool = False) -> Prefixes:
        """The states that handles point to, as prefixes of their episodes.

        Args:
            handles: `[B, 2]`: episode, length.
            device: Where to.
            whole: Whether rows are whole episodes as far as they go, sorted, or end with the longest state asked for
                and stand in the order of their first handles.

        Raises:
            ValueError: If the store does not hold an episode, or not that much of it.
        """
        numbers, owner = _distinct(handles[:, 0], sort=whole)
        at = handles[:, 1].astype(np.int64)
        episodes = [self.episode(number).tokens for number in numbers.tolist()]
        lengths = np.array([len(tokens) for tokens in episodes])
        if (at < 1).any() or (at > lengths[owner]).any():
            raise ValueError(f"handles: expected lengths from 1 to those of their episodes, got {at.tolist()}")
        if not whole:
            longest = np.zeros_like(lengths)
            np.maximum.at(longest, owner, at)
            lengths = longest
        ids = np.zeros((len(episodes), int(lengths.max())), dtype=np.int64)
        for row, (tokens, length) in enumerate(zip(episodes, lengths.tolist(), strict=True)):
            ids[row, :length] = tokens[:length]
        return Prefixes(*(torch.from_numpy(a).to(device) for a in (ids, lengths, owner, at)))

    def candidates(self, handles: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
        """The tokens to choose from in each state, `[B, k]` int64.

        Args:
            handles: `[B, 2]`.
            device: Where to.

        Raises:
            ValueError: If the store does not hold them.
        """
        if not self.candidate_count:
            raise ValueError("handles: expected states with candidates, got a store in which every token is one")
        numbers, owner = _distinct(handles[:, 0])
        episodes = [self.episode(number) for number in numbers.tolist()]
        chosen = np.empty((len(handles), self.candidate_count), dtype=np.int64)
        for row, (place, length) in enumerate(zip(owner.tolist(), handles[:, 1].tolist(), strict=True)):
            tokens, start, candidates = episodes[place]
            assert candidates is not None
            if not start <= length < start + len(candidates):
                raise ValueError(f"handles: expected a state after the prompt, got length {length} of {len(tokens)}")
            chosen[row] = candidates[length - start]
        return torch.from_numpy(chosen).to(device)

    @property
    def nbytes(self) -> int:
        """Memory of the ended episodes: arrays, with their headers, and the table."""
        parts: Iterator[Any] = (part for episode in self._ended.values() for part in (episode, *episode))
        return sys.getsizeof(self._ended) + sum(sys.getsizeof(part) for part in parts if part is not None)


def _distinct(numbers: np.ndarray, *, sort: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Distinct numbers, sorted or in the order of their first appearance, and which of them each is."""
    values, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    if sort:
        return values, inverse
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return values[order], place[inverse]


def _episodes(buffer: Handles) -> Sequence[int]:
    """Numbers of the episodes that a buffer holds transitions of."""
    if not len(buffer):
        return []
    handles = np.asarray(buffer.get(buffer.sample_indices(0), "obs"))
    return np.unique(handles[:, 0]).tolist()
