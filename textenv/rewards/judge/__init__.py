"""A judge served over HTTP as a reward."""

from textenv.rewards.judge.cache import DiskCache, MemoryCache, ScoreCache
from textenv.rewards.judge.chat import Chat, ExpectedDigit, JSONField, Match, Reader
from textenv.rewards.judge.config import JudgeConfig, JudgeError, Retries, Timeouts
from textenv.rewards.judge.protocols import Classify, JudgeProtocol, Plain, Pooling, Score, UnusableReply
from textenv.rewards.judge.reward import JudgeReward

__all__ = [
    "Chat",
    "Classify",
    "DiskCache",
    "ExpectedDigit",
    "JSONField",
    "JudgeConfig",
    "JudgeError",
    "JudgeProtocol",
    "JudgeReward",
    "Match",
    "MemoryCache",
    "Plain",
    "Pooling",
    "Reader",
    "Retries",
    "Score",
    "ScoreCache",
    "Timeouts",
    "UnusableReply",
]
