"""A small action space: the k most probable next tokens under the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space

from textenv.wrappers.base import TextVectorWrapper, TextWrapper


class TopKActions(TextWrapper, RecordConstructorArgs):
    """Choose among the k most probable next tokens under the reference.

    The action is an index, `Discrete(k)`. The observation gains `candidates`, int64 `(k,)`, the token ids, most
    probable first and ties by id; and `candidate_logprobs`, float32 `(k,)`, log π_ref of each at the environment's
    temperature, under the law over all V tokens.

    Top-k is the learner's choice, not the MDP's: π is its law over the k, π_ref stays the law over all V, and so does
    `ref_logprob` in info. KL(π‖π_ref) of any such π is at least −log of the mass of the k. An environment
    that asks a live policy (`kl_source="policy"`, `attach`) is refused, because that law is over all V.

    The law of a state is computed once, when the state is reached: candidates are picked from it and the next
    `ref_logprob` is read from it. With `kl_credit="sequence"` it is so too, and nothing is saved against `"token"`.

    A stop token among the candidates ends the episode when it is chosen; `always` names ids that are candidates
    however improbable they are, such as the stop tokens. Where a constraint allows fewer than k tokens, the first
    candidate is repeated in the slots that are left, so that every index is legal; `action_masks()` and
    `info["action_mask"]` tell them apart.

    Like `attach`, it changes the environment inside, which must then be reset.
    """

    def __init__(self, env: gym.Env, k: int, always: Sequence[int] = ()) -> None:
        """Wrap an environment.

        Args:
            env: Made by `gym.make("RLHF-Text-v0", ...)`, wrapped or not.
            k: How many candidates.
            always: Token ids that are always candidates where they are allowed; at most k.

        Raises:
            ValueError: For another environment, one without a reference, `kl_source="policy"`, a second wrapper of
                the kind, or a bad `k` or `always`.
        """
        RecordConstructorArgs.__init__(self, k=k, always=always)
        super().__init__(env)
        self.text_env.offer(k, always)
        self.action_space = spaces.Discrete(k)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Choose a candidate by its index.

        Raises:
            gymnasium.error.InvalidAction: If the index is not in `Discrete(k)`.
        """
        index = np.asarray(action)
        if index.shape != ():
            raise gym.error.InvalidAction(f"action: expected one index, got shape {index.shape}")
        return self.env.step(int(self.text_env.core.chosen(index.reshape(1))[0]))


class VectorTopKActions(TextVectorWrapper, RecordConstructorArgs):
    """`TopKActions` for N rows: action space `MultiDiscrete([k] * N)`, `candidates` and `candidate_logprobs` `(N, k)`.

    In every autoreset mode, with NumPy and with torch; `final_obs` has candidates too.
    """

    def __init__(self, env: VectorEnv, k: int, always: Sequence[int] = ()) -> None:
        """Wrap a batched environment.

        Args:
            env: Made by `gym.make_vec("RLHF-Text-v0", ...)`, wrapped or not.
            k: How many candidates.
            always: Token ids that are always candidates where they are allowed; at most k.

        Raises:
            ValueError: As `TopKActions`.
        """
        RecordConstructorArgs.__init__(self, k=k, always=always)
        super().__init__(env)
        self.text_envs.offer(k, always)
        self.single_action_space = spaces.Discrete(k)
        self.action_space = batch_space(self.single_action_space, env.num_envs)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Choose a candidate in every row by its index.

        Raises:
            gymnasium.error.InvalidAction: If an index is not in `Discrete(k)`.
        """
        tokens = self.text_envs.core.chosen(actions)
        return self.env.step(tokens if self.text_envs.obs_type == "torch" else tokens.cpu().numpy())
