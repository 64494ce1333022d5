"""What our wrappers have in common: the environment inside, and what libraries look for on the outside."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper

from textenv.env import TextEnv
from textenv.vector_env import TextVectorEnv


class TextWrapper(gym.Wrapper):
    """A wrapper of `TextEnv`, itself wrapped or not."""

    def __init__(self, env: gym.Env) -> None:
        """Find the environment inside.

        Raises:
            ValueError: If it is none of ours.
        """
        inner: Any = env.unwrapped if isinstance(env, gym.Env) else env
        if not isinstance(inner, TextEnv):
            raise ValueError(f"env: expected gym.make('RLHF-Text-v0', ...), got {inner!r}")
        super().__init__(env)
        self.text_env: TextEnv = inner
        """The environment inside."""

    def action_masks(self) -> np.ndarray:
        """`(A,)` bool: which actions may be chosen now; what `MaskablePPO` of sb3-contrib asks."""
        return self.text_env.action_masks()


class TextVectorWrapper(VectorWrapper):
    """A wrapper of `TextVectorEnv`, itself wrapped or not."""

    def __init__(self, env: VectorEnv) -> None:
        """Find the environment inside.

        Raises:
            ValueError: If it is none of ours.
        """
        inner: Any = env.unwrapped if isinstance(env, VectorEnv) else env
        if not isinstance(inner, TextVectorEnv):
            raise ValueError(f"env: expected gym.make_vec('RLHF-Text-v0', ...), got {inner!r}")
        super().__init__(env)
        self.text_envs: TextVectorEnv = inner
        """The environment inside."""

    @property
    def autoreset_mode(self) -> AutoresetMode:
        """That of the environment inside."""
        return self.text_envs.autoreset_mode

    @property
    def obs_type(self) -> str:
        """`numpy` or `torch`."""
        return self.text_envs.obs_type

    def action_masks(self) -> Any:
        """`(N, A)` bool: which actions each row may choose now."""
        return self.text_envs.action_masks()
