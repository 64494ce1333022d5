"""Reinforcement learning on text as a Gymnasium environment.

>>> import gymnasium as gym, textenv
>>> env = gym.make("RLHF-Text-v0")
"""

from gymnasium.envs.registration import register, registry

from textenv import constraints, embedded, kl, wrappers
from textenv.checker import check_vector_env
from textenv.env import TextEnv
from textenv.models import Shared
from textenv.options import EnvOptions
from textenv.prompt_streams import MixedPromptStream, PromptStream
from textenv.prompts import PromptMixture, read_prompts
from textenv.tables import read_rows
from textenv.types import FinishReason, ReplayRecord
from textenv.vector_env import TextVectorEnv

__all__ = [
    "EnvOptions",
    "FinishReason",
    "MixedPromptStream",
    "PromptMixture",
    "PromptStream",
    "ReplayRecord",
    "Shared",
    "TextEnv",
    "TextVectorEnv",
    "check_vector_env",
    "constraints",
    "embedded",
    "kl",
    "read_prompts",
    "read_rows",
    "wrappers",
]

if "RLHF-Text-v0" not in registry:
    # No max_episode_steps: Gymnasium's TimeLimit would truncate, and a truncation is bootstrapped from.
    register(
        id="RLHF-Text-v0",
        entry_point="textenv.env:TextEnv",
        vector_entry_point="textenv.vector_env:TextVectorEnv",
    )
