"""Gymnasium has a checker for single environments and none for vector ones; this is one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import closing
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

RULES = {
    "metadata": "metadata['autoreset_mode'] must be an AutoresetMode and equal to the attribute autoreset_mode",
    "spaces": "the spaces must be those of N single environments",
    "contained": "observations must be elements of observation_space",
    "fresh": "arrays handed out must not share memory with those handed out before",
    "equal": "the vector environment must say what SyncVectorEnv of the single one says",
}


def check_vector_env(
    envs: VectorEnv,
    single: Callable[[], gym.Env],
    *,
    steps: int = 64,
    seed: int = 0,
    sample: Callable[[np.random.Generator], np.ndarray] | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-4,
) -> None:
    """Step a vector environment beside `SyncVectorEnv` of the single one and compare everything they say.

    Args:
        envs: A vector environment with NumPy observations, in any autoreset mode.
        single: Makes the single environment with the same options.
        steps: How many batched steps.
        seed: Seeds both, and the actions.
        sample: Draws one action a row; None: uniform over a Discrete action space.
        rtol: Relative tolerance of floating-point numbers.
        atol: Absolute tolerance; two float32 forwards of different batch shapes differ in their last bits.

    Raises:
        AssertionError: Its message begins with the rule that was broken.
    """
    mode = envs.metadata.get("autoreset_mode")
    if not isinstance(mode, AutoresetMode) or getattr(envs, "autoreset_mode", None) is not mode:
        raise AssertionError(f"{RULES['metadata']} ({mode!r})")
    with closing(SyncVectorEnv([single for _ in range(envs.num_envs)], autoreset_mode=mode)) as twin:
        for name in ("single_observation_space", "single_action_space", "observation_space", "action_space"):
            _rule("spaces", getattr(envs, name) == getattr(twin, name), name)
        rng = np.random.default_rng(seed)
        width = int(getattr(envs.single_action_space, "n", 0))
        draw = sample or (lambda generator: generator.integers(width, size=envs.num_envs))
        given = [_hand_out("reset", envs.reset(seed=seed), twin.reset(seed=seed), rtol, atol)]
        for step in range(steps):
            actions = draw(rng)
            ours = envs.step(actions)
            _rule("contained", ours[0] in envs.observation_space, f"at step {step}")
            _rule("fresh", not _shares_memory(given[-1][0], ours), f"at step {step}")
            given.append(_hand_out(f"step {step}", ours, twin.step(actions), rtol, atol))
            ended = np.asarray(ours[2]) | np.asarray(ours[3])
            if mode is AutoresetMode.DISABLED and ended.any():
                begun, beside = (each.reset(options={"reset_mask": ended.copy()}) for each in (envs, twin))
                given.append(_hand_out(f"reset_mask after step {step}", begun, beside, rtol, atol))
        for number, (then, copied) in enumerate(given):
            _rule("fresh", _difference(then, copied, 0.0, 0.0) is None, f"what call {number} gave has changed since")


def _hand_out(where: str, ours: Any, theirs: Any, rtol: float, atol: float) -> tuple[Any, Any]:
    """What was handed out, compared, and a copy of it to see later whether it was written to."""
    difference = _difference(ours, theirs, rtol, atol)
    _rule("equal", difference is None, f"{where}: {difference}")
    return ours, copy.deepcopy(ours)


def _rule(name: str, holds: bool, detail: str) -> None:
    if not holds:
        raise AssertionError(f"{RULES[name]} ({detail})")


def _difference(ours: Any, theirs: Any, rtol: float, atol: float) -> str | None:
    """Where two nested values differ; None if they do not."""
    if isinstance(theirs, dict):
        if not isinstance(ours, dict) or set(ours) != set(theirs):
            return f"keys {sorted(ours) if isinstance(ours, dict) else ours} against {sorted(theirs)}"
        pairs = [(f"[{key!r}]", ours[key], theirs[key]) for key in theirs]
    elif isinstance(theirs, tuple) or (isinstance(theirs, np.ndarray) and theirs.dtype == object):
        if len(ours) != len(theirs):
            return f"{len(ours)} items against {len(theirs)}"
        pairs = [(f"[{i}]", a, b) for i, (a, b) in enumerate(zip(ours, theirs, strict=True))]
    else:
        return _leaf_difference(ours, theirs, rtol, atol)
    for place, a, b in pairs:
        inner = _difference(a, b, rtol, atol)
        if inner is not None:
            return place + inner
    return None


def _leaf_difference(ours: Any, theirs: Any, rtol: float, atol: float) -> str | None:
    a, b = np.asarray(ours), np.asarray(theirs)
    if a.shape != b.shape or a.dtype != b.dtype:
        return f" {a.dtype}{a.shape} against {b.dtype}{b.shape}"
    same = np.allclose(a, b, rtol=rtol, atol=atol) if np.issubdtype(a.dtype, np.floating) else np.array_equal(a, b)
    return None if same else f" {ours!r} against {theirs!r}"


def _shares_memory(before: Any, after: Any) -> bool:
    old, new = list(_arrays(before)), list(_arrays(after))
    return any(np.shares_memory(a, b) for a in old for b in new)


def _arrays(value: Any) -> list[np.ndarray]:
    if isinstance(value, dict):
        return [array for item in value.values() for array in _arrays(item)]
    if isinstance(value, tuple):
        return [array for item in value for array in _arrays(item)]
    return [value] if isinstance(value, np.ndarray) and value.dtype != object else []
