"""Flags of `scripts/train_ppo.py`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from agents import PPOConfig, TrainConfig
from agents.algorithms import RECIPES, Algorithm, from_config
from agents.sampling.vllm_config import VLLMConfig, VLLMServerConfig
from scripts.options import EnvFlags
from scripts.samplers import SamplerName

Name = Literal[
    "ppo",
    "vapo",
    "a2c",
    "reinforce",
    "reinforce_baseline",
    "reinforce++",
    "remax",
    "rloo",
    "grpo",
    "dr_grpo",
    "gspo",
]


@dataclass(frozen=True)
class PolicyFlags:
    """The policy."""

    model: str | None = None
    """Folder or hub name of the model to train, which is also the reference unless `env.reference` names another."""
    critic: str | None = None
    """`shared` (a value head on the policy's trunk), `separate`, or the folder of a reward model to start from.

    If absent, what a saved policy has, else `separate`, or `shared` for an algorithm without a critic."""
    lora_rank: int = 0
    """Rank of LoRA adapters; 0 trains all weights. With adapters the base model is also the reference."""
    gradient_checkpointing: bool = False
    """Less memory, a third more time."""


@dataclass(frozen=True)
class Flags:
    """Train a language model with PPO or another algorithm."""

    algorithm: Name = "ppo"
    """A recipe of `agents.algorithms`; the page Algorithms of the documentation has each."""
    group_size: int | None = None
    """Responses to each prompt of a rollout; the recipe's if absent."""
    policy: PolicyFlags = field(default_factory=PolicyFlags)
    env: EnvFlags = field(default_factory=EnvFlags)
    ppo: PPOConfig = field(default_factory=lambda: PPOConfig(entropy_coef=0.05))
    """Settings of the loop, which start from those that suit the algorithm, and of PPO alone, which others refuse."""
    sampler: SamplerName = "transformers"
    """What draws responses: our loop on the model that trains, continuous batching on it, or vLLM, here or served."""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    """vLLM's engine, or that of the server that is started."""
    servers: VLLMServerConfig = field(default_factory=VLLMServerConfig)
    """Others' servers of vLLM, and how they are reached."""
    iterations: int = 120
    """Updates to do in all."""
    save_every: int = 10
    """Updates between checkpoints; 0: at the end only."""
    keep_every: int = 0
    """Updates between policies that are kept on the way, in `policies/` by their number of updates; 0: none is."""
    out: Path = Path("runs/ppo")
    """Folder of everything that is written; of another algorithm, `runs/` and its name."""
    resume: bool = False
    """Go on from the checkpoint in `out`."""
    threads: int | None = None
    """CPU threads; PyTorch's choice if absent."""


def chosen(flags: Flags) -> tuple[Algorithm, TrainConfig]:
    """The algorithm, and the settings of its loop.

    Raises:
        ValueError: If a setting of PPO alone is given to another.
    """
    if flags.algorithm == "ppo" and flags.group_size is None:
        return from_config(flags.ppo), flags.ppo
    algorithm = from_config(flags.ppo) if flags.algorithm == "ppo" else RECIPES[flags.algorithm]()
    loop, shared = flags.ppo.loop, {f.name for f in fields(TrainConfig)}
    for f in fields(PPOConfig):
        value = getattr(flags.ppo, f.name)
        if flags.algorithm != "ppo" and f.name not in shared and value != f.default:
            raise ValueError(f"ppo.{f.name}: expected none, because {algorithm.name} has no such setting, got {value}")
    group_size = algorithm.group_size if flags.group_size is None else flags.group_size
    return replace(algorithm, group_size=group_size), loop
