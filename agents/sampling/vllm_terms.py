"""What engines and servers of vLLM share: requests and answers in its terms, weights in a file."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from agents.sampling.engine import Request, RequestRefused
from agents.sampling.vllm_config import VLLMConfig
from textenv.models import context_length, unwrap

TESTED = "0.32"
"""The version of vLLM that this was written for and is tested with."""
_RECEIVER = "agents.sampling.vllm_worker.WeightReceiver"
_COLDEST = 0.01
"""Lowest temperature that vLLM draws at."""


def check_version() -> None:
    """Raise unless a vLLM is installed that this was written for."""
    import vllm  # pyright: ignore[reportMissingImports]

    if not vllm.__version__.startswith(f"{TESTED}."):
        raise ImportError(
            f"vllm: expected version {TESTED}, whose interface this was written for, got {vllm.__version__}"
        )


def save_description(model: Any, folder: str) -> None:
    """Write the configuration that an engine starts from, without weights or tokenizer."""
    description = copy.deepcopy(unwrap(model).config)
    description.architectures = [type(unwrap(model)).__name__]  # absent in a model made of a configuration
    description.save_pretrained(folder)


def engine_options(model: Any, config: VLLMConfig) -> dict[str, Any]:
    """The arguments of an engine for this model: of `vllm.LLM`, or of `vllm serve`."""
    weight = next(model.parameters())
    on_cpu = weight.device.type == "cpu"
    dtype = weight.dtype if on_cpu or weight.dtype != torch.float32 else torch.bfloat16
    whole = context_length(unwrap(model).config)
    longest = config.max_model_len or whole
    room = config.kv_cache_bytes
    if room is None and on_cpu:
        room = _cache_bytes(unwrap(model).config.get_text_config(), longest or 2048, config.max_num_seqs)
    return {
        "dtype": config.dtype or str(dtype).removeprefix("torch."),
        "max_model_len": longest,
        "max_num_seqs": config.max_num_seqs,
        "kv_cache_memory_bytes": room,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enable_sleep_mode": config.sleep,
        "enforce_eager": on_cpu if config.enforce_eager is None else config.enforce_eager,
        "load_format": "dummy",  # nothing is sampled before weights are pushed
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # not the folder's, which may add stop tokens and top-p
        "logprobs_mode": "processed_logprobs",  # of the law at the temperature; the default is that at 1
        "max_logprobs": -1,
        "worker_extension_cls": _RECEIVER,
        **config.more,
    }


def sampling_params(request: Request) -> dict[str, Any]:
    """The arguments of `vllm.SamplingParams`.

    Raises:
        RequestRefused: If vLLM would draw at another temperature.
    """
    if not request.greedy and request.temperature < _COLDEST:
        raise RequestRefused(
            f"temperature: expected at least {_COLDEST}, the lowest that vLLM draws at, got {request.temperature}"
        )
    return {
        "temperature": 0.0 if request.greedy else request.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None if request.greedy else request.seed,
        "max_tokens": request.max_new_tokens,
        "stop_token_ids": request.stop_token_ids,
        "ignore_eos": True,  # the environment's stop tokens alone end a response
        "logprobs": None if request.greedy else 0,  # 0: of the token drawn
        "detokenize": False,
    }


@contextmanager
def weight_file(weights: Mapping[str, Tensor], exchange: Path | None = None) -> Iterator[Path]:
    """A safetensors file of the weights: for everybody in a given folder, else in memory if they fit there."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    with tempfile.TemporaryDirectory(dir=exchange or _memory(size)) as folder:
        path = Path(folder) / "weights.safetensors"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, path)
        if exchange is not None:  # servers may be another user's
            os.chmod(folder, 0o755)
            path.chmod(0o644)
        yield path


def same_everywhere(told: Sequence[Mapping[str, str]], where: str) -> dict[str, int]:
    """The checksums that all of them tell.

    Raises:
        RuntimeError: If one tells others.
    """
    if not told or any(checksums != told[0] for checksums in told):
        raise RuntimeError(f"the {where} did not all get the same weights")
    return {name: int(number) for name, number in told[0].items()}


def one_label(versions: Iterable[str]) -> str:
    """The label of the weights that drew a response.

    Raises:
        RuntimeError: If there is none, or several: an engine may take new weights in the middle.
    """
    found = set(versions)
    if len(found) != 1:
        raise RuntimeError(f"expected a response of one label of the weights, got {sorted(found)}")
    return found.pop()


def _cache_bytes(config: Any, tokens: int, rows: int) -> int:
    """Keys and values of so many rows of so many tokens in float32, in whole blocks, and one row to spare."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    row = -(-tokens // 128) * 128
    return 2 * 4 * config.num_hidden_layers * heads * size * row * (rows + 1)


def _memory(size: int) -> Path | None:
    """Where files live in memory, if there is such a place with room for one: containers have 64 MB of it."""
    place = Path("/dev/shm")
    return place if place.is_dir() and shutil.disk_usage(place).free > 1.1 * size else None
