"""The batched environment as a `VecEnv` of stable-baselines3: no environment per row, no copy per row."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.vec_env import VecEnv

from agents.adapters.checks import text_vector_env


class TextVecEnv(VecEnv):
    """`gym.make_vec("RLHF-Text-v0", ...)`, wrapped or not, in the form that stable-baselines3 asks for.

    A row that ends begins anew in the same step; its last observation is in `infos[i]["terminal_observation"]`.
    `TimeLimit.truncated`, from which stable-baselines3 bootstraps, is true only for what the environment truncates:
    with the default `length_end="terminate"` never.

    Attributes:
        envs: The environment inside.
        latest: What the last step told of each row, `[N]` or `[N, ...]` arrays by key: of a row that ended, the info of
            its last step, not that of the episode that began.
        logprob_sums: `[N]` float64, log π of the tokens of each episode under way: what `TextCallback` has added up.
        kl_sums: `[N]` float64, their k1.
    """

    def __init__(self, envs: VectorEnv) -> None:
        """Put the interface on.

        Args:
            envs: A `TextVectorEnv` with NumPy observations, autoreset `SAME_STEP` or `DISABLED`, wrapped or not.

        Raises:
            ValueError: If it is anything else.
        """
        inner = text_vector_env(envs)
        if inner.obs_type != "numpy":
            raise ValueError(f"envs: expected obs_type='numpy', which stable-baselines3 stores, got {inner.obs_type!r}")
        if inner.autoreset_mode is AutoresetMode.NEXT_STEP:
            raise ValueError("envs: expected autoreset SAME_STEP or DISABLED, got NEXT_STEP, which has dead steps")
        self.envs, self.text_envs = envs, inner
        self.latest: dict[str, np.ndarray] = {}
        self.logprob_sums = np.zeros(inner.num_envs)
        self.kl_sums = np.zeros(inner.num_envs)
        self._masks: np.ndarray | None = None
        self._ended = np.zeros(inner.num_envs, dtype=bool)
        self._actions: np.ndarray | None = None
        super().__init__(inner.num_envs, envs.single_observation_space, envs.single_action_space)

    def reset(self) -> dict[str, np.ndarray]:
        """Begin every row anew, with the seeds and options set before."""
        seeds: Any = None if all(seed is None for seed in self._seeds) else self._seeds
        observation, info = self.envs.reset(seed=seeds, options=_joined(self._options))
        self._reset_seeds()
        self._reset_options()
        self.logprob_sums[:] = self.kl_sums[:] = 0.0
        self._ended[:] = False
        self.latest, self._masks = _per_row(info, self.num_envs), info.get("action_mask")
        self.reset_infos = _row_dicts(self.latest, self.num_envs)
        return observation

    def step_async(self, actions: np.ndarray) -> None:
        """Take note of the actions."""
        self._actions = actions

    def step_wait(self) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Append one token to every row."""
        for sums in (self.logprob_sums, self.kl_sums):
            sums[self._ended] = 0.0
        observation, rewards, terminated, truncated, info = self.envs.step(self._actions)
        done = self._ended = terminated | truncated
        self.latest = _per_row(info, self.num_envs)
        self._masks = info.get("action_mask")
        finals: Any = {}
        if done.any() and self.text_envs.autoreset_mode is AutoresetMode.DISABLED:
            finals = {row: {key: value[row] for key, value in observation.items()} for row in np.flatnonzero(done)}
            observation, info = self.envs.reset(options={"reset_mask": done.copy()})
            if self._masks is not None:
                self._masks = np.where(done[:, None], info["action_mask"], self._masks)
        elif done.any():
            finals = info["final_obs"]
            for key, value in _per_row(info["final_info"], self.num_envs).items():
                self.latest[key][done] = value[done]
        infos = _row_dicts(self.latest, self.num_envs)
        for row in np.flatnonzero(done):
            infos[row]["terminal_observation"] = finals[row]
            infos[row]["TimeLimit.truncated"] = bool(truncated[row] and not terminated[row])
        return observation, rewards.astype(np.float32), done, infos

    def action_masks(self) -> np.ndarray:
        """`[N, V]` bool, true where an action is allowed: what `MaskablePPO` asks; all of it without a constraint."""
        if self._masks is None:
            assert isinstance(self.action_space, gym.spaces.Discrete)
            return np.ones((self.num_envs, int(self.action_space.n)), dtype=bool)
        return self._masks.astype(bool)

    def close(self) -> None:
        """Free the models."""
        self.envs.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The environment's attribute, once for each row asked about."""
        owner = self if attr_name == "action_masks" else self.envs
        value = getattr(owner, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Refused: rows are no objects of their own."""
        raise ValueError(f"{attr_name}: expected no attribute to be set, because all rows are one environment")

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """`action_masks` row by row; any other method is the environment's own, called once."""
        rows = list(self._get_indices(indices))
        if method_name == "action_masks":
            masks = self.action_masks()
            return [masks[row] for row in rows]
        answer = getattr(self.envs, method_name)(*method_args, **method_kwargs)
        return [answer for _ in rows]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: Any = None) -> list[bool]:
        """Never: wrappers of single environments wrap no row here."""
        return [False for _ in self._get_indices(indices)]


def _per_row(info: dict[str, Any], rows: int) -> dict[str, np.ndarray]:
    """The entries that hold one value a row, without Gymnasium's masks beside them.

    `action_mask` is left out: it is about the state that comes, and the others about the step that was.
    """
    return {
        key: value
        for key, value in info.items()
        if not key.startswith(("_", "final_", "action_mask")) and isinstance(value, np.ndarray) and len(value) == rows
    }


def _row_dicts(latest: dict[str, np.ndarray], rows: int) -> list[dict[str, Any]]:
    if not latest:
        return [{} for _ in range(rows)]
    return [dict(zip(latest, values, strict=True)) for values in zip(*latest.values(), strict=True)]


def _joined(options: list[dict[str, Any]]) -> dict[str, Any] | None:
    """One dictionary of lists, from one dictionary a row."""
    if not any(options):
        return None
    if any(option.keys() != options[0].keys() for option in options):
        raise ValueError(f"options: expected the same keys in every row, got {[sorted(one) for one in options]}")
    return {key: [option[key] for option in options] for key in options[0]}
