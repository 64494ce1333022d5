"""Flags that the command lines share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import torch

import textenv
from textenv.kl import AdaptiveKL


@dataclass(frozen=True)
class EnvFlags:
    """The environment."""

    reference: str | None = None
    """Folder or hub name of the frozen reference; if absent, the model trained, else the embedded storyteller."""
    reward: str | None = None
    """Folder or hub name of the reward model; the embedded one if absent."""
    prompts: str | None = None
    """A .txt or .jsonl file of prompts to train on; the embedded openings if absent."""
    heldout: str | None = None
    """A .txt or .jsonl file of prompts to evaluate on; the embedded held-out openings if absent."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer; the reference's if absent."""
    max_prompt_tokens: int | None = None
    """Longest prompt; the longest of the prompts if absent."""
    prompt_overflow: Literal["error", "left"] = "error"
    """What a longer prompt means: an error, or a cut on the left."""
    max_new_tokens: int = 48
    """Longest response."""
    stop_token_ids: tuple[int, ...] | None = None
    """Ids that end a response; the tokenizer's EOS if absent."""
    temperature: float = 1.0
    """Of the policy and the reference alike."""
    kl_coef: float = 0.15
    """β, the price of a nat of KL."""
    kl_target: float | None = None
    """Nats per response that an adaptive β steers to; β is fixed if absent."""
    length_end: Literal["terminate", "truncate"] = "terminate"
    """Whether a response that reaches its length is scored."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the reward of a response that reaches its length."""
    dtype: str = "float32"
    """Type of the reference and the reward model."""
    device: str = "auto"
    """Where everything runs; auto: the GPU if there is one."""
    trust_remote_code: bool = False
    """Whether a model folder may bring Python code."""


def device_of(name: str) -> str:
    """`auto` becomes the GPU if there is one."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def make_env(
    flags: EnvFlags,
    *,
    reference: Any = None,
    prompts: Any = None,
    num_envs: int = 1,
    autoreset_mode: str = "SameStep",
    kl_source: str | None = None,
) -> Any:
    """The batched environment of these flags; `reference` and `prompts` override them."""
    kl_coef = flags.kl_coef if flags.kl_target is None else AdaptiveKL(flags.kl_coef, target=flags.kl_target)
    return gym.make_vec(
        "RLHF-Text-v0",
        num_envs=num_envs,
        autoreset_mode=autoreset_mode,
        kl_source=kl_source,
        reference=reference if reference is not None else flags.reference,
        reward=flags.reward,
        prompts=prompts if prompts is not None else flags.prompts,
        tokenizer=flags.tokenizer,
        max_prompt_tokens=flags.max_prompt_tokens,
        prompt_overflow=flags.prompt_overflow,
        max_new_tokens=flags.max_new_tokens,
        stop_token_ids=flags.stop_token_ids,
        temperature=flags.temperature,
        kl_coef=kl_coef,
        length_end=flags.length_end,
        missing_eos_penalty=flags.missing_eos_penalty,
        dtype=flags.dtype,
        device=device_of(flags.device),
        trust_remote_code=flags.trust_remote_code,
    )


def heldout_prompts(flags: EnvFlags) -> list[Any]:
    """The prompts to evaluate on."""
    return textenv.read_prompts(flags.heldout if flags.heldout is not None else textenv.embedded.HELDOUT)


def run(main: Callable[[Any], None], flags: Any) -> None:
    """Call a script's main; a bad argument is one line, not a traceback."""
    try:
        main(flags)
    except ValueError as error:
        sys.exit(f"error: {error}")
