"""How a policy lies on disk: a Hugging Face folder, with the critic and an adapter beside it.

model.safetensors, config.json, ...   the language model (with LoRA the base model), loadable by transformers alone
value_head.safetensors                the value head and its statistics
value_head.json                       the kind of critic and the format's version
critic/                               a separate critic's trunk, a Hugging Face folder of its own
adapter/                              LoRA weights, a PEFT folder of their own
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from agents.critic import Critic, build_critic
from agents.value_head import ValueHead
from textenv.models import align, load_causal_lm, no_progress_bar, unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = 1
_DESCRIPTION, _HEAD, _TRUNK, _ADAPTER = "value_head.json", "value_head.safetensors", "critic", "adapter"


def load_parts(
    source: str | Path,
    critic: str | Path | None,
    lora: Any,
    dtype: torch.dtype,
    device: torch.device | str,
    trust_remote_code: bool,
) -> tuple[Any, Critic]:
    """Load the language model and the critic of a policy; see `ValueHeadLM.from_pretrained`.

    Raises:
        ValueError: If something cannot be loaded, or `critic` or `lora` contradicts the folder.
    """
    saved = saved_critic_kind(source)
    if saved is not None and critic not in (None, saved):
        raise ValueError(f"critic must be {saved!r} or None, as {source} holds one; got {critic!r}")
    lm: Any = load_causal_lm(
        source, argument="source", device=device, dtype=dtype, trust_remote_code=trust_remote_code, frozen=False
    ).module
    if saved is not None:
        parts = load_critic_files(source, device, dtype)
    else:
        # Before LoRA changes the trunk: a separate critic is a plain copy, and learns in full.
        parts = build_critic(lm, critic or "shared", dtype=dtype, trust_remote_code=trust_remote_code)
    return wrap_lora(lm, source, lora), parts


@no_progress_bar()
def save_policy_files(lm: Any, critic: Critic, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Write a policy; see `ValueHeadLM.save_pretrained`.

    Args:
        lm: The language model, or the PEFT model around it.
        critic: Its critic.
        folder: Made if it is not there.
        tokenizer: Saved beside the model, if given.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for part in (_ADAPTER, _TRUNK):  # another policy's, which would be loaded with this one
        shutil.rmtree(folder / part, ignore_errors=True)
    base = unwrap(lm)
    if base is lm:
        base.save_pretrained(folder)
    else:
        base.save_pretrained(folder, state_dict=_without_adapter(base.state_dict()))
        # False: "auto" would look the base model up on the network. Adapters on embeddings are saved all the same.
        lm.save_pretrained(folder / _ADAPTER, save_embedding_layers=False)
    save_file({name: value.contiguous() for name, value in critic.head.state_dict().items()}, folder / _HEAD)
    if critic.backbone is not None:
        trunk: Any = critic.backbone
        trunk.save_pretrained(folder / _TRUNK)
    description = {"format": _FORMAT, "critic": critic.kind}
    (folder / _DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def saved_critic_kind(source: str | Path) -> str | None:
    """The kind of critic saved in a folder; None if it is no saved policy.

    Raises:
        ValueError: If the folder was written in a format that this version cannot read.
    """
    file = Path(source) / _DESCRIPTION
    if not file.is_file():
        return None
    description = json.loads(file.read_text())
    if description.get("format") != _FORMAT:
        raise ValueError(f"source: {file} has format {description.get('format')!r}; this version reads {_FORMAT}")
    return description["critic"]


@no_progress_bar()
def load_critic_files(folder: str | Path, device: torch.device | str, dtype: torch.dtype) -> Critic:
    """Read back the critic that `save_policy_files` wrote."""
    from safetensors.torch import load_file

    kind = saved_critic_kind(folder)
    if kind is None:
        raise ValueError(f"folder must be a saved policy; {folder} has no {_DESCRIPTION}")
    state = load_file(Path(folder) / _HEAD)
    head = ValueHead(state["linear.weight"].shape[1], device)
    head.load_state_dict(state)
    if kind == "shared":
        return Critic(kind, head, None)
    from transformers import AutoModel

    trunk = AutoModel.from_pretrained(Path(folder) / _TRUNK, local_files_only=True, use_safetensors=True, dtype=dtype)
    return Critic(kind, head, align(trunk.to(device)))


def wrap_lora(lm: Any, source: str | Path, lora: Any) -> Any:
    """Put the adapter saved in `source`, or a new one, on a language model.

    Args:
        lm: The base model.
        source: Where it was loaded from.
        lora: A `peft.LoraConfig` for a new adapter, or None.

    Raises:
        ValueError: If there is a saved adapter and a new one is asked for.
    """
    saved = Path(source) / _ADAPTER
    if saved.is_dir():
        if lora is not None:
            raise ValueError(f"lora must be None: {saved} already holds an adapter")
        from peft import PeftModel

        return PeftModel.from_pretrained(lm, str(saved), is_trainable=True)
    if lora is None:
        return lm
    from peft import get_peft_model

    return get_peft_model(lm, lora)


def _without_adapter(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The base model's own weights under their own names, from the state of a model with LoRA layers in it."""
    clean = {}
    for name, value in state.items():
        if ".lora_" not in name and ".modules_to_save." not in name:
            clean[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = value
    return clean
