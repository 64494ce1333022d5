"""What engines and servers of vLLM share: settings, requests and answers in its terms, weights in a file."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from agents.sampling.engine import Request
from textenv.models import context_length, unwrap

TESTED = "0.32"
"""The version of vLLM that this was written for and is tested with."""
_RECEIVER = "agents.sampling.vllm_worker.WeightReceiver"


@dataclass(frozen=True)
class VLLMConfig:
    """Settings of an engine."""

    dtype: str | None = None
    """Of weights and activations, `"bfloat16"` for one; None: the policy's."""
    max_model_len: int | None = None
    """Longest prompt and response together; None: the model's context."""
    max_num_seqs: int = 64
    """Most responses in work at once."""
    kv_cache_bytes: int | None = None
    """Memory for keys and values; None: on a CPU what `max_num_seqs` of the longest take, on a GPU what
    `gpu_memory_utilization` leaves."""
    gpu_memory_utilization: float = 0.4
    """Share of a GPU for the engine, keys and values included; the trainer needs the rest."""
    sleep: bool = False
    """Whether the engine leaves a GPU's memory to the trainer between rollouts (vLLM's sleep mode, level 1)."""
    multiprocess: bool = False
    """Whether the engine has a process of its own, which can die alone; the script then needs the usual
    `if __name__ == "__main__":`."""
    timeout: float = 600.0
    """Seconds after which a call of an engine in a process of its own has failed."""
    enforce_eager: bool = True
    """Whether nothing is compiled and no CUDA graph recorded: quick to start, slower on a GPU."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `vllm.LLM`."""


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
    whole = context_length(unwrap(model).config)
    longest = config.max_model_len or whole
    room = config.kv_cache_bytes
    if room is None and weight.device.type == "cpu":
        room = _cache_bytes(unwrap(model).config.get_text_config(), longest or 2048, config.max_num_seqs)
    return {
        "dtype": config.dtype or str(weight.dtype).removeprefix("torch."),
        "max_model_len": longest,
        "max_num_seqs": config.max_num_seqs,
        "kv_cache_memory_bytes": room,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enable_sleep_mode": config.sleep,
        "enforce_eager": config.enforce_eager,
        "load_format": "dummy",  # nothing is sampled before weights are pushed
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # not the folder's, which may add stop tokens and top-p
        "logprobs_mode": "processed_logprobs",  # of the law at the temperature; the default is that at 1
        "max_logprobs": -1,
        "worker_extension_cls": _RECEIVER,
        **config.more,
    }


def sampling_params(request: Request) -> dict[str, Any]:
    """The arguments of `vllm.SamplingParams`."""
    told = request.greedy and request.temperature != 1
    return {
        "temperature": 0.0 if request.greedy else request.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None if request.greedy else request.seed,
        "max_tokens": request.max_new_tokens,
        "stop_token_ids": request.stop_token_ids,
        "ignore_eos": True,  # the environment's stop tokens alone end a response
        "logprobs": -1 if told else 0,  # 0: of the token drawn; −1: of all, because greedy log-probs are those at 1
        "detokenize": False,
    }


def at_temperature(request: Request, tokens: Sequence[int], logprobs: Sequence[Mapping[int, float]]) -> list[float]:
    """Log-probs of the tokens at the request's temperature, from what `sampling_params` asked for."""
    if not request.greedy or request.temperature == 1:
        return [place[token] for token, place in zip(tokens, logprobs, strict=True)]
    found = []
    for token, place in zip(tokens, logprobs, strict=True):
        law = torch.tensor([place[index] for index in range(len(place))])
        found.append(float(torch.log_softmax(law / request.temperature, -1)[token]))
    return found


@contextmanager
def weight_file(weights: Mapping[str, Tensor], exchange: Path | None = None) -> Iterator[Path]:
    """A safetensors file of the weights, in a folder of one's own or in memory, where there is such a place."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=exchange or (memory if memory.is_dir() else None)) as folder:
        path = Path(folder) / "weights.safetensors"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, path)
        yield path


def one_version(versions: Iterable[str]) -> str:
    """The version of the weights that drew a response.

    Raises:
        RuntimeError: If there is none, or several: an engine may take new weights in the middle.
    """
    found = set(versions)
    if len(found) != 1:
        raise RuntimeError(f"expected a response of one version of the weights, got {sorted(found)}")
    return found.pop()


def _cache_bytes(config: Any, tokens: int, rows: int) -> int:
    """Keys and values of so many rows of so many tokens in float32, in whole blocks, and one row to spare."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    row = -(-tokens // 128) * 128
    return 2 * 4 * config.num_hidden_layers * heads * size * row * (rows + 1)
