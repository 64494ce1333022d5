"""Every option of the environment, in one place, checked."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from textenv.constraints.base import as_constraint
from textenv.kl import KLController, KLCredit, KLSource, as_controller
from textenv.models import Shared
from textenv.prompts import PromptMixture

LengthEnd = Literal["terminate", "truncate"]
PromptOverflow = Literal["error", "left"]


@dataclass(frozen=True)
class EnvOptions:
    """The arguments of `gym.make("RLHF-Text-v0", ...)`.

    Raises:
        ValueError: For an unknown value or a pair of options that contradict each other.
    """

    reference: str | Path | Shared | None = None
    """The frozen π_ref: a folder or hub name of a causal language model, or `textenv.Shared(module)`. It also gives the
    action space and the tokenizer. None: the embedded storyteller."""
    reward: Any = None
    """What scores a response: a folder or hub name of a sequence or token classifier, a callable `(prompts, responses)
    -> scores`, or an object of `textenv.rewards`, whose parts may be any of these. None: the embedded reward model."""
    prompts: Any = None
    """Strings, token-id lists, chats (lists of messages, each with `role` and `content`), a `.txt`, `.jsonl`, `.json`,
    `.csv`, `.tsv` or `.parquet` file, or a `datasets.Dataset` or its folder on disk. A mapping from such sources to
    weights, or a `textenv.PromptMixture`, draws each by its share. None: the embedded openings."""
    prompt_column: str = "prompt"
    """The column of the prompts in a file or dataset that has columns."""
    prompt_strict: bool = True
    """Whether a row of a file that is no prompt is an error, or skipped with a warning."""
    chat_template: bool = False
    """Whether a prompt that is text becomes what the user says in the tokenizer's chat template; chats always do."""
    tokenizer: Any = None
    """A folder, hub name or tokenizer object. None: the one in the reference's folder."""
    policy: Callable[..., torch.Tensor] | None = None
    """The live policy, `(input_ids, attention_mask) -> logits [B, V]`; modules are wrapped in `textenv.Shared`."""
    max_prompt_tokens: int | None = None
    """Longest prompt. None: the longest of `prompts`."""
    prompt_overflow: PromptOverflow = "error"
    """What a longer prompt means: an `error`, or keep its end (`left` cuts on the left)."""
    max_new_tokens: int = 48
    """Longest response."""
    stop_token_ids: Sequence[int] | None = None
    """Ids that end a response. None: the tokenizer's EOS. Empty: only the length ends it."""
    temperature: float = 1.0
    """π and π_ref are both softmax(logits/temperature)."""
    kl_coef: float | KLController = 0.15
    """β ≥ 0, or a controller. 0 loads no reference model."""
    kl_source: KLSource | None = None
    """Who knows log π: `agent`, `policy` or `reference`. None: `policy` if `policy` is given, else `agent`."""
    kl_credit: KLCredit = "token"
    """Pay the KL at each `token`, or its sum with the score at the end of the `sequence`."""
    constraint: Any = None
    """Which tokens may be chosen in a state: an object of `textenv.constraints`, a function `(response ids) -> mask or
    ids`, or a list of these, all of which must allow a token. π and π_ref are both renormalised. None: all may."""
    length_end: LengthEnd = "terminate"
    """A response that reaches `max_new_tokens` is scored and terminated, or cut, unscored and truncated."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the reward of a response that ends at its length."""
    info_text: bool = False
    """Whether info carries the prompt and the response as text."""
    device: str | torch.device = "cpu"
    """Where models and buffers live."""
    dtype: str | torch.dtype = "float32"
    """Floating-point type of the reference and the reward model."""
    trust_remote_code: bool = False
    """Whether a model folder may bring Python code."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> EnvOptions:
        """Options by name.

        Raises:
            ValueError: For a name that there is none of, besides what the values themselves raise.
        """
        names = [field.name for field in fields(cls)]
        for name in given:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f" (did you mean {close[0]}?)" if close else ""
                raise ValueError(f"{name}: expected an argument of the environment, one of {', '.join(names)}{hint}")
        return cls(**given)

    def __post_init__(self) -> None:
        """Check each option and each pair."""
        for name, literal in (
            ("prompt_overflow", PromptOverflow),
            ("kl_credit", KLCredit),
            ("length_end", LengthEnd),
        ):
            _one_of(name, getattr(self, name), get_args(literal))
        if self.kl_source is not None:
            _one_of("kl_source", self.kl_source, get_args(KLSource))
        _positive_int("max_new_tokens", self.max_new_tokens)
        if self.max_prompt_tokens is not None:
            _positive_int("max_prompt_tokens", self.max_prompt_tokens)
        if not (_is_number(self.temperature) and 0 < self.temperature < float("inf")):
            raise ValueError(f"temperature: expected a finite number > 0, got {self.temperature!r}")
        if not (_is_number(self.missing_eos_penalty) and 0 <= self.missing_eos_penalty < float("inf")):
            raise ValueError(f"missing_eos_penalty: expected a finite number >= 0, got {self.missing_eos_penalty!r}")
        if isinstance(self.prompts, Mapping):
            PromptMixture.of(self.prompts)
        as_controller(self.kl_coef)
        as_constraint(self.constraint)
        for name in ("reference", "reward", "policy", "constraint"):
            _check_live(name, getattr(self, name))
        if self.policy is not None and not callable(self.policy):
            raise ValueError(f"policy: expected a callable (input_ids, attention_mask) -> logits, got {self.policy!r}")
        self._check_pairs()
        self.torch_dtype  # noqa: B018 - raises for an unknown name
        self.torch_device  # noqa: B018

    def _check_pairs(self) -> None:
        if self.kl_source == "policy" and self.policy is None:
            raise ValueError(
                "policy: expected a callable with kl_source='policy', got None; to attach one later leave kl_source out"
            )
        if self.kl_source in ("agent", "reference") and self.policy is not None:
            raise ValueError(f"policy: expected None under kl_source={self.kl_source!r}, which never asks it")
        if self.length_end == "truncate" and self.kl_credit == "sequence":
            raise ValueError("kl_credit: expected 'token' with length_end='truncate' (no sum is paid), got 'sequence'")
        if self.length_end == "truncate" and self.missing_eos_penalty:
            raise ValueError(
                "missing_eos_penalty: expected 0 with length_end='truncate' (a cut pays nothing), "
                f"got {self.missing_eos_penalty!r}"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch knows it."""
        dtype = getattr(torch, self.dtype, None) if isinstance(self.dtype, str) else self.dtype
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"dtype: expected a floating-point type such as 'float32', got {self.dtype!r}")
        return dtype

    @property
    def torch_device(self) -> torch.device:
        """`device` as torch knows it."""
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"device: expected a torch device such as 'cpu' or 'cuda', got {self.device!r}") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device: expected one that is here, got {self.device!r}, and PyTorch finds no GPU")
        return device


def _one_of(name: str, value: Any, legal: Sequence[Any]) -> None:
    if value not in legal:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, legal))}, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _positive_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")


def _check_live(name: str, value: Any) -> None:
    """Gymnasium deep-copies the arguments of an environment: a raw live module would become a frozen copy."""
    owner = getattr(value, "__self__", value)
    if isinstance(owner, torch.nn.Module):
        raise ValueError(
            f"{name}: expected live modules to be wrapped, textenv.Shared(...), got {type(owner).__name__}"
        )
