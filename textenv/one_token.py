"""Attention of one new token per row on a CPU, where the fused kernel costs more than two plain products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

_NAME = "textenv_one_token"


@contextmanager
def one_token_attention(config: Any) -> Iterator[None]:
    """Decode with `attend`, if the model attends by "sdpa"; any other choice is left alone.

    Args:
        config: The text model's, for which `can_decode` was true.
    """
    if config._attn_implementation != "sdpa":
        yield
        return
    config._attn_implementation_internal = _NAME  # not the property, which looks through nested configurations
    try:
        yield
    finally:
        config._attn_implementation_internal = "sdpa"


def can_decode(trunk: Any, device: torch.device) -> bool:
    """Whether a trunk finds its attention by name, and the device is one where this one is quicker."""
    if device.type != "cpu" or not getattr(trunk, "_supports_attention_backend", False):
        return False
    _register()
    return True


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """softmax(scaling · q·Kᵀ + mask)·V, in the form that transformers asks for.

    Args:
        module: The attention layer.
        query: `[B, H, 1, D]`.
        key: `[B, K, W, D]`, H a multiple of K.
        value: `[B, K, W, D]`.
        attention_mask: `[B, 1, 1, W]`, bool (False is hidden) or added to the scores; None: nothing is hidden.
        dropout: 0 in a decoder.
        scaling: Of the scores; None: D^-½.
        **others: As "sdpa" takes them, which answers where they ask for more.

    Returns:
        `[B, 1, H, D]`, and None for the weights.
    """
    if dropout or any(others.get(name) is not None for name in ("position_bias", "cache", "s_aux")):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)
    rows, heads, _, size = query.shape
    # The heads that share keys are queries of one product.
    scores = (query.reshape(rows, key.shape[1], -1, size) * (scaling or size**-0.5)) @ key.transpose(2, 3)
    if attention_mask is not None:
        hides = attention_mask.dtype == torch.bool
        scores = scores.masked_fill(~attention_mask, -torch.inf) if hides else scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).view(rows, 1, heads, size), None


@cache
def _register() -> None:
    """Tell transformers of it, at the first use: importing this module is to stay quick."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
