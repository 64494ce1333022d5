"""The native batched environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from textenv.core import TextCore
from textenv.env import observation_space
from textenv.options import EnvOptions
from textenv.rendering import render_row
from textenv.task import Task
from textenv.tasked import Tasked

ObsType = Literal["numpy", "torch"]


class TextVectorEnv(Tasked, VectorEnv[dict[str, Any], Any, Any]):
    """N rows of `TextEnv` in one batch, on one device.

    Observations, rewards, endings and infos are those of `SyncVectorEnv` over N `TextEnv`s: row i is seeded `seed + i`,
    infos are arrays with a mask `_key` beside each. With `obs_type="torch"` everything is a tensor on the device, and
    `final_obs` is one batch with its mask instead of an object array.

    The three autoreset modes:

    - `SAME_STEP` (default): a row that ends begins anew in the same step; what it ended with is in `final_obs` and
      `final_info`.
    - `NEXT_STEP`: the step after the end ignores the row's action and begins anew, with reward 0.
    - `DISABLED`: `reset(options={"reset_mask": ...})` begins the rows named; stepping a finished row is an error.
    """

    metadata = {  # noqa: RUF012 - Gymnasium's form
        "render_modes": ["ansi", "human"],
        "render_fps": 4,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        obs_type: ObsType = "numpy",
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        """Load the task.

        Args:
            num_envs: N ≥ 1.
            autoreset_mode: `SameStep`, `NextStep` or `Disabled`, or Gymnasium's enum.
            obs_type: `numpy` arrays, or `torch` tensors that never leave the device.
            render_mode: None, `ansi` or `human`.
            **options: The fields of `EnvOptions`.

        Raises:
            ValueError: For a bad argument; it names the argument, what was expected and what came.
        """
        if isinstance(num_envs, bool) or not isinstance(num_envs, int) or num_envs < 1:
            raise ValueError(f"num_envs: expected an integer >= 1, got {num_envs!r}")
        if obs_type not in get_args(ObsType):
            raise ValueError(f"obs_type: expected 'numpy' or 'torch', got {obs_type!r}")
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"render_mode: expected None, 'ansi' or 'human', got {render_mode!r}")
        try:
            self.autoreset_mode = AutoresetMode(autoreset_mode)
        except ValueError as error:
            legal = ", ".join(repr(mode.value) for mode in AutoresetMode)
            raise ValueError(f"autoreset_mode: expected one of {legal}, got {autoreset_mode!r}") from error
        self.metadata = self.metadata | {"autoreset_mode": self.autoreset_mode}
        self.num_envs, self.obs_type, self.render_mode = num_envs, obs_type, render_mode
        self._core = TextCore(Task(EnvOptions.of(options)), rows=num_envs)
        self.single_action_space = spaces.Discrete(self.task.vocab_size)
        self._describe()
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._rngs: list[np.random.Generator] = []
        self._rng_seeds: list[int] = []
        self._pending = np.zeros(num_envs, dtype=bool)
        """Rows whose episode has ended and that have not begun anew."""

    # ------------------------------------------------------------------------------------------------- the protocol

    @property
    def np_random(self) -> tuple[np.random.Generator, ...]:
        """Each row's generator, as `SyncVectorEnv` gives them."""
        self._seed([None] * self.num_envs, np.arange(self.num_envs))
        return tuple(self._rngs)

    @property
    def np_random_seed(self) -> tuple[int, ...]:
        """Each row's seed."""
        self._seed([None] * self.num_envs, np.arange(self.num_envs))
        return tuple(self._rng_seeds)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start episodes.

        Args:
            seed: Row i is seeded `seed + i`; or one seed (or None) a row.
            options: `prompt_index` or `prompt`, one for all or one a row; `reset_mask`, `[N]` bool, names the rows.
        """
        core, options = self.core, dict(options or {})
        rows = _rows_of(options.pop("reset_mask", None), self.num_envs)
        self._seed(self._row_seeds(seed), rows)
        core.reset(rows, self._rngs, options)
        self._pending[rows] = False
        began = np.zeros(self.num_envs, dtype=bool)
        began[rows] = True
        self._show()
        return self._observation(), self._pack(self._core_info(), began)

    def step(self, actions: Any) -> tuple[dict[str, Any], Any, Any, Any, dict[str, Any]]:
        """Append one token to every row, and see to the rows that end.

        Raises:
            gymnasium.error.ResetNeeded: Before `reset`; with `DISABLED`, on a finished row.
            gymnasium.error.InvalidAction: If an action is not in `Discrete(V)`.
        """
        core = self.core
        if not core.started.all():
            raise gym.error.ResetNeeded("Some rows have not begun: call reset() before step().")
        if self.autoreset_mode is AutoresetMode.DISABLED and self._pending.any():
            raise gym.error.ResetNeeded(
                f"Rows {np.flatnonzero(self._pending).tolist()} have ended: "
                "reset them with options={'reset_mask': ...}."
            )
        resting = np.flatnonzero(self._pending)
        tensor = core.check_actions(_without_resting(actions, resting))
        # Acting comes first: if it raises, the rows that wait have not drawn their prompts.
        core.step(tensor, np.flatnonzero(~self._pending))
        if len(resting):
            core.reset(resting, self._rngs, None)
        self._show()
        rewards, (terminated, truncated) = core.rewards, core.endings()
        self._pending = (terminated | truncated).cpu().numpy()
        infos: dict[str, Any] = {}
        if self.autoreset_mode is AutoresetMode.SAME_STEP and self._pending.any():
            infos = self._finals(self._pending.copy())
            core.reset(np.flatnonzero(self._pending), self._rngs, None)
            self._pending[:] = False
        infos |= self._pack(self._core_info(), np.ones(self.num_envs, dtype=bool))
        return self._observation(), self._out(rewards, np.float64), self._out(terminated), self._out(truncated), infos

    def render(self) -> tuple[str, ...] | None:
        """Each row's text so far, and what each token cost and earned."""
        if self.render_mode != "ansi":
            return None
        return tuple(render_row(self.core, row) for row in range(self.num_envs))

    def action_masks(self) -> Any:
        """`[N, V]` bool: which tokens each row may choose now."""
        return self._out(self.core.actions.mask())

    def close_extras(self, **kwargs: Any) -> None:
        """Free the models."""
        self._core = None

    # ------------------------------------------------------------------------------------------------- helpers

    def _describe(self) -> None:
        self.single_observation_space = observation_space(self.core)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)

    def _row_seeds(self, seed: int | Sequence[int | None] | None) -> list[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, int | np.integer):
            return [int(seed) + i for i in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise ValueError(f"seed: expected an integer or {self.num_envs} of them, got {len(seed)}")
        return [None if one is None else int(one) for one in seed]

    def _seed(self, seeds: Sequence[int | None], rows: np.ndarray) -> None:
        if not self._rngs:
            pairs = [seeding.np_random(None) for _ in range(self.num_envs)]
            self._rngs, self._rng_seeds = [rng for rng, _ in pairs], [seed for _, seed in pairs]
        for row in rows:
            if seeds[row] is not None:
                self._rngs[row], self._rng_seeds[row] = seeding.np_random(seeds[row])

    def _finals(self, ended: np.ndarray) -> dict[str, Any]:
        """What the rows that ended saw last, before they begin anew."""
        final_info = self._pack(self._core_info(), ended)
        mask = self._mask(ended)
        observation = self._observation()
        if self.obs_type == "torch":
            return {"final_obs": observation, "_final_obs": mask, "final_info": final_info, "_final_info": mask}
        final_obs = np.full(self.num_envs, None, dtype=object)
        for row in np.flatnonzero(ended):
            final_obs[row] = {key: value[row].copy() for key, value in observation.items()}
        return {"final_obs": final_obs, "_final_obs": mask, "final_info": final_info, "_final_info": mask.copy()}

    def _core_info(self) -> dict[str, Any]:
        info: dict[str, Any] = {key: self._out(value) for key, value in self.core.info().items()}
        for key, texts in self.core.info_texts().items():
            info[key] = np.array(texts, dtype=object)
        return info

    def _pack(self, info: dict[str, Any], rows: np.ndarray) -> dict[str, Any]:
        """Gymnasium's form: each key with a mask beside it, and nothing of the rows outside the mask."""
        packed: dict[str, Any] = {}
        for key, value in info.items():
            if not rows.all():
                if isinstance(value, Tensor):
                    value[self._mask(~rows)] = 0
                else:
                    value[~rows] = None if value.dtype == object else 0
            packed[key], packed[f"_{key}"] = value, self._mask(rows)
        return packed

    def _mask(self, rows: np.ndarray) -> Any:
        return rows.copy() if self.obs_type == "numpy" else torch.as_tensor(rows.copy(), device=self.task.device)

    def _out(self, tensor: Tensor, dtype: Any = None) -> Any:
        """Across the boundary: a fresh array, or the tensor itself."""
        if self.obs_type == "torch":
            return tensor
        array = tensor.cpu().numpy()
        return array.astype(dtype) if dtype is not None else array.copy()

    def _observation(self) -> dict[str, Any]:
        return {key: self._out(value) for key, value in self.core.observation().items()}

    def _show(self) -> None:
        if self.render_mode == "human":
            for row in range(self.num_envs):
                print(f"[{row}] {render_row(self.core, row)}", end="\n\n")


def _rows_of(mask: Any, num_envs: int) -> np.ndarray:
    """The rows that `reset_mask` names; None: all."""
    if mask is None:
        return np.arange(num_envs)
    mask = mask.cpu().numpy() if isinstance(mask, Tensor) else mask
    fits = isinstance(mask, np.ndarray) and mask.shape == (num_envs,) and mask.dtype == np.bool_
    if not (fits and mask.any()):
        raise ValueError(
            f"options['reset_mask']: expected a boolean array of shape ({num_envs},) with a True, got {mask!r}"
        )
    return np.flatnonzero(mask)


def _without_resting(actions: Any, resting: np.ndarray) -> Any:
    """The actions, with those of rows that rest, which mean nothing, set to 0."""
    if not len(resting):
        return actions
    actions = actions.clone() if isinstance(actions, Tensor) else np.array(actions)
    if actions.ndim == 1 and len(actions) > resting[-1]:
        actions[resting] = 0
    return actions
