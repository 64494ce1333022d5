"""TorchRL's `GymWrapper`, collector, `GAE` and `ClipPPOLoss` on a language model.

    history = train(policy, envs, iterations=60)

is what the other functions here, each usable alone, put together: `make_env`, `actor_critic`, `make_loss`.
"""

from __future__ import annotations

from agents.adapters.torchrl_bridge.env import KLCharge, make_env
from agents.adapters.torchrl_bridge.training import Settings, actor_critic, make_loss, train

__all__ = ["KLCharge", "Settings", "actor_critic", "make_env", "make_loss", "train"]
