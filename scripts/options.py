"""Flags that the command lines share."""

from __future__ import annotations

import os
import pkgutil
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import torch

import textenv
from textenv.kl import AdaptiveKL
from textenv.prompts import PROMPT_SUFFIXES
from textenv.rewards.binding import as_reward
from textenv.rewards.reward import Reward
from textenv.task import Task


@dataclass(frozen=True)
class EnvFlags:
    """The environment."""

    reference: str | None = None
    """Folder or hub name of the frozen reference; if absent, where a model is trained that one, else the embedded
    storyteller."""
    reward: str | None = None
    """Folder or hub name of a reward model, or `module:attribute`, an object or function of yours; the embedded model
    if absent."""
    prompts: tuple[str, ...] | None = None
    """Files of prompts to train on (.txt, .jsonl, .json, .csv, .tsv, .parquet, or the folder of a saved dataset), each
    drawn alike, or by its weight if written file=weight and nothing is called so; the embedded openings if absent."""
    heldout: str | None = None
    """A file of prompts to evaluate on; the embedded held-out openings if absent."""
    prompt_column: str = "prompt"
    """The column of the prompts in a file that has columns."""
    prompt_strict: bool = True
    """Whether a row that is no prompt is an error, or skipped and told."""
    chat_template: bool = False
    """Whether a prompt that is text becomes what the user says in the tokenizer's chat template."""
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
        reward=named_reward(flags.reward, "env.reward"),
        prompts=prompts if prompts is not None else prompt_sources(flags.prompts),
        prompt_column=flags.prompt_column,
        prompt_strict=flags.prompt_strict,
        chat_template=flags.chat_template,
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


def is_code(name: str) -> bool:
    """Whether a name is `module:attribute`, and not a folder that is there."""
    return re.fullmatch(r"[\w.]+:[\w.]+", name) is not None and not Path(name).exists()


def named_reward(name: str | None, flag: str) -> Any:
    """What a flag names: `module:attribute` becomes the object, a folder or hub name stays what it is.

    Modules are looked for in the working directory, too.

    Raises:
        ValueError: Naming the flag, if the module or the attribute is not there or no reward.
    """
    if name is None or not is_code(name):
        return name
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{flag}: expected a module:attribute that is there, got {name!r} ({error})") from error
    if isinstance(found, type) or not (callable(found) or callable(getattr(found, "bind", None))):
        kind = f"the class {found.__name__}" if isinstance(found, type) else repr(found)
        raise ValueError(f"{flag}: expected a function or a reward, got {kind} from {name!r}")
    return found


def bound_reward(name: str, flag: str, task: Task) -> Reward:
    """The reward that a flag names, beside the task's own and given what that one is given.

    Raises:
        ValueError: If there is none, or it does not fit the task.
    """
    options = task.options
    return as_reward(
        named_reward(name, flag),
        tokenizer=task.tokenizer,
        stop_token_ids=task.stop_token_ids,
        max_new_tokens=options.max_new_tokens,
        device=task.device,
        dtype=options.torch_dtype,
        trust_remote_code=options.trust_remote_code,
    )


def heldout_prompts(flags: EnvFlags) -> list[Any]:
    """The prompts to evaluate on."""
    source = flags.heldout if flags.heldout is not None else textenv.embedded.HELDOUT
    return textenv.read_prompts(source, column=flags.prompt_column, strict=flags.prompt_strict)


def prompt_sources(given: Sequence[str] | None) -> Any:
    """Files with their weights, which stand behind the last `=`; None stays None.

    What is there by the whole name, such as a folder `lr=0.1`, has weight 1.

    Raises:
        ValueError: If what stands there is no number.

    >>> prompt_sources(["a.jsonl=2", "b=c.txt"]).sources
    (('a.jsonl', 2.0), ('b=c.txt', 1.0))
    """
    return None if given is None else textenv.PromptMixture(tuple(map(_weighted, given)))


def _weighted(given: str) -> tuple[str, float]:
    name, equals, weight = given.rpartition("=")
    if not equals or Path(given).suffix in PROMPT_SUFFIXES or os.path.exists(given):
        return given, 1.0
    try:
        return name, float(weight)
    except ValueError:
        raise ValueError(f"env.prompts: expected file=weight, a number behind the last '=', got {given!r}") from None


def run(main: Callable[[Any], None], flags: Any) -> None:
    """Call a script's main; a bad argument, or a server that cannot be reached, is one line, not a traceback."""
    try:
        main(flags)
    except (ValueError, ConnectionError, TimeoutError) as error:
        sys.exit(f"error: {error}")
