"""A task: the options with everything loaded. One task serves any number of rows and of replays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import textenv.embedded as embedded
import textenv.models as models
from textenv.constraints.base import BoundConstraint, Vocabulary, as_constraint
from textenv.kl import FixedKL, KLSource, as_controller
from textenv.models import Shared
from textenv.options import EnvOptions
from textenv.prompt_streams import MixedPromptStream, PromptStream
from textenv.prompts import Prompt, PromptMixture, read_prompts, tokenize_prompts
from textenv.reference import Reference, only_allowed
from textenv.rewards.base import TextDecoder
from textenv.rewards.binding import as_reward
from textenv.rewards.reward import Reward


class Task:
    """What all rows share: models, tokenizer, prompts, limits and β.

    Loading order is cheap to dear, so that a bad argument is told before a model is read.
    """

    def __init__(self, options: EnvOptions) -> None:
        """Load what the options name.

        Raises:
            ValueError: Naming the argument, what was expected and what came.
        """
        self.options = options
        self.device = options.torch_device
        self.controller = as_controller(options.kl_coef)
        self.policy = options.policy
        self.kl_source: KLSource = options.kl_source or ("agent" if options.policy is None else "policy")
        source = options.reference if options.reference is not None else embedded.STORYTELLER
        config = models.load_config(source, argument="reference", trust_remote_code=options.trust_remote_code)
        self.vocab_size = models.logit_width(source.module if isinstance(source, Shared) else config)
        self.tokenizer = _tokenizer(options, source)
        if self.tokenizer is not None:
            models.check_tokenizer_fits(self.tokenizer, self.vocab_size)
        self.stop_token_ids = _stop_token_ids(options, self.tokenizer, self.vocab_size)
        self.stop_tensor = torch.tensor(self.stop_token_ids, dtype=torch.int64, device=self.device)
        parts = _read_sources(options)
        self.prompts = self._tokenized([prompt for part, _ in parts for prompt in part], options.max_prompt_tokens)
        self.shares = tuple((len(part), float(weight)) for part, weight in parts)
        """Size and weight of each source of `prompts`, which stand one after the other."""
        self.max_prompt_tokens = options.max_prompt_tokens or max(map(len, self.prompts))
        self.columns = self.max_prompt_tokens + options.max_new_tokens
        _check_context(self.max_prompt_tokens, options.max_new_tokens, models.context_length(config))
        self.constraint: BoundConstraint | None = None
        """What may be chosen in a state; None: every token."""
        if options.constraint is not None:
            self.constrain(options.constraint)
        self.reward = self._load_reward()
        self.reference = self._load_reference(source) if self.needs_reference else None

    @property
    def kl_coef(self) -> float:
        """β now; 0 without a reference, whatever the controller says."""
        return float(self.controller.value) if self.reference is not None else 0.0

    @property
    def needs_reference(self) -> bool:
        """Whether any KL can be asked for: β is fixed at 0 or it is not."""
        return not (isinstance(self.controller, FixedKL) and self.controller.value == 0)

    @cached_property
    def pad_token_id(self) -> int:
        """What fills a row past its end; it carries no meaning."""
        pad = None if self.tokenizer is None else self.tokenizer.pad_token_id
        return 0 if pad is None or not 0 <= pad < self.vocab_size else pad

    @cached_property
    def text_decoder(self) -> TextDecoder:
        """How prompts and responses read."""
        if self.tokenizer is None:
            raise ValueError("tokenizer: expected one, because text was asked for, got None")
        return TextDecoder(self.tokenizer, frozenset(self.stop_token_ids))

    def attach(self, policy: Callable[..., Tensor]) -> None:
        """Ask this live policy for log π from now on (`kl_source="policy"`)."""
        if self.options.kl_source in ("agent", "reference"):
            raise ValueError(f"attach: expected kl_source None or 'policy', got {self.options.kl_source!r}")
        if not callable(policy):
            raise ValueError(f"policy: expected a callable (input_ids, attention_mask) -> logits, got {policy!r}")
        self.policy, self.kl_source = policy, "policy"

    def constrain(self, constraint: Any) -> None:
        """Allow only what this constraint allows: a constraint, a function of the response, or a list of these."""
        if self.constraint is not None:
            raise ValueError("constraint: expected none yet, got one; give them together, in a list")
        given = as_constraint(constraint)
        if given is None:
            raise ValueError("constraint: expected a constraint, a function of the response, or a list, got None")
        vocabulary = Vocabulary(self.vocab_size, self.stop_token_ids, self.options.max_new_tokens, self.tokenizer)
        self.constraint = BoundConstraint(given, vocabulary, self.device)

    def tokenize(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of prompts given at run time, held to this task's limits."""
        if isinstance(prompts, str):
            raise ValueError(f"prompts: expected a list of prompts, got one string, {prompts!r}")
        return self._tokenized(prompts, self.max_prompt_tokens)

    def _tokenized(self, prompts: Sequence[Prompt], max_prompt_tokens: int | None) -> list[list[int]]:
        return tokenize_prompts(
            prompts,
            self.tokenizer,
            vocab_size=self.vocab_size,
            max_prompt_tokens=max_prompt_tokens,
            overflow=self.options.prompt_overflow,
            chat_template=self.options.chat_template,
        )

    def prompt_stream(self, *, seed: int, group: int = 1) -> PromptStream | MixedPromptStream:
        """The indices of its prompts, in the order in which an agent draws them."""
        if len(self.shares) == 1:
            return PromptStream(len(self.prompts), seed=seed, group=group)
        sizes, weights = zip(*self.shares, strict=True)
        return MixedPromptStream(sizes, weights, seed=seed, group=group)

    def draw_prompt(self, rng: np.random.Generator) -> int:
        """The index of one prompt by chance: a source by its weight, and any prompt of it alike."""
        if len(self.shares) == 1:
            return int(rng.integers(len(self.prompts)))
        sizes, weights = (np.array(values) for values in zip(*self.shares, strict=True))
        source = int(rng.choice(len(sizes), p=weights / weights.sum()))
        return int(sizes[:source].sum() + rng.integers(sizes[source]))

    @torch.no_grad()
    def policy_logprobs(self, ids: Tensor, lengths: Tensor, actions: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Ask the live policy for log π(a|s).

        Args:
            ids: `[n, L]`, the states.
            lengths: `[n]`.
            actions: `[n]`.
            allowed: `[n, V]` bool, where the law is renormalised; None: everywhere.

        Returns:
            `[n]` float32.
        """
        assert self.policy is not None
        width = int(lengths.max())
        mask = torch.arange(width, device=ids.device) < lengths[:, None]
        logits = self.policy(ids[:, :width], mask.long())
        shape = (len(ids), self.vocab_size)
        if not isinstance(logits, Tensor) or tuple(logits.shape) != shape:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"policy: expected logits of shape {shape} (the reference's vocabulary), got {got}")
        logits = only_allowed(logits.float() / self.options.temperature, allowed)
        logprobs = logits.gather(1, actions[:, None])[:, 0] - logits.logsumexp(1)
        if not torch.isfinite(logprobs).all():
            raise ValueError(f"policy: expected finite log-probs of the chosen tokens, got {logprobs.tolist()}")
        return logprobs

    def _load_reward(self) -> Reward:
        reward = self.options.reward if self.options.reward is not None else embedded.REWARD
        return as_reward(
            reward,
            tokenizer=self.tokenizer,
            stop_token_ids=self.stop_token_ids,
            max_new_tokens=self.options.max_new_tokens,
            device=self.device,
            dtype=self.options.torch_dtype,
            trust_remote_code=self.options.trust_remote_code,
        )

    def _load_reference(self, source: str | Path | Shared) -> Reference:
        model = models.load_causal_lm(
            source,
            argument="reference",
            device=self.device,
            dtype=self.options.torch_dtype,
            trust_remote_code=self.options.trust_remote_code,
        )
        return Reference(model, temperature=self.options.temperature)


def _read_sources(options: EnvOptions) -> list[tuple[list[Prompt], float]]:
    given = options.prompts if options.prompts is not None else embedded.PROMPTS
    return [
        (read_prompts(source, column=options.prompt_column, strict=options.prompt_strict), weight)
        for source, weight in PromptMixture.of(given).sources
    ]


def _tokenizer(options: EnvOptions, source: str | Path | Shared) -> Any:
    given = options.tokenizer
    if given is None:
        return None if isinstance(source, Shared) else models.load_tokenizer(source, argument="tokenizer")
    if isinstance(given, str | Path):
        return models.load_tokenizer(given, argument="tokenizer")
    if not callable(getattr(given, "batch_decode", None)):
        raise ValueError(f"tokenizer: expected a folder, a hub name or a tokenizer, got {given!r}")
    return given


def _stop_token_ids(options: EnvOptions, tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    stops = options.stop_token_ids
    if stops is None:
        stops = [] if tokenizer is None or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if not isinstance(stops, Sequence) or not all(
        isinstance(stop, int) and not isinstance(stop, bool) and 0 <= stop < vocab_size for stop in stops
    ):
        raise ValueError(f"stop_token_ids: expected ids in [0, {vocab_size}), got {stops!r}")
    return tuple(dict.fromkeys(stops))


def _check_context(max_prompt_tokens: int, max_new_tokens: int, context: int | None) -> None:
    if context is not None and max_prompt_tokens + max_new_tokens > context:
        raise ValueError(
            f"max_new_tokens: expected max_prompt_tokens + max_new_tokens within the reference's context of {context}, "
            f"got {max_prompt_tokens} + {max_new_tokens}"
        )
