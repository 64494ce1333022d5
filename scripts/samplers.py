"""Which sampler draws the responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from agents import ValueHeadLM
from agents.sampling import Sampler, TransformersSampler
from agents.sampling.vllm_config import VLLMConfig, VLLMServerConfig

SamplerName = Literal["transformers", "continuous", "vllm", "vllm-server"]


def make_sampler(
    name: SamplerName, policy: ValueHeadLM, engine: VLLMConfig, servers: VLLMServerConfig, longest: int
) -> Sampler:
    """The sampler of this name.

    Args:
        name: Whose.
        policy: What is sampled from.
        engine: Of vLLM.
        servers: Of vLLM.
        longest: Prompt and response together, for which an engine makes room unless it is told for what.
    """
    if engine.max_model_len is None:
        engine = replace(engine, max_model_len=longest)
    if name == "vllm":
        from agents.sampling.vllm_sampler import VLLMSampler

        return VLLMSampler(policy, engine)
    if name == "vllm-server":
        from agents.sampling.vllm_server import VLLMServerSampler

        return VLLMServerSampler(policy, servers, engine)
    if name == "continuous":
        from agents.sampling.continuous_sampler import ContinuousSampler

        return ContinuousSampler(policy)
    return TransformersSampler(policy)


def longest(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """Tokens of the longest of these prompts with its response."""
    return max(len(prompt) for prompt in prompts) + max_new_tokens
