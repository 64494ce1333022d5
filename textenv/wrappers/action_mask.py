"""Constraints as wrappers: which tokens may be chosen in a state."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import VectorEnv

from textenv.wrappers.base import TextVectorWrapper, TextWrapper


class ActionMask(TextWrapper, RecordConstructorArgs):
    """Allow only some tokens, and tell which.

    A constraint belongs to the MDP: with A(s) the tokens allowed in a state, π and π_ref are both softmax over A(s),
    and `ref_logprob`, the KL under every `kl_source`, and `replay` are of those laws. A learner draws from its own
    law over A(s), and finds the set where it looks for it:

    - `info["action_mask"]`, int8 `(V,)`, in reset and step;
    - the method `action_masks()`, bool `(V,)`;
    - with `mask_in_obs=True`, `action_mask` in the observation, int8 `(V,)`.

    A token that is not allowed is an `InvalidAction`. A state in which nothing is allowed is a `ValueError` of the step
    that would lead there, which has then not happened. Where an episode has terminated, all is allowed.

    It is the same as the environment's option `constraint=`; together with `TopKActions`, in either order, the
    mask is over the k candidates. Like `attach`, it changes the environment inside, which must then be reset.
    """

    def __init__(self, env: gym.Env, constraint: Any = None, mask_in_obs: bool = False) -> None:
        """Wrap an environment.

        Args:
            env: Made by `gym.make("RLHF-Text-v0", ...)`, wrapped or not.
            constraint: An object of `textenv.constraints`, a function `(response ids) -> mask or ids`, or a list of
                these; None: the one that the environment was made with.
            mask_in_obs: Whether observations carry the mask.

        Raises:
            ValueError: For another environment, a constraint that does not fit, a second one, or none at all.
        """
        RecordConstructorArgs.__init__(self, constraint=constraint, mask_in_obs=mask_in_obs)
        super().__init__(env)
        _constrain(self.text_env, constraint, mask_in_obs)


class VectorActionMask(TextVectorWrapper, RecordConstructorArgs):
    """`ActionMask` for N rows: masks are `(N, V)`, in every autoreset mode, with NumPy and with torch."""

    def __init__(self, env: VectorEnv, constraint: Any = None, mask_in_obs: bool = False) -> None:
        """Wrap a batched environment.

        Args:
            env: Made by `gym.make_vec("RLHF-Text-v0", ...)`, wrapped or not.
            constraint: As in `ActionMask`.
            mask_in_obs: Whether observations carry the mask.

        Raises:
            ValueError: As `ActionMask`.
        """
        RecordConstructorArgs.__init__(self, constraint=constraint, mask_in_obs=mask_in_obs)
        super().__init__(env)
        _constrain(self.text_envs, constraint, mask_in_obs)


def _constrain(inner: Any, constraint: Any, mask_in_obs: bool) -> None:
    if constraint is not None:
        inner.constrain(constraint)
    elif inner.task.constraint is None:
        raise ValueError("constraint: expected one, because the environment was made without, got None")
    if mask_in_obs:
        inner.show_action_mask()
