"""Loading, checking and taking apart the language models that the environment and the agents share."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from textenv.dropout import disable_dropout
from textenv.shared import Shared

if TYPE_CHECKING:  # heavy: `import textenv` must not pay for model classes that it may not need
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""`name` or `owner/name`; a path has a slash at an end, or more than one."""


def load_config(source: str | Path | Shared, *, argument: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's configuration, without its weights.

    Args:
        source: A folder, a hub name, or a `Shared` model.
        argument: Name of the caller's argument, for error messages.
        trust_remote_code: Whether to run model code found in the folder.

    Raises:
        ValueError: If there is no such model.
    """
    if isinstance(source, Shared):
        config = getattr(source.module, "config", None)
        if config is None:
            raise ValueError(f"{argument} must share a Hugging Face model; {source!r} has no config")
        return config
    from transformers import AutoConfig

    return _load(AutoConfig, source, argument, trust_remote_code=trust_remote_code)


def load_causal_lm(
    source: str | Path | Shared,
    *,
    argument: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    frozen: bool = True,
) -> Shared:
    """Load a causal language model with its dropout off.

    Args:
        source: A folder, a hub name, or a `Shared` model, which is returned as it is but
            for its dropout.
        argument: Name of the caller's argument, for error messages.
        device: Where a loaded model goes; a shared one stays where it is.
        dtype: Floating-point type of a loaded model's weights.
        trust_remote_code: Whether to run model code found in the folder.
        frozen: Whether a loaded model's weights refuse gradients.

    Raises:
        ValueError: If there is no such model, if it is no causal language model, if its weights are not in safetensors,
            or if a bare module is given.
    """
    if isinstance(source, Shared):
        if isinstance(source.module, nn.Module):
            disable_dropout(source.module)
        return source
    if isinstance(source, nn.Module):
        raise ValueError(
            f"{argument} is a bare {type(source).__name__}: wrap it in textenv.Shared(...), or copies of the "
            "environment would each hold a frozen copy of it"
        )
    from transformers import AutoModelForCausalLM

    load_config(source, argument=argument, trust_remote_code=trust_remote_code)
    model = _load_weights(AutoModelForCausalLM, source, argument, "a causal language model", dtype, trust_remote_code)
    align(model.to(torch.device(device)))
    disable_dropout(model)
    check_head(model, argument=argument)
    if frozen:
        model.requires_grad_(False)
    return Shared(model)


def load_classifier(
    source: str | Path,
    *,
    argument: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    of_tokens: bool = False,
) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """Load a reward model and its tokenizer: a sequence classifier with one output, or a classifier `of_tokens`.

    Raises:
        ValueError: If there is no such model, if its head is untrained, or if a sequence gets more than one score.
    """
    import transformers

    config = load_config(source, argument=argument, trust_remote_code=trust_remote_code)
    if config.num_labels != 1 and not of_tokens:
        raise ValueError(f"{argument} must give one score per text (num_labels 1); {source} gives {config.num_labels}")
    kind = "TokenClassification" if of_tokens else "SequenceClassification"
    factory, what = getattr(transformers, f"AutoModelFor{kind}"), f"a {'token' if of_tokens else 'sequence'} classifier"
    model = _load_weights(factory, source, argument, what, dtype, trust_remote_code)
    align(model.to(torch.device(device)).requires_grad_(False))
    disable_dropout(model)
    return model, load_tokenizer(source, argument=argument)


def load_tokenizer(source: str | Path, *, argument: str) -> PreTrainedTokenizerFast:
    """Load the tokenizer saved beside a model.

    Raises:
        ValueError: If there is none.
    """
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, source, argument)


def check_tokenizer_fits(tokenizer: PreTrainedTokenizerFast, vocab_size: int, *, argument: str = "tokenizer") -> None:
    """Refuse a tokenizer with ids that the model has no logit for (fewer ids than logits are fine).

    Raises:
        ValueError: If an id of the tokenizer is `vocab_size` or more.
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise ValueError(f"{argument} must use ids below the model's logit width {vocab_size}; it has id {largest}")


def logit_width(model: Any) -> int:
    """V: how many logits the model gives, which may exceed the tokenizer's vocabulary.

    Args:
        model: A configuration, a model or a `Shared` model.
    """
    module = unwrap(model)
    if isinstance(module, nn.Module):
        return _output_embeddings(module).weight.shape[0]  # type: ignore[union-attr]
    return module.get_text_config().vocab_size


def context_length(config: PretrainedConfig) -> int | None:
    """The longest text the model was made for, None if its configuration does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def unwrap(model: Any) -> Any:
    """The Hugging Face model inside a `Shared`, a PEFT wrapper, or both."""
    if isinstance(model, Shared):
        model = model.module
    # Named, not imported: PEFT is optional. Its own `base_model` attribute is something else than that of transformers.
    if type(model).__module__.split(".")[0] == "peft":
        model = model.get_base_model()
    return model


def backbone(model: Any) -> nn.Module:
    """The part of a Hugging Face model that maps ids to final hidden states (adapters stay in force), or itself."""
    return unwrap(model).base_model


def output_head(model: Any) -> Callable[[Tensor], Tensor]:
    """The map from final hidden states to logits, with the scaling or capping that some families put after it."""
    module = unwrap(model)
    embeddings = _output_embeddings(module)
    config = module.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    factor = getattr(config, "logit_scale", None)  # Cohere
    divisor = getattr(config, "logits_scaling", None)  # Granite
    if not (cap or factor or divisor):
        return embeddings
    return _ScaledHead(embeddings, (factor or 1.0) / (divisor or 1.0), cap)


@dataclass(frozen=True)
class _ScaledHead:
    """cap · tanh(scale · W h / cap); a class, because environments are pickled and a closure is not."""

    embeddings: nn.Module
    scale: float
    cap: float | None

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.embeddings(hidden) * self.scale
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits


@torch.no_grad()
def check_head(model: Any, *, argument: str) -> None:
    """Make sure that `output_head(backbone(ids))` is what the model's own forward computes.

    Raises:
        ValueError: If it is not, so that a family with an unknown last step is refused, not trained wrongly.
    """
    module = unwrap(model)
    ids = torch.zeros(1, 1, dtype=torch.long, device=module.device)
    ours = output_head(module)(hidden_states(module, ids)).float()
    theirs = module(input_ids=ids, use_cache=False).logits.float()
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2):
        raise ValueError(
            f"{argument}: the logits of {type(module).__name__} are not its output embedding applied to its hidden "
            "states; this family is not supported"
        )


def hidden_states(model: Any, input_ids: Tensor) -> Tensor:
    """Final hidden states `[B, L, H]` of right-padded rows.

    No mask is passed and none is needed: in a causal model no token sees the padding on its right, positions count
    from 0, and attention keeps its fast path. What comes out at padded positions means nothing.

    Args:
        model: A Hugging Face causal LM, or a `Shared` one, whose `within` is honoured.
        input_ids: `[B, L]`, right-padded with any legal id.
    """
    scope = model.scope() if isinstance(model, Shared) else nullcontext()
    with scope:
        return backbone(model)(input_ids=input_ids, use_cache=False).last_hidden_state


def _output_embeddings(module: Any) -> nn.Module:
    embeddings = module.get_output_embeddings()
    if embeddings is None:
        raise ValueError(f"{type(module).__name__} has no output embedding: it is no causal language model")
    return embeddings


def _load_weights(
    factory: Any, source: str | Path, argument: str, kind: str, dtype: torch.dtype, trust_remote_code: bool
) -> Any:
    with no_progress_bar():
        model, report = _load(
            factory,
            source,
            argument,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers only warns, and fills them with random numbers.
        raise ValueError(f"{argument} must be {kind}; {source} has no weights for {', '.join(missing[:3])}")
    return model


def align(model: nn.Module) -> nn.Module:
    """Move weights that a file has left between cache lines of a CPU.

    Products of small matrices round differently there, so that a model would not be bit for bit what it was when saved.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
    return model


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing a bar for every environment that is made."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _load(factory: Any, source: str | Path, argument: str, **options: Any) -> Any:
    """Call `factory.from_pretrained` on a folder or a hub name; what looks like a path never goes to the network."""
    if not isinstance(source, str | Path):
        raise ValueError(f"{argument} must be a folder, a model name or textenv.Shared(...); got {source!r}")
    local = isinstance(source, Path) or Path(source).is_dir() or not _HUB_NAME.fullmatch(source)
    if local and not Path(source).is_dir():
        raise ValueError(f"{argument} must be a model folder or a hub name; there is no folder {str(source)!r}")
    try:
        return factory.from_pretrained(os.fspath(source), local_files_only=local, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        if not local:
            reason = f"there is no such folder, and the hub did not give it ({reason})"
        raise ValueError(f"{argument}: cannot load {str(source)!r}: {reason}") from error
