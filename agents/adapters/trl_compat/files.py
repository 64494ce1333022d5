"""Folders of value-headed models as TRL up to 0.11 and LLaMA-Factory wrote them, read; and written for PEFT.

A full model's weights hold `v_head.summary.weight` and `v_head.summary.bias` beside the language model's own
(`model.safetensors` or `pytorch_model.bin`, in one file or in shards). A PEFT folder holds the adapter, and the value
head alone in `pytorch_model.bin` (TRL) or `value_head.safetensors` (LLaMA-Factory, and here).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from textenv.dropout import disable_dropout
from textenv.models import load_causal_lm, no_progress_bar

PREFIX = "v_head."
ADAPTER = "adapter_config.json"
_PEFT_HEAD = "value_head.safetensors"
_HEADS = (_PEFT_HEAD, "value_head.bin")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def find_file(source: str | Path, name: str) -> Path | None:
    """A file of a folder, or of a model on the hub; None if it is not there."""
    folder = Path(source)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(hf_hub_download(str(source), name))
    except (EntryNotFoundError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError):
        return None


def load_language_model(
    source: str | Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool, is_trainable: bool
) -> Any:
    """Load the language model of a folder or hub name, with its adapter if there is one, and its dropout off.

    Args:
        source: The folder or name.
        dtype: Type of the weights.
        device: Where they go.
        trust_remote_code: Whether to run model code found there.
        is_trainable: Whether a saved adapter goes on learning.

    Raises:
        ValueError: If it cannot be loaded as a causal language model.
    """
    adapter = find_file(source, ADAPTER)
    if adapter is not None:
        from peft import PeftModel

        base = json.loads(adapter.read_text(encoding="utf8")).get("base_model_name_or_path")
        if not base:
            raise ValueError(f"pretrained_model_name_or_path: {adapter} does not say of which model it is an adapter")
        lm = _load_base(base, dtype, device, trust_remote_code)
        return PeftModel.from_pretrained(lm, str(adapter.parent), is_trainable=is_trainable)
    return _load_base(source, dtype, device, trust_remote_code)


def _load_base(source: str | Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool) -> Any:
    """The language model alone, whichever format its weights are in."""
    weights = _first_file(source, _WEIGHTS)
    if weights is not None and weights.name.startswith("pytorch_model"):
        return _load_pickled(source, dtype, trust_remote_code).to(device)
    return load_causal_lm(
        source,
        argument="pretrained_model_name_or_path",
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        frozen=False,
    ).module


@no_progress_bar()
def _load_pickled(source: str | Path, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """A model whose weights are in the old format, of which tensors alone are unpickled."""
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(source),
            dtype=dtype,
            use_safetensors=False,
            weights_only=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"pretrained_model_name_or_path: cannot load {str(source)!r}: {reason}") from error
    lm, report = loaded
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ValueError(f"pretrained_model_name_or_path: {source} has no weights for {missing}")
    disable_dropout(lm)
    return lm


@contextmanager
def without_report(quiet: bool) -> Iterator[None]:
    """Keep transformers from reporting a value head that we read as unexpected; missing weights raise all the same."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    if quiet:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def read_value_head(source: str | Path) -> dict[str, Tensor]:
    """The value head saved with a model: `summary.weight` `[1, H]` and `summary.bias` `[1]`; empty if there is none."""
    file = _first_file(source, _HEADS) or _first_file(source, _WEIGHTS)
    if file is None:
        return {}
    if not file.name.endswith(".index.json"):
        return _read(file)
    shards = json.loads(file.read_text(encoding="utf8"))["weight_map"]
    files = [find_file(source, shard) for shard in {shard for key, shard in shards.items() if PREFIX in key}]
    return {key: value for part in files if part is not None for key, value in _read(part).items()}


def _first_file(source: str | Path, names: Sequence[str]) -> Path | None:
    """The first of these that is there; those after it are not asked for, as a hub would send them."""
    return next((file for name in names if (file := find_file(source, name)) is not None), None)


def _read(file: Path) -> dict[str, Tensor]:
    """The value head's tensors of one file, under the names that follow `v_head.`."""
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="pt") as tensors:
            return {key.split(PREFIX)[-1]: tensors.get_tensor(key) for key in tensors.keys() if PREFIX in key}  # noqa: SIM118
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return {key.split(PREFIX)[-1]: value for key, value in state.items() if PREFIX in key}


def save_adapter(lm: Any, head: dict[str, Tensor], folder: Path) -> None:
    """Write a PEFT folder with the value head beside the adapter.

    Args:
        lm: The PEFT model.
        head: As `read_value_head` gives it.
        folder: Made if it is not there.

    Raises:
        ValueError: If the folder is the base model's.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    base = lm.active_peft_config.base_model_name_or_path
    if base and Path(base).is_dir() and folder.samefile(base):
        raise ValueError(f"save_directory: expected another folder than the base model's, got {folder}")
    (folder / "value_head.json").unlink(missing_ok=True)  # a whole policy's, which would be loaded instead
    # False: "auto" would look the base model up on the network. Adapters on embeddings are saved all the same.
    lm.save_pretrained(folder, save_embedding_layers=False)
    save_file({PREFIX + name: value.detach().cpu().contiguous() for name, value in head.items()}, folder / _PEFT_HEAD)


def forget_adapter(folder: Path) -> None:
    """Take another model's adapter out of a folder that a whole policy is about to be written to."""
    for name in (ADAPTER, "adapter_model.safetensors", "adapter_model.bin"):
        (folder / name).unlink(missing_ok=True)
