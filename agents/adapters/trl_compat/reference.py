"""The frozen reference of a value-headed model, made as TRL's users make it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

from agents.adapters.trl_compat.model import AutoModelForCausalLMWithValueHead
from textenv.dropout import disable_dropout
from textenv.models import Shared, backbone, unwrap


def create_reference_model(
    model: AutoModelForCausalLMWithValueHead, num_shared_layers: int | None = None, pattern: str | None = None
) -> AutoModelForCausalLMWithValueHead:
    """A frozen copy of a model, for the KL.

    Args:
        model: What is copied.
        num_shared_layers: Freeze the embeddings and so many layers in the model too, and share them instead of copying;
            None: copy everything. (TRL froze them but copied them all the same.)
        pattern: Must be None: the layers are found by themselves.

    Raises:
        ValueError: If there are not so many layers.
    """
    if pattern is not None:
        raise ValueError(f"pattern: expected None, as the layers are found by themselves, got {pattern!r}")
    shared: list[nn.Parameter] = []
    if num_shared_layers is not None:
        shared = list(_first_layers(model.pretrained_model, num_shared_layers))
    # What deepcopy believes to have copied already stays one object, and is frozen with the copy.
    memo: dict[int, Any] = {id(parameter): parameter for parameter in shared}
    return copy.deepcopy(model, memo).requires_grad_(False).eval()


def _first_layers(lm: Any, count: int) -> Iterator[nn.Parameter]:
    """Parameters of the embeddings and of the first layers."""
    trunk = backbone(lm)
    depth = unwrap(lm).config.get_text_config().num_hidden_layers
    stacks = [part for part in trunk.modules() if isinstance(part, nn.ModuleList) and len(part) == depth]
    if not stacks or not 0 <= count <= depth:
        raise ValueError(f"num_shared_layers: expected 0 to {depth if stacks else 0}, got {count}")
    for part in trunk.modules():
        if isinstance(part, nn.Embedding):
            yield from part.parameters()
    for layer in stacks[0][:count]:
        yield from layer.parameters()


def reference_of(model: AutoModelForCausalLMWithValueHead, ref_model: Any) -> Shared:
    """The frozen π_ref: a value-headed or plain language model, or the model itself with its adapter off if None."""
    if ref_model is None:
        return Shared(model.pretrained_model, within=model.pretrained_model.disable_adapter)
    lm = ref_model.pretrained_model if isinstance(ref_model, AutoModelForCausalLMWithValueHead) else ref_model
    disable_dropout(lm)
    return Shared(lm)
