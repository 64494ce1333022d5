"""Rewards that are folders."""

from __future__ import annotations

from pathlib import Path

import torch

from textenv.models import load_config
from textenv.rewards.base import RewardFunction
from textenv.rewards.classifier import ClassifierReward
from textenv.rewards.token_classifier import TokenClassifierReward
from textenv.rewards.words import WordsReward


def load_reward(
    source: str | Path,
    *,
    argument: str = "reward",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> RewardFunction:
    """The reward in a folder: a sequence classifier with one label, a token classifier, or a sum of words.

    Args:
        source: Folder, or hub name of a classifier.
        argument: For error messages.
        device: Where a classifier runs.
        dtype: Its floating-point type.
        trust_remote_code: Whether the folder may bring Python code.

    Raises:
        ValueError: If the folder is unknown or holds something else.
    """
    if WordsReward.is_in(source):
        return WordsReward.load(source, argument=argument)
    config = load_config(source, argument=argument, trust_remote_code=trust_remote_code)
    of_tokens = any(name.endswith("ForTokenClassification") for name in config.architectures or ())
    kind = TokenClassifierReward if of_tokens else ClassifierReward
    return kind(source, argument=argument, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
