"""Stable-baselines3's own `PPO`, `A2C` and `MaskablePPO` (sb3-contrib) on a language model, unmodified.

    model = make(PPO, policy, envs)
    history = learn(model, iterations=60)

is what `PPO(**settings(PPO, policy, envs))` and `model.learn(timesteps, callback=TextCallback())` are.
"""

from __future__ import annotations

from agents.adapters.sb3_bridge.buffers import EpisodeRolloutBuffer, MaskableEpisodeRolloutBuffer
from agents.adapters.sb3_bridge.env import TextVecEnv
from agents.adapters.sb3_bridge.policy import LivePolicy, MaskableTextPolicy, TextPolicy
from agents.adapters.sb3_bridge.training import TextCallback, learn, make, settings

__all__ = [
    "EpisodeRolloutBuffer",
    "LivePolicy",
    "MaskableEpisodeRolloutBuffer",
    "MaskableTextPolicy",
    "TextCallback",
    "TextPolicy",
    "TextVecEnv",
    "learn",
    "make",
    "settings",
]
