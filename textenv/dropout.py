"""Switching dropout off for good."""

from __future__ import annotations

from typing import Any

from torch import nn

_DROPOUT_WORDS = ("dropout", "pdrop", "layerdrop", "drop_path")


def disable_dropout(module: nn.Module) -> None:
    """Set every dropout probability in a model to 0, whatever mode it is in.

    `eval()` is no substitute: it would switch gradient checkpointing off too, and one call of `train()` undoes it.
    Covers dropout modules (LoRA's too), plain attributes such as `attention_dropout`, and configurations, which some
    models read at every forward.
    """
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0
        _zero_dropout_attributes(part)
        config = getattr(part, "config", None)
        if config is not None and not isinstance(config, dict):
            _zero_dropout_attributes(config)
            text_config = getattr(config, "text_config", None)
            if text_config is not None:
                _zero_dropout_attributes(text_config)


def _zero_dropout_attributes(thing: Any) -> None:
    for name, value in list(vars(thing).items()):
        if isinstance(value, float) and value != 0.0 and any(word in name for word in _DROPOUT_WORDS):
            setattr(thing, name, 0.0)
