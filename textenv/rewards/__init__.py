"""What scores a response."""

from textenv.rewards.base import Reward, RewardFunction, as_reward
from textenv.rewards.classifier import ClassifierReward

__all__ = ["ClassifierReward", "Reward", "RewardFunction", "as_reward"]
