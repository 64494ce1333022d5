"""Minibatches of whole episodes, for Tianshou's own algorithms.

A minibatch of shuffled transitions touches every episode, so each costs a forward of all of them. Drawn by episode, a
minibatch costs its own episodes only, and an epoch costs one forward of each, as in the native agent. Tianshou's update
loops are left alone: they call `split` on the batch, and the batch is told how to split.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import numpy as np
from tianshou.algorithm.modelfree.a2c import A2C
from tianshou.algorithm.modelfree.npg import NPG
from tianshou.algorithm.modelfree.ppo import PPO
from tianshou.algorithm.modelfree.reinforce import Reinforce
from tianshou.algorithm.modelfree.trpo import TRPO
from tianshou.data import Batch, VectorReplayBuffer


class EpisodeBatch(Batch):
    """A batch whose `split` keeps the transitions of an episode together."""

    def split(self, size: int, shuffle: bool = True, merge_last: bool = False) -> Iterator[Self]:
        """Whole episodes, about `size` transitions at a time.

        With N transitions there are N // size parts (N / size, rounded up, without `merge_last`), equal up to the
        length of an episode.

        Args:
            size: Transitions of a part; -1: all.
            shuffle: Whether the episodes come in random order; if not, the transitions keep their order, as Tianshou's
                own passes over a batch require, and parts are of exactly `size`.
            merge_last: Whether a smaller last part is merged into the one before.
        """
        if not shuffle or size == -1 or size >= len(self):
            yield from super().split(size, shuffle=shuffle, merge_last=merge_last)
            return
        parts = len(self) // size if merge_last else -(-len(self) // size)
        yield from (self[indices] for indices in whole_episodes(self.obs[:, 0], parts))


def whole_episodes(episodes: np.ndarray, parts: int) -> list[np.ndarray]:
    """Indices of transitions, shuffled by episode and cut into parts of about equal size.

    Args:
        episodes: `[N]`: the episode of each transition.
        parts: How many; fewer if there are fewer episodes, or a part would be a single transition.

    >>> [part.tolist() for part in whole_episodes(np.array([7, 7, 7]), 2)]
    [[0, 1, 2]]
    """
    _, owner, counts = np.unique(episodes, return_inverse=True, return_counts=True)
    order = np.random.permutation(len(counts))
    # An episode goes where its middle falls.
    middles = np.cumsum(counts[order]) - counts[order] / 2
    part_of = np.empty(len(counts), dtype=np.int64)
    part_of[order] = np.minimum(middles * parts / len(episodes), parts - 1).astype(np.int64)
    part = part_of[owner]
    chosen: list[np.ndarray] = []
    for number in range(parts):
        indices = np.flatnonzero(part == number)
        # Advantages are normalised within a part, and one number has no deviation: a single transition joins others.
        if chosen and (len(indices) == 1 or len(chosen[-1]) == 1):
            chosen[-1] = np.concatenate([chosen[-1], indices])
        elif len(indices):
            chosen.append(indices)
    return chosen


class ByEpisode:
    """Mix it in before an on-policy algorithm of Tianshou's: `class Mine(ByEpisode, PPO)`."""

    def _preprocess_batch(self, batch: Any, buffer: Any, indices: np.ndarray) -> Any:
        prepared = super()._preprocess_batch(batch, buffer, indices)  # type: ignore[misc]
        return EpisodeBatch(prepared)


class EpisodePPO(ByEpisode, PPO):
    """PPO on minibatches of whole episodes."""


class EpisodeA2C(ByEpisode, A2C):
    """A2C on minibatches of whole episodes."""


class EpisodeReinforce(ByEpisode, Reinforce):
    """REINFORCE on minibatches of whole episodes."""


class EpisodeNPG(ByEpisode, NPG):
    """Natural policy gradient on minibatches of whole episodes."""


class EpisodeTRPO(ByEpisode, TRPO):
    """TRPO on minibatches of whole episodes."""


class EpisodeReplayBuffer(VectorReplayBuffer):
    """A replay buffer that samples whole episodes, or what it still has of them.

    The episode of a transition drawn uniformly, and another, until there are `batch_size` transitions: each transition
    is as likely as with uniform sampling, up to the lengths of episodes.
    """

    def sample_indices(self, batch_size: int | None) -> np.ndarray:
        """At least `batch_size` indices; all in order for 0, all shuffled by episode for None."""
        every = super().sample_indices(0)
        if batch_size == 0 or (batch_size is not None and batch_size < 0) or not len(every):
            return super().sample_indices(batch_size)
        episodes = np.asarray(self.get(every, "obs"))[:, 0]
        if batch_size is None:
            return every[np.concatenate(whole_episodes(episodes, len(every)))]
        by_episode = np.argsort(episodes, kind="stable")
        _, first, owner, counts = np.unique(
            episodes[by_episode], return_index=True, return_inverse=True, return_counts=True
        )
        drawn = owner[self._random_state.choice(len(every), batch_size)]
        _, order = np.unique(drawn, return_index=True)
        distinct = drawn[np.sort(order)]  # in the order drawn, each once
        enough = int(np.searchsorted(np.cumsum(counts[distinct]), batch_size)) + 1
        spans = [by_episode[first[e] : first[e] + counts[e]] for e in distinct[:enough]]
        return every[np.concatenate(spans)]
