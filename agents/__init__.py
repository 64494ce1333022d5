"""Agents that learn in `RLHF-Text-v0`: a value-headed language-model policy, samplers, and PPO."""

from agents import kl, logprobs, losses, masked, returns
from agents.config import PPOConfig
from agents.evaluation import Evaluation, evaluate
from agents.policy import ValueHeadLM
from agents.ppo import PPO
from agents.rollout import Rollout
from agents.sampling import Sampler, Samples, TransformersSampler

__all__ = [
    "PPO",
    "Evaluation",
    "PPOConfig",
    "Rollout",
    "Sampler",
    "Samples",
    "TransformersSampler",
    "ValueHeadLM",
    "evaluate",
    "kl",
    "logprobs",
    "losses",
    "masked",
    "returns",
]
