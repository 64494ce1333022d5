"""Noticing that a model's weights have changed, without reading them."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_optimizer_steps = 0


def weights_stamp(*models: nn.Module | None) -> tuple[Any, ...]:
    """Something that differs whenever a model's outputs may differ: compare it with an earlier one.

    It holds each tensor's address and version, the state of each adapter, and how many steps any optimizer has done:
    fused optimizers move no version, and `load_state_dict(assign=True)` puts new tensors in place of the old, so they
    are listed afresh each time. Autocast is part of it, as it changes what a forward gives. Keep `held_weights` beside
    it, or an old tensor's address may become a new one's.

    A write into `p.data`, or through NumPy, leaves no trace: who writes so must say so.

    Args:
        *models: What is read; None is skipped.
    """
    _count_optimizer_steps()
    adapter = _adapter_class()
    stamp: list[Any] = [_optimizer_steps]
    for device in ("cpu", "cuda"):
        stamp.append(torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device))
    found: list[Tensor | None] = []
    seen: set[nn.Module] = set()
    todo: list[nn.Module | None] = list(models)
    for module in todo:  # which grows; by hand, as this is done at every step: `modules()` takes several times as long
        if module is None or module in seen:
            continue
        seen.add(module)
        todo += module._modules.values()
        found += module._parameters.values()
        found += module._buffers.values()
        if adapter is not None and isinstance(module, adapter):
            stamp.append(_adapter_state(module))
    tensors = [tensor for tensor in found if tensor is not None]
    stamp += map(Tensor.data_ptr, tensors)
    stamp += [
        -1 if tensor.is_inference() else tensor._version for tensor in tensors
    ]  # those of inference keep no count
    return tuple(stamp)


def held_weights(model: nn.Module) -> list[Tensor]:
    """Aliases that keep a model's present tensors from being freed, and their addresses from being given to others."""
    return [tensor.detach() for module in model.modules() for tensor in _tensors(module)]


def _tensors(module: nn.Module) -> list[Tensor]:
    """Of the module itself, not of those inside it."""
    return [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]


@cache
def _count_optimizer_steps() -> None:
    """Count the steps of every optimizer from now on; once is enough."""

    def count(*_: Any) -> None:
        global _optimizer_steps
        _optimizer_steps += 1

    register_optimizer_step_post_hook(count)


def _adapter_class() -> Any:
    """PEFT's base class of layers with adapters, if anybody has imported PEFT: without it there are none."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return None if tuners is None else tuners.BaseTunerLayer


def _adapter_state(module: Any) -> tuple[Any, ...]:
    scaling = getattr(module, "scaling", None) or {}
    return (
        module.disable_adapters,
        tuple(module.active_adapters),
        tuple(module.merged_adapters),
        tuple(sorted((name, float(value)) for name, value in scaling.items())),
    )
