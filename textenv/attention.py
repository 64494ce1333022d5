"""Attention of one new token per row, and of rows without padding, inside of the forwards of transformers.

A model finds its attention by the name in its configuration. Rows without padding come under "sdpa" itself, which hears
of them by a keyword that models hand on, and is what it was without it. For one new token the name is changed for the
time of the forward; whoever else runs the model meanwhile gets the same numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from textenv.short_attention import ShortAttention, is_short

_ONE_TOKEN = "textenv_one_token"
_PRODUCTS_WIN = ("cpu",)
"""Devices on which two plain products beat the fused kernel for one query."""
_SPECIAL = ("position_bias", "cache", "s_aux")
"""What "sdpa" may be asked for beyond a mask, and these two cannot do."""


@contextmanager
def one_token_attention(config: Any) -> Iterator[None]:
    """Decode with `attend_one`, if the model attends by "sdpa"; any other choice is left alone.

    Args:
        config: The text model's, for which `can_attend` was true.
    """
    if config._attn_implementation != "sdpa":
        yield
        return
    config._attn_implementation_internal = _ONE_TOKEN  # not the property, which looks through nested configurations
    try:
        yield
    finally:
        config._attn_implementation_internal = "sdpa"


def one_token_mask(config: Any, shown: Tensor) -> Tensor:
    """The mask that costs `attend_one` least: on a CPU numbers to add, made once for all layers.

    Args:
        config: As above.
        shown: `[B, W]` bool, which keys a row's token sees.
    """
    if config._attn_implementation != "sdpa" or shown.device.type not in _PRODUCTS_WIN:
        return shown
    return torch.zeros(shown.shape).masked_fill_(~shown, -torch.inf)[:, None, None]


def can_attend(trunk: Any) -> bool:
    """Whether a model finds its attention by name, so that it may be one of these."""
    if not getattr(trunk, "_supports_attention_backend", False):
        return False
    _register()
    return True


def plain_attention(trunk: Any, columns: int) -> bool:
    """Whether each token of rows of so many attends to all before it, in a model that is told positions."""
    if not _takes_positions(type(trunk)):
        return False
    config = trunk.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or getattr(config, "block_types", None) or ["full_attention"])
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    # Older families (GPT-Neo) name local layers in their own way: anything unusual is recomputed, and stays exact.
    unusual = kinds - {"full_attention", "sliding_attention"} or getattr(config, "attention_types", None)
    return not unusual and all(not window or window >= columns for window in windows)


@cache
def _takes_positions(kind: type) -> bool:
    return {"past_key_values", "position_ids"} <= set(inspect.signature(kind.forward).parameters)


def attend_one(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """softmax(scaling · q·Kᵀ + mask)·V, on a CPU by two products, which beat the fused kernel there.

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
    special = query.shape[2] != 1 or dropout or any(others.get(name) is not None for name in ("packing", *_SPECIAL))
    # Keys wider than values (MLA), or a mask of each head (Doge), is left to "sdpa".
    if special or key.shape[-1] != value.shape[-1] or (attention_mask is not None and attention_mask.shape[1] != 1):
        return _attend(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others)
    rows, heads, _, size = query.shape
    # The heads that share keys are queries of one product: "sdpa" under a mask would copy the keys for each.
    grouped = query.reshape(rows, key.shape[1], -1, size)
    if query.device.type not in _PRODUCTS_WIN:
        found = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
        return found.reshape(rows, 1, heads, size), None
    scores = (grouped * (scaling or size**-0.5)) @ key.transpose(2, 3)
    if attention_mask is not None:
        hides = attention_mask.dtype == torch.bool
        scores = scores.masked_fill(~attention_mask, -torch.inf) if hides else scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).view(rows, 1, heads, size), None


def attend_packed(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    packing: Any,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each of B rows whose tokens stand in one, row after row, what rows begin with alike once.

    All else in the layer is computed of these M tokens; here they are laid out as padded rows, those of similar lengths
    together, for the fused kernel, or for plain products where those are faster.

    Args:
        module: The attention layer.
        query: `[1, H, M, D]`.
        key: `[1, K, M, D]`, H a multiple of K.
        value: `[1, K, M, D]`.
        attention_mask: That of the packing, a placeholder: rows and causality are the mask.
        dropout: Share of the weights.
        scaling: Of the scores; None: D^-½.
        packing: The `textenv.packing.Packing` of the rows.
        **others: As "sdpa" takes them.

    Returns:
        `[1, M, H, D]`, and None for the weights.

    Raises:
        NotImplementedError: If more is asked for.
    """
    changed = attention_mask is None or attention_mask.numel() != 1  # a model that makes a mask of its own is not heard
    if changed or any(others.get(name) is not None for name in _SPECIAL) or key.shape[-1] != value.shape[-1]:
        raise NotImplementedError("attention: expected plain causal attention, got one with biases, sinks or two sizes")
    if not dropout and is_short(query, packing):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        # Not [0], whose gradient is copied into zeros, and in another order.
        rows = [tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value)]
        return ShortAttention.apply(*rows, scale, packing)[None], None
    heads, shared = [query.shape[1], key.shape[1], value.shape[1]], query.shape[1] != key.shape[1]
    # Queries, keys and values together, and all groups by one split: every operation has its price, twice in backward.
    tokens = torch.cat([tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value)], dim=1)
    found = []
    for cells in packing.split(packing.padded(tokens)):
        padded = cells.transpose(1, 2).split(heads, dim=1)
        out = F.scaled_dot_product_attention(
            *padded, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=shared
        )
        found.append(out.transpose(1, 2).flatten(0, 1))
    return packing.unpadded(torch.cat(found))[None], None


def _sdpa(*arguments: Any, **others: Any) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(*arguments, **others)


@cache
def _register() -> None:
    """Tell transformers of both, at the first use: importing this module is to stay quick."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(_ONE_TOKEN, attend_one)
    AttentionMaskInterface.register(_ONE_TOKEN, sdpa_mask)
    AttentionInterface.register("sdpa", _attend)


def _attend(*arguments: Any, packing: Any = None, **others: Any) -> tuple[Tensor, None]:
    if packing is None:
        return _sdpa(*arguments, **others)
    return attend_packed(*arguments, packing=packing, **others)
