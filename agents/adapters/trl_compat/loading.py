"""What `from_pretrained` of TRL's value-headed model takes, checked and made into a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agents.adapters.trl_compat.files import ADAPTER, find_file, load_language_model, read_value_head, without_report
from agents.policy import ValueHeadLM
from agents.policy_files import saved_critic_kind
from textenv.models import load_config

_LIVE = "load the model yourself with transformers, and pass it instead of its name"


def is_peft(lm: Any) -> bool:
    """Whether there is a PEFT wrapper; named, not imported, because PEFT is optional."""
    return type(lm).__module__.split(".")[0] == "peft"


def refuse(**arguments: Any) -> None:
    """Raise for each argument that is set and has no meaning for a model given by its name."""
    for name, value in arguments.items():
        if value:
            raise ValueError(f"{name}: expected {False if value is True else None}, got {value!r}; {_LIVE}")


def live_model(model: Any, dtype: Any, device_map: Any) -> Any:
    """A model that its caller has loaded, checked."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) and not is_peft(model):
        raise ValueError(
            "pretrained_model_name_or_path: expected a folder, a hub name or a transformers or PEFT model, "
            f"got {type(model).__name__}"
        )
    if dtype is not None or device_map is not None:
        raise ValueError("dtype, device_map: expected None with a live model, which has both")
    return model


def load_policy(
    source: str | Path,
    peft_config: Any,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool,
    is_trainable: bool,
) -> tuple[ValueHeadLM, dict[str, Tensor]]:
    """Load a policy, and the value head saved with it where `ValueHeadLM` does not read it: TRL's and LLaMA-Factory's.

    Args:
        source: A folder or hub name.
        peft_config: For a new adapter, or None.
        dtype: Type of the weights.
        device: Where they go.
        trust_remote_code: Whether to run model code found there.
        is_trainable: Whether a saved adapter goes on learning.

    Raises:
        ValueError: If something cannot be loaded.
    """
    if saved_critic_kind(source) is not None:
        policy = ValueHeadLM.from_pretrained(
            source, lora=peft_config, dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
        return policy, {}
    head = read_value_head(source)
    with without_report(bool(head)):
        lm = load_language_model(source, dtype, device, trust_remote_code, is_trainable)
    return ValueHeadLM(with_adapter(lm, peft_config)), head


def with_adapter(lm: Any, peft_config: Any) -> Any:
    """The model, inside a new adapter if one is asked for; no prompt learning, whose virtual tokens have no ids."""
    if is_peft(lm):
        if peft_config is not None:
            raise ValueError("peft_config: expected None, as the model already has an adapter")
    elif peft_config is not None:
        from peft import PeftConfig, get_peft_model

        if not isinstance(peft_config, PeftConfig):
            raise ValueError(f"peft_config: expected a peft.PeftConfig, got {type(peft_config).__name__}")
        lm = get_peft_model(lm, peft_config)
    if is_peft(lm) and lm.active_peft_config.is_prompt_learning:
        raise ValueError(f"peft_config: expected weights such as LoRA's, got {lm.active_peft_config.peft_type.value}")
    return lm


def weights_dtype(source: Any, old: Any, new: Any, trust_remote_code: bool) -> torch.dtype:
    """The type of the weights from `torch_dtype` or `dtype`: a type, its name, or `"auto"` for what the config says."""
    if old is not None and new is not None and old != new:
        raise ValueError(f"torch_dtype, dtype: expected one of them, got {old!r} and {new!r}")
    given = new if old is None else old
    if given is None:
        return torch.float32
    if given == "auto":
        if find_file(source, ADAPTER) is not None:
            raise ValueError("torch_dtype: expected a type by name with an adapter's folder, got 'auto'")
        config = load_config(source, argument="pretrained_model_name_or_path", trust_remote_code=trust_remote_code)
        given = config.dtype or torch.float32
    found = getattr(torch, given, None) if isinstance(given, str) else given
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"torch_dtype: expected a floating-point type or 'auto', got {given!r}")
    return found


def one_device(device_map: Any) -> torch.device:
    """The device that a `device_map` means; a model in parts on several is refused."""
    if isinstance(device_map, dict):
        if set(device_map) != {""}:
            raise ValueError(f"device_map: expected one device for the whole model, got {device_map!r}")
        device_map = device_map[""]
    if device_map is None:
        return torch.device("cpu")
    if device_map == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device_map: expected one device or 'auto', got {device_map!r}") from error
