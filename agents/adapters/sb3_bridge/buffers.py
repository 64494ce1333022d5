"""Rollout buffers that store each episode's tokens once, and can draw minibatches of whole episodes."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer, MaskableDictRolloutBufferSamples
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples

_TEXT = ("input_ids", "attention_mask", "prompt_length")
_COLUMNS = ("actions", "values", "log_probs", "advantages", "returns")


class EpisodeRolloutBuffer(DictRolloutBuffer):
    """A `DictRolloutBuffer` in which a transition's text is (row, length) into a store of the rows it grew from.

    The library's own buffer keeps a padded row for each transition, tokens × context cells; here a piece of an episode
    is kept once. What `get` yields is the same but for its order.

    Attributes:
        by_episode: Whether a minibatch is made of whole episodes.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Dict,
        action_space: spaces.Space,
        device: torch.device | str = "auto",
        gae_lambda: float = 1,
        gamma: float = 0.99,
        n_envs: int = 1,
        by_episode: bool = True,
    ) -> None:
        """An empty buffer.

        Args:
            buffer_size: Steps of each row.
            observation_space: The environment's.
            action_space: The environment's.
            device: Of the minibatches.
            gae_lambda: λ.
            gamma: Discount.
            n_envs: Rows.
            by_episode: Draw minibatches of whole episodes: few distinct rows each, hence few forwards. False: of
                shuffled transitions, as the library does.
        """
        self.by_episode = by_episode
        super().__init__(buffer_size, observation_space, action_space, device, gae_lambda, gamma, n_envs)

    def reset(self) -> None:
        """Forget everything."""
        text = self.observation_space
        # The library's own code then stores what is left, and nothing of the text.
        self.obs_shape = {key: text[key].shape or () for key in text if key not in _TEXT}
        self._reset_columns()
        shape = (self.buffer_size, self.n_envs)
        self.rows = np.zeros((2 * self.n_envs, *(text["input_ids"].shape or ())), dtype=np.int32)
        self.prompt_lengths = np.zeros(2 * self.n_envs, dtype=np.int32)
        self.row, self.length = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.int32)
        self.used, self.pad = 0, 0

    def _reset_columns(self) -> None:
        super().reset()

    def add(self, obs: dict[str, np.ndarray], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Store one step of every row; arguments as the library's."""
        starts = args[2] if len(args) > 2 else kwargs["episode_start"]
        self._store(obs, np.ones(self.n_envs, dtype=bool) if self.pos == 0 else np.asarray(starts, dtype=bool))
        super().add(obs, *args, **kwargs)

    def _store(self, obs: dict[str, np.ndarray], begins: np.ndarray) -> None:
        count, ids = int(begins.sum()), np.asarray(obs["input_ids"])
        if self.used + count > len(self.rows):
            self.rows = np.concatenate([self.rows, np.zeros_like(self.rows)])
            self.prompt_lengths = np.concatenate([self.prompt_lengths, np.zeros_like(self.prompt_lengths)])
        row = np.zeros(self.n_envs, dtype=np.int32) if self.pos == 0 else self.row[self.pos - 1].copy()
        row[begins] = np.arange(self.used, self.used + count)
        self.used += count
        # An observation holds all earlier ones of its episode: the last one written is the whole row.
        self.rows[row], self.prompt_lengths[row] = ids, np.asarray(obs["prompt_length"])[:, 0]
        self.row[self.pos], self.length[self.pos] = row, np.asarray(obs["attention_mask"]).sum(1)
        self.pad = int(ids[0, -1])  # never a token: the state before the last action is shorter than the row

    def get(self, batch_size: int | None = None) -> Generator[Any, None, None]:  # type: ignore[override]
        """Minibatches of about `batch_size` transitions; None: one of all."""
        assert self.full, ""
        total = self.buffer_size * self.n_envs
        if not self.generator_ready:
            for name in self._columns():
                setattr(self, name, self.swap_and_flatten(getattr(self, name)))
            self.observations = {key: self.swap_and_flatten(value) for key, value in self.observations.items()}
            self.generator_ready = True
        if self.by_episode and batch_size is not None:
            drawn = self._episodes(-(-total // batch_size))
        else:
            order = np.random.permutation(total)
            drawn = (order[start : start + (batch_size or total)] for start in range(0, total, batch_size or total))
        for chosen in drawn:
            yield self._get_samples(chosen)

    def _columns(self) -> tuple[str, ...]:
        return _COLUMNS

    def _episodes(self, minibatches: int) -> Iterator[np.ndarray]:
        """Shuffled episodes, cut where the transitions before the cut come nearest to an equal share."""
        row = self.row.T.reshape(-1)  # as the columns: each row's steps one after the other
        sizes = np.bincount(row, minlength=self.used)
        order = np.random.permutation(self.used)
        middles = np.cumsum(sizes[order]) - sizes[order] / 2
        part = np.empty(self.used, dtype=np.int64)
        part[order] = np.minimum(middles * minibatches // len(row), minibatches - 1)
        for number in range(minibatches):
            chosen = np.flatnonzero(part[row] == number)
            if len(chosen):
                yield chosen

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> Any:
        return DictRolloutBufferSamples(*self._samples(batch_inds))

    def _samples(self, chosen: np.ndarray) -> tuple[Any, ...]:
        columns = (getattr(self, name)[chosen].ravel() for name in _COLUMNS[1:])
        rest = (self.actions[chosen].astype(np.float32), *columns)
        return self._observations(chosen), *(self.to_torch(array) for array in rest)

    def _observations(self, chosen: np.ndarray) -> dict[str, torch.Tensor]:
        """The padded rows of some transitions, as the environment showed them."""
        envs, steps = np.divmod(chosen, self.buffer_size)
        row, length = self.row[steps, envs], self.length[steps, envs]
        mask = np.arange(self.rows.shape[1]) < length[:, None]
        text = {
            "input_ids": np.where(mask, self.rows[row], self.pad).astype(np.int64),
            "attention_mask": mask.astype(np.int8),
            "prompt_length": self.prompt_lengths[row].astype(np.int64)[:, None],
        }
        others = {key: value[chosen] for key, value in self.observations.items()}
        return {key: self.to_torch(value) for key, value in (text | others).items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays held."""
        held = (*self.__dict__.values(), *self.observations.values())
        return sum(value.nbytes for value in held if isinstance(value, np.ndarray))


class MaskableEpisodeRolloutBuffer(EpisodeRolloutBuffer, MaskableDictRolloutBuffer):
    """The same for `MaskablePPO`; masks are kept as bits, 1/32 of the library's floats."""

    def _reset_columns(self) -> None:
        DictRolloutBuffer.reset(self)  # MaskableDictRolloutBuffer's would make the floats first
        assert isinstance(self.action_space, spaces.Discrete)
        self.mask_dims = int(self.action_space.n)
        everything = np.packbits(np.ones(self.mask_dims, dtype=bool))
        self.action_masks = np.tile(everything, (self.buffer_size, self.n_envs, 1))

    def add(self, *args: Any, action_masks: np.ndarray | None = None, **kwargs: Any) -> None:  # type: ignore[override]
        """Store one step of every row; arguments as the library's."""
        if action_masks is not None:
            masks = np.asarray(action_masks).reshape(self.n_envs, self.mask_dims)
            self.action_masks[self.pos] = np.packbits(masks.astype(bool), axis=1)
        super().add(*args, **kwargs)

    def _columns(self) -> tuple[str, ...]:
        return (*_COLUMNS, "action_masks")

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> Any:
        masks = np.unpackbits(self.action_masks[batch_inds], axis=1, count=self.mask_dims)
        return MaskableDictRolloutBufferSamples(*self._samples(batch_inds), action_masks=self.to_torch(masks))
