"""Proximal policy optimization of a language model (Schulman et al. 2017; Ziegler et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import agents.checkpoint as checkpoint
from agents.agent import Agent
from agents.algorithms.recipes import from_config
from agents.config import PPOConfig
from agents.policy import ValueHeadLM
from agents.sampling import Sampler
from textenv.prompts import Prompt


class PPO(Agent):
    """The agent whose algorithm is the clipped surrogate on whitened GAE with a critic, all of it set in `PPOConfig`.

    It is `Agent(policy, envs, algorithms.from_config(config), config)`; see `Agent` for all that it does.
    """

    def __init__(
        self,
        policy: ValueHeadLM,
        envs: Any,
        config: PPOConfig | None = None,
        sampler: Sampler | None = None,
        *,
        eval_prompts: Sequence[Prompt] | None = None,
    ) -> None:
        """Prepare to learn.

        Args:
            policy: What learns.
            envs: A `TextEnv` or `TextVectorEnv`, wrapped or not.
            config: Settings; None: the defaults.
            sampler: Draws responses; None: `TransformersSampler(policy)`.
            eval_prompts: Held-out prompts, evaluated every `eval_every` updates.

        Raises:
            ValueError: If the environment cannot be learnt from with this policy.
        """
        config = PPOConfig() if config is None else config
        if not isinstance(config, PPOConfig):
            raise ValueError(f"config: expected a PPOConfig, got {type(config).__name__}")
        super().__init__(policy, envs, from_config(config), config, sampler, eval_prompts=eval_prompts)

    @classmethod
    def load(  # type: ignore[override]  # the algorithm is in the config
        cls,
        folder: str | Path,
        envs: Any,
        sampler: Sampler | None = None,
        *,
        eval_prompts: Sequence[Prompt] | None = None,
        policy: ValueHeadLM | None = None,
    ) -> Self:
        """Go on from a checkpoint of `PPO`.

        Args:
            folder: What `save` wrote.
            envs: The environment that it learnt in, made again.
            sampler: As in the constructor.
            eval_prompts: As in the constructor.
            policy: As in `Agent.load`.

        Raises:
            ValueError: If the folder holds no checkpoint, or one of another model or algorithm.
        """
        saved = checkpoint.read(Path(folder))
        config = saved.config()
        if not isinstance(config, PPOConfig):
            raise ValueError(f"folder: expected a checkpoint of PPO, got one of {saved.name()} (Agent.load reads it)")
        agent = cls(saved.policy(envs) if policy is None else policy, envs, config, sampler, eval_prompts=eval_prompts)
        saved.restore(agent)
        return agent
