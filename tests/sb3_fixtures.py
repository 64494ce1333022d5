"""Small models of stable-baselines3, and float64 log-probs to hold them to."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer

from agents.adapters import sb3_bridge
from agents.adapters.sb3_bridge.buffers import EpisodeRolloutBuffer
from tests.agent_fixtures import make_env, make_policy

STOCK = {"rollout_buffer_class": None, "rollout_buffer_kwargs": None}


def make_model(
    algorithm: Any = PPO,
    changes: dict[str, Any] | None = None,
    *,
    critic: str = "shared+",
    num_envs: int = 6,
    lm: Any = None,
    how: dict[str, bool] | None = None,
    **options: Any,
) -> Any:
    """A model over a tiny Llama that is not its reference, so that the KL is not 0."""
    policy = make_policy(lm, critic)
    if lm is None:
        with torch.no_grad():
            generator = torch.Generator().manual_seed(3)
            for parameter in policy.lm.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return sb3_bridge.make(algorithm, policy, make_env(num_envs=num_envs, **options), changes, **(how or {}))


def float64_logprobs(lm: Any, temperature: float = 1.0) -> Any:
    """`logprobs(prefix) -> [V]` by one full forward of a float64 copy, unbatched and unpadded."""
    model = copy.deepcopy(lm).double()

    @torch.no_grad()
    def logprobs(prefix: list[int]) -> np.ndarray:
        logits = model(input_ids=torch.tensor([prefix])).logits[0, -1]
        return torch.log_softmax(logits / temperature, -1).numpy()

    return logprobs


class Recording:
    """Listens to what a buffer is given: each step's states, and how much of them is the prompt."""

    def __init__(self, buffer: RolloutBuffer) -> None:
        self.buffer, self.prefixes, self.prompts = buffer, [], []
        self._add = buffer.add
        buffer.add = self  # type: ignore[method-assign]

    def __call__(self, obs: dict[str, np.ndarray], *args: Any, **kwargs: Any) -> None:
        lengths = obs["attention_mask"].sum(1)
        self.prefixes.append([row[:n].tolist() for row, n in zip(obs["input_ids"], lengths, strict=True)])
        self.prompts.append(obs["prompt_length"][:, 0].tolist())
        self._add(obs, *args, **kwargs)


def columns(buffer: RolloutBuffer, name: str) -> np.ndarray:
    """`[T, N]`, also after the library has flattened it."""
    array = getattr(buffer, name)
    if buffer.generator_ready and name not in ("rewards", "episode_starts"):
        array = array.reshape(buffer.n_envs, buffer.buffer_size, -1).swapaxes(0, 1)
    return array.reshape(buffer.buffer_size, buffer.n_envs)


__all__ = ["STOCK", "EpisodeRolloutBuffer", "Recording", "columns", "float64_logprobs", "make_model"]
