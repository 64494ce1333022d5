"""A door for code written for TRL's first PPO (0.2 to 0.11): change the import line, and it runs.

    from agents.adapters.trl_compat import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
    from agents.adapters.trl_compat import LengthSampler, create_reference_model, respond_to_batch, set_seed

TRL 0.12 dropped this interface, and 1.13 dropped PPO. `docs/coming_from_trl.md` says what differs, and how to go on
from here to `agents.PPO`.
"""

from __future__ import annotations

from transformers import set_seed

from agents.adapters.trl_compat.config import PPOConfig
from agents.adapters.trl_compat.generate import LengthSampler, respond_to_batch
from agents.adapters.trl_compat.head import CausalLMOutputWithValue
from agents.adapters.trl_compat.model import AutoModelForCausalLMWithValueHead
from agents.adapters.trl_compat.names import (
    AdaptiveKLController,
    AutoModelForSeq2SeqLMWithValueHead,
    FixedKLController,
)
from agents.adapters.trl_compat.reference import create_reference_model
from agents.adapters.trl_compat.trainer import PPOTrainer

__all__ = [
    "AdaptiveKLController",
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "CausalLMOutputWithValue",
    "FixedKLController",
    "LengthSampler",
    "PPOConfig",
    "PPOTrainer",
    "create_reference_model",
    "respond_to_batch",
    "set_seed",
]
