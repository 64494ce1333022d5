"""Agents that learn in `RLHF-Text-v0`: a value-headed language-model policy, samplers, PPO and other algorithms."""

from agents import algorithms, kl, logprobs, losses, masked, returns
from agents.agent import Agent
from agents.config import PPOConfig, TrainConfig
from agents.evaluation import Evaluation, evaluate
from agents.policy import ValueHeadLM
from agents.ppo import PPO
from agents.rollout import Rollout
from agents.sampling import Sampler, Samples, TransformersSampler

__all__ = [
    "PPO",
    "Agent",
    "Evaluation",
    "PPOConfig",
    "Rollout",
    "Sampler",
    "Samples",
    "TrainConfig",
    "TransformersSampler",
    "ValueHeadLM",
    "algorithms",
    "evaluate",
    "kl",
    "logprobs",
    "losses",
    "masked",
    "returns",
]
