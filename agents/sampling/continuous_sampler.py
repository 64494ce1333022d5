"""Sampling with the continuous batching of transformers, on the model that trains: no second copy, nothing to push."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from agents.checks import at_least
from agents.sampling.random_states import kept_random_states
from agents.sampling.transformers_sampler import Row, TransformersSampler
from textenv.models import unwrap
from textenv.types import FinishReason

_PAGE = 64


class ContinuousSampler(TransformersSampler):
    """Draws by `generate_batch` of transformers: pages of keys and values that rows which end leave to others.

    It has one seed for a call, so a row's draws depend on all of them; greedy responses are the parent's.
    The global random states are after each call what they were before, and the model's mode too.
    """

    def __init__(self, policy: Any, *, max_rows: int = 64, max_batch_tokens: int = 1024) -> None:
        """Sample from `policy`.

        Args:
            policy: A `ValueHeadLM`, a Hugging Face causal LM, or a PEFT model around one.
            max_rows: For how many of the longest responses there is memory for keys and values: at least so many are in
                work at once, and more while they are short.
            max_batch_tokens: Most tokens of one forward, prompts and new ones together.

        Raises:
            ValueError: If a limit is not positive, or the model cannot be paged.
        """
        at_least("max_rows", max_rows, 1)
        at_least("max_batch_tokens", max_batch_tokens, 1)
        super().__init__(policy)
        if not hasattr(unwrap(self._model), "generate_batch"):
            raise ValueError(f"policy: expected a model with generate_batch, got {type(unwrap(self._model)).__name__}")
        self._max_rows, self._max_batch_tokens = max_rows, max_batch_tokens

    def _rows(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_token_ids: Sequence[int],
        temperature: float,
        seed: int,
        greedy: bool,
    ) -> list[Row]:
        if greedy or not prompts:
            return super()._rows(prompts, max_new_tokens, stop_token_ids, temperature, seed, greedy)
        base = unwrap(self._model)
        training = base.training
        try:
            with kept_random_states(), torch.no_grad(), _autocast_anywhere(base):
                found = self._generate(base, prompts, max_new_tokens, stop_token_ids, temperature, seed)
        finally:
            base.train(training)
        return [_row(one, set(stop_token_ids), max_new_tokens) for one in found]

    def _generate(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_token_ids: Sequence[int],
        temperature: float,
        seed: int,
    ) -> list[Any]:
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        longest = max(len(prompt) for prompt in prompts) + max_new_tokens
        rows = min(len(prompts), self._max_rows)
        batching = ContinuousBatchingConfig(
            return_logprobs=True,
            seed=seed,
            page_size=_PAGE,
            num_blocks=rows * (math.ceil(longest / _PAGE) + 1),
            max_batch_tokens=max(self._max_batch_tokens, rows),
            allow_block_sharing=False,  # shared blocks outlive a change of the weights
        )
        law = GenerationConfig(
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(stop_token_ids) or -1,
            pad_token_id=0,
        )
        results = model.generate_batch(
            [list(prompt) for prompt in prompts], generation_config=law, continuous_batching_config=batching
        )
        if len(results) != len(prompts):
            raise RuntimeError(f"expected {len(prompts)} responses, got {len(results)}")
        return list(results.values())


@contextmanager
def _autocast_anywhere(model: Any) -> Iterator[None]:
    """Give the model's forward the autocast of here: it is a thread's own, and transformers generates in another."""
    kind = next(model.parameters()).device.type
    scope = {"enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}
    forward = model.forward

    @wraps(forward)  # transformers looks at its arguments
    def under_autocast(*args: Any, **options: Any) -> Any:
        with torch.autocast(kind, **scope), _cast_into(options["cache"], model.dtype):
            return forward(*args, **options)

    model.forward = under_autocast
    try:
        yield
    finally:
        del model.forward


@contextmanager
def _cast_into(cache: Any, dtype: torch.dtype) -> Iterator[None]:
    """Let a cache of the model's dtype take keys and values of autocast's."""
    update = cache.update

    def cast(key_states: Tensor, value_states: Tensor, **places: Any) -> tuple[Tensor, Tensor]:
        return update(key_states=key_states.to(dtype), value_states=value_states.to(dtype), **places)

    cache.update = cast
    try:
        yield
    finally:
        del cache.update


def _row(output: Any, stops: set[int], max_new_tokens: int) -> Row:
    tokens, logprobs = list(output.generated_tokens), [float(value) for value in output.logprobs]
    ended = bool(tokens) and tokens[-1] in stops
    if output.error or not (ended or len(tokens) == max_new_tokens):
        raise RuntimeError(f"expected a whole response, got {len(tokens)} tokens ({output.error or output.status})")
    return tokens, logprobs, FinishReason.STOP if ended else FinishReason.LENGTH
