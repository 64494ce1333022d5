"""The batched environment as one of Tianshou's vector environments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from tianshou.env import BaseVectorEnv
from torch import Tensor

from agents.adapters.tianshou_bridge.token_store import TokenStore
from textenv.task import Task
from textenv.wrappers import VectorTopKActions


class _NoInfo:
    """What stands for a row's info: false, so that the Collector passes over it, and not null."""

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "-"

    def __reduce__(self) -> str:
        return "_NO_INFO"  # the one of this module


_NO_INFO = _NoInfo()


class TextBatchEnv(BaseVectorEnv):
    """A batched text environment as Tianshou's Collector wants it, with no Python environment per row.

    Observations are handles `(episode, length)`, `[n, 2]` int32, into `store`. What the environment tells beside is in
    `last_info`, arrays by name, for the rows of `last_rows`; with `info_keys` Tianshou's per-row dicts carry it too.

    Attributes:
        envs: The Gymnasium vector environment.
        store: Holds the tokens.
        last_info: Of the last step: each `[r]` or `[r, T]`.
        last_rows: `[r]`: the rows that were stepped.
    """

    # No super().__init__: there are no workers. Tianshou's own wrappers of vector environments do the same.
    def __init__(self, envs: Any, *, store: TokenStore | None = None, info_keys: Sequence[str] = ()) -> None:
        """Wrap an environment.

        Args:
            envs: Made by `gym.make_vec("RLHF-Text-v0", ..., autoreset_mode="Disabled")`, wrapped or not.
            store: That of another environment, so that one policy reads both; None: a new one.
            info_keys: What of the info goes into Tianshou's batches, at the price of one dict per row and step.

        Raises:
            ValueError: If it resets its rows by itself, or the store is for another vocabulary.
        """
        if envs.unwrapped.autoreset_mode is not AutoresetMode.DISABLED:
            raise ValueError(
                "envs: expected autoreset_mode='Disabled', for Tianshou resets each row itself, "
                f"got {envs.unwrapped.autoreset_mode.value!r}"
            )
        self.envs, self.info_keys = envs, tuple(info_keys)
        task: Task = envs.unwrapped.task
        self.task = task
        self.env_num: int = envs.num_envs
        self.is_async = self.is_closed = False
        space = envs.single_observation_space
        count = space["candidates"].shape[0] if "candidates" in space.spaces else 0
        self.store = store if store is not None else TokenStore(task.vocab_size, candidates=count)
        if (self.store.vocab_size, self.store.candidate_count) != (task.vocab_size, count):
            raise ValueError(
                f"store: expected one for {task.vocab_size} tokens and {count} candidates, "
                f"got {self.store.vocab_size} and {self.store.candidate_count}"
            )
        self._running = self.store.rows(self.env_num, task.columns, task.options.max_new_tokens)
        self._seed: int | list[int] | None = None
        self.last_info: dict[str, np.ndarray] = {}
        self.last_rows = np.arange(self.env_num)

    def __len__(self) -> int:
        return self.env_num

    # ------------------------------------------------------------------------------------------------- the protocol

    def reset(self, env_id: Any = None, **kwargs: Any) -> tuple[np.ndarray, np.ndarray]:
        """Begin episodes in some rows (None: all); `seed` and `options` are the environment's."""
        rows = self._rows(env_id)
        mask = np.zeros(self.env_num, dtype=bool)
        mask[rows] = True
        options = {**(kwargs.pop("options", None) or {}), "reset_mask": mask}
        seed, self._seed = kwargs.pop("seed", self._seed), None
        if mask.all():
            self.store.owes_kl = False  # who begins anew may be another, who charges
        if kwargs:
            raise ValueError(f"reset: expected seed and options, got {sorted(kwargs)}")
        observation, info = self.envs.reset(seed=seed, options=options)
        if "action_mask" in info:
            raise ValueError("envs: expected free choice of tokens, got a constraint; no mask is kept in the store")
        tokens, lengths = _array(observation["input_ids"])[rows], _array(observation["prompt_length"])[rows, 0]
        self.store.begin(self._running, rows, tokens, lengths)
        self._offer(observation, rows)
        return self._running.handles(rows), self._infos({key: _array(value)[rows] for key, value in info.items()})

    def step(self, action: Any, id: Any = None) -> tuple[np.ndarray, ...]:
        """One action for each row of `id` (None: all)."""
        rows = self._rows(id)
        self.store.sweep()
        observation, rewards, terminated, truncated, info = self._act(np.asarray(action), rows)
        # What was added is read from the observation: an action need not be a token.
        self._running.append(rows, _array(observation["input_ids"])[rows, self._running.lengths[rows]])
        self._offer(observation, rows)
        handles = self._running.handles(rows)
        self.last_rows = rows
        self.store.owes_kl = self.task.kl_source == "agent" and self.task.kl_coef > 0
        self.last_info = {key: _array(value)[rows] for key, value in info.items() if not key.startswith("_")}
        ends = tuple(_array(flags)[rows] for flags in (terminated, truncated))
        self.store.end(self._running, rows[ends[0] | ends[1]])
        return handles, _array(rewards)[rows].astype(np.float64), *ends, self._infos(self.last_info)

    def seed(self, seed: int | list[int] | None = None) -> list[list[int] | None]:
        """Seed the next reset: row i with `seed + i`."""
        self._seed = seed
        first = [None] * self.env_num if seed is None else np.broadcast_to(seed, self.env_num) + np.arange(self.env_num)
        return [None if one is None else [int(one)] for one in first]

    def get_env_attr(self, key: str, id: Any = None) -> list[Any]:
        """Attributes of the rows, which are those of the whole."""
        values = {
            "action_space": self.envs.single_action_space,
            "observation_space": gym.spaces.Box(0, np.iinfo(np.int32).max, (2,), np.int32),
            "metadata": self.envs.metadata,
            "spec": self.envs.spec,
            "reward_range": (-np.inf, np.inf),
        }
        if key not in values:
            raise AttributeError(f"rows of {type(self).__name__} have no attribute {key!r}")
        return [values[key]] * len(self._rows(id))

    def set_env_attr(self, key: str, value: Any, id: Any = None) -> None:
        """Refused: the rows are no objects of their own."""
        raise AttributeError(f"rows of {type(self).__name__} have no attributes to set; set {key!r} on .envs")

    def render(self, **kwargs: Any) -> list[Any]:
        """What the environment renders, one entry a row."""
        return list(self.envs.render() or ())

    def close(self) -> None:
        """Close the environment."""
        self.is_closed = True
        self.envs.close()

    # ------------------------------------------------------------------------------------------------- helpers

    def _rows(self, which: Any) -> np.ndarray:
        return np.arange(self.env_num) if which is None else np.atleast_1d(np.asarray(which, dtype=np.int64))

    def _act(self, actions: np.ndarray, rows: np.ndarray) -> tuple[dict[str, Any], Any, Any, Any, dict[str, Any]]:
        """Step some rows; the others stay, or, behind a wrapper of somebody else's, play on for nobody."""
        every = np.zeros(self.env_num, dtype=np.int64)
        every[rows] = actions
        if len(rows) == self.env_num:
            return self.envs.step(every)
        core, top_k = self.envs.unwrapped.core, isinstance(self.envs, VectorTopKActions)
        if (self.envs.env if top_k else self.envs) is self.envs.unwrapped:
            core.step(core.chosen(every) if top_k else core.check_actions(every), rows)
            return core.observation(), core.rewards, *core.endings(), core.info()
        told = self.envs.step(every)
        idle = _array(told[2]) | _array(told[3])
        idle[rows] = False
        if idle.any():
            self.envs.reset(options={"reset_mask": idle})
        return told

    def _offer(self, observation: dict[str, Any], rows: np.ndarray) -> None:
        if self.store.candidate_count:
            self._running.offer(rows, _array(observation["candidates"])[rows])

    def _infos(self, info: dict[str, np.ndarray]) -> np.ndarray:
        """Tianshou's form: an object array, of dicts if anything is wanted in them."""
        count = len(next(iter(info.values())))
        rows = np.full(count, _NO_INFO, dtype=object)
        for i in range(count if self.info_keys else 0):
            rows[i] = {key: info[key][i] for key in self.info_keys}
        return rows


def _array(value: Any) -> np.ndarray:
    return value.cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
