"""A language model's weights under the names of its checkpoint, whatever PEFT has put around or into it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from textenv.models import unwrap


def named_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """A language model's weights and persistent buffers under the names of its checkpoint; tied ones once.

    Adapters come merged, and of modules that PEFT trains beside the original (`modules_to_save`) the one in use.

    Args:
        model: A Hugging Face causal LM, or a PEFT model around one: its own weights stay apart, what comes is a copy.
    """
    base = unwrap(model)
    changed = _changed(base)
    for place, module in changed.items():
        for own, tensor in _tensors(_in_use(module)):
            yield f"{place}.{own}", tensor
    yield from _others(base, changed)


def weight_names(model: Any) -> list[str]:
    """The names of `named_weights`, without merging anything."""
    base = unwrap(model)
    changed = _changed(base)
    names = [f"{place}.{own}" for place, module in changed.items() for own, _ in _tensors(_original(module))]
    return [*names, *(name for name, _ in _others(base, changed))]


def check_pushable(model: Any) -> None:
    """Refuse a model whose weights an engine would read as others than they are.

    Raises:
        ValueError: If PEFT changes a weight that another module shares, which engines tie again; if its wrapper is
            another than of `modules_to_save`; or if transformers keeps the weights in another form than the checkpoint.
    """
    base = unwrap(model)
    places: dict[Tensor, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        places.setdefault(parameter, []).append(name)
    for place, module in _changed(base).items():
        for own, parameter in _original(module).named_parameters():
            shared = [name for name in places[parameter] if not name.startswith(f"{place}.")]
            if shared:
                raise ValueError(
                    f"policy: expected adapters of weights that no other module shares, got {place}.{own}, which is "
                    f"also {shared[0]}: an engine has one weight for both"
                )
    odd = [place for place, module in base.named_modules() if _is_wrapper(module) and not _keeps_copies(module)]
    if odd:
        raise ValueError(f"policy: expected adapters or modules_to_save, got another wrapper at {odd[0]}")
    if _is_converted(base):
        raise ValueError(
            f"policy: expected a model that keeps its weights as its checkpoint does, got {type(base).__name__}, whose "
            "weights transformers fuses: no engine was tested with such (mixtures of experts, mostly)"
        )


def full_precision(model: Any) -> AbstractContextManager:
    """Without autocast, in which the same adapters merge to other weights."""
    return torch.autocast(next(model.parameters()).device.type, enabled=False)


def _changed(base: nn.Module) -> dict[str, nn.Module]:
    """What PEFT has put in place of modules."""
    found: dict[str, nn.Module] = {}
    for place, module in base.named_modules():
        inside = any(place.startswith(f"{outer}.") for outer in found)
        if not inside and (_is_adapted(module) or _keeps_copies(module)):
            found[place] = module
    return found


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "merge")


def _is_wrapper(module: nn.Module) -> bool:
    return hasattr(module, "original_module")


def _keeps_copies(module: nn.Module) -> bool:
    return _is_wrapper(module) and hasattr(module, "modules_to_save")


def _original(module: Any) -> nn.Module:
    """What the checkpoint has there."""
    return module.original_module if _keeps_copies(module) else module.get_base_layer()


@torch.no_grad()
def _in_use(module: Any) -> nn.Module:
    """What computes there: merged in a copy, because unmerging would round the layer's own."""
    if _keeps_copies(module):
        active = [] if module.disable_adapters else [n for n in module.active_adapters if n in module.modules_to_save]
        return module.modules_to_save[active[0]] if active else module.original_module
    if not module.merged and not module.disable_adapters:
        module = copy.deepcopy(module)
        with full_precision(module):
            module.merge()
    return module.get_base_layer()


def _others(base: nn.Module, changed: dict[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """The weights outside of these modules."""
    inside = tuple(f"{place}." for place in changed)
    yield from ((name, tensor) for name, tensor in _tensors(base) if not name.startswith(inside))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, tied ones once, and what else a checkpoint holds."""
    yield from ((name, parameter.detach()) for name, parameter in module.named_parameters())
    kept = module.state_dict().keys()
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in kept)


def _is_converted(base: Any) -> bool:
    """Whether loading its checkpoint makes other tensors of what is there, not only other names."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    conversions = getattr(base, "_weight_conversions", None)  # those that its own loading used, if it was loaded
    if conversions is None:
        conversions = get_model_conversion_mapping(base, add_legacy=False)
    return any(isinstance(conversion, WeightConverter) for conversion in conversions)
