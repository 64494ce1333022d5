"""Which sampler draws the responses, as flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from agents import ValueHeadLM
from agents.sampling import Sampler, TransformersSampler

SamplerName = Literal["transformers", "continuous", "vllm", "vllm-server"]


@dataclass(frozen=True)
class VLLMFlags:
    """The vLLM engine (`agents.sampling.vllm_terms.VLLMConfig`)."""

    dtype: str | None = None
    """Of its weights and activations; the policy's if absent."""
    max_num_seqs: int = 64
    """Most responses in work at once."""
    kv_cache_bytes: int | None = None
    """Memory for keys and values; if absent, on a CPU what the longest responses take, on a GPU what is left."""
    gpu_memory_utilization: float = 0.4
    """Share of a GPU for the engine; the trainer needs the rest."""
    sleep: bool = False
    """Whether it leaves a GPU's memory to the trainer between rollouts."""
    multiprocess: bool = False
    """Whether it has a process of its own."""
    enforce_eager: bool = True
    """Whether nothing is compiled: quick to start, slower on a GPU."""
    urls: tuple[str, ...] = ()
    """Of `vllm-server`: where servers listen; if absent, one is started on this machine."""
    exchange: Path | None = None
    """Of `vllm-server`: a folder that the servers see too, for the weights; if absent, one in memory."""


def make_sampler(name: SamplerName, policy: ValueHeadLM, flags: VLLMFlags, max_model_len: int) -> Sampler:
    """The sampler of this name.

    Args:
        name: Whose.
        policy: What is sampled from.
        flags: Of vLLM.
        max_model_len: Longest prompt and response together, for which an engine makes room.
    """
    if name.startswith("vllm"):
        from agents.sampling.vllm_sampler import VLLMConfig, VLLMSampler

        given = asdict(flags)
        urls, exchange = given.pop("urls"), given.pop("exchange")
        config = VLLMConfig(**given, max_model_len=max_model_len)
        if name == "vllm":
            return VLLMSampler(policy, config)
        from agents.sampling.vllm_server import VLLMServerConfig, VLLMServerSampler

        return VLLMServerSampler(policy, VLLMServerConfig(urls=urls, exchange=exchange, engine=config))
    if name == "continuous":
        from agents.sampling.continuous_sampler import ContinuousSampler

        return ContinuousSampler(policy)
    return TransformersSampler(policy)


def longest(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """Tokens of the longest of these prompts with its response."""
    return max(len(prompt) for prompt in prompts) + max_new_tokens
