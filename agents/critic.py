"""The three kinds of critic: on the policy's trunk, on a trunk of its own, or grown from a reward model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from agents.value_head import ValueHead
from textenv.models import backbone, load_classifier, unwrap


@dataclass(frozen=True)
class Critic:
    """A value head and what it reads."""

    kind: str
    """`"shared"` or `"separate"`: what the files of a saved policy hold."""
    head: ValueHead
    """Zero at the start, or a reward model's score."""
    backbone: nn.Module | None
    """None if it reads the policy's trunk."""


def build_critic(
    lm: Any, kind: str | Path, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> Critic:
    """Make a critic for a language model.

    Args:
        lm: The policy's model, before LoRA.
        kind: `"shared"`, `"separate"`, or the folder of a reward model.
        dtype: Type of a reward model's trunk.
        trust_remote_code: Whether to run model code found in that folder.

    Raises:
        ValueError: If `kind` is neither, or its folder holds no one-score classifier with the policy's vocabulary.
    """
    trunk: Any = backbone(lm)
    device = next(trunk.parameters()).device
    size = unwrap(lm).config.get_text_config().hidden_size
    if kind == "shared":
        return Critic("shared", ValueHead(size, device), None)
    if kind == "separate":
        return Critic("separate", ValueHead(size, device), copy.deepcopy(trunk).requires_grad_(True))
    model: Any
    if not Path(kind).is_dir() and "/" not in str(kind):
        raise ValueError(f"critic: expected 'shared', 'separate' or the folder of a reward model, got {str(kind)!r}")
    model, _ = load_classifier(kind, argument="critic", device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    score = getattr(model, "score", None)
    if not isinstance(score, nn.Linear):
        raise ValueError(f"critic: {kind} has no linear `score` on its trunk; got {type(score).__name__}")
    critic_trunk: Any = backbone(model)
    ours, theirs = (t.get_input_embeddings().num_embeddings for t in (trunk, critic_trunk))
    if theirs < ours:
        raise ValueError(f"critic must read the policy's {ours} ids; the reward model in {kind} knows {theirs}")
    head = ValueHead(score.in_features, device)
    with torch.no_grad():
        head.linear.weight.copy_(score.weight)
        if score.bias is not None:
            head.linear.bias.copy_(score.bias)
    return Critic("separate", head, critic_trunk.requires_grad_(True))
