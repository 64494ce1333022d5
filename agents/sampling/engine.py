"""Sampling by an engine with weights of its own: what is asked, what is checked, and what happens when it fails."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from agents.policy import ValueHeadLM
from agents.sampling.base import Samples, check_request
from agents.sampling.names import check_pushable, named_weights, weight_names
from agents.sampling.sync import Fingerprint
from textenv.models import context_length, logit_width, unwrap
from textenv.types import FinishReason


@dataclass(frozen=True)
class Request:
    """One response to be drawn."""

    prompt: list[int]
    """Token ids."""
    seed: int
    """Of its draws, in [0, 2⁶³)."""
    max_new_tokens: int
    """Its longest."""
    stop_token_ids: list[int]
    """Nothing else ends it."""
    temperature: float
    """Of the law whose log-probs are told."""
    greedy: bool
    """Whether the most likely token is taken."""


@dataclass(frozen=True)
class Drawn:
    """One response."""

    tokens: list[int]
    """Its stop token included."""
    logprobs: list[float]
    """Of each, under softmax(logits / temperature); none if it is greedy."""
    label: str
    """Of the weights that drew all of it, as the engine says."""
    cached_tokens: int = 0
    """How much of the prompt was found in a prefix cache."""
    cache: int = 0
    """Which of the engine's prefix caches, where it has several."""


class Engine(Protocol):
    """Something that draws, with weights that are given to it."""

    def load(self, weights: Mapping[str, Tensor], label: str) -> Mapping[str, int]:
        """Take weights, forget whatever was computed with others, and tell the checksums of what arrived.

        What is drawn bears the label from when all of it is in; until then, no label that was ever given.
        """
        ...

    def draw(self, requests: Sequence[Request]) -> list[Drawn]:
        """One response a request, in their order.

        Raises:
            RequestRefused: If it takes no such request, and is as good as before. Any other error is a failure.
        """
        ...

    def close(self) -> None:
        """Give back memory and processes."""
        ...


class RequestRefused(ValueError):
    """The engine takes no such request; nothing is wrong with it, and another one would not take it either."""


class SamplerFailure(RuntimeError):
    """The engine failed, and failed again when it had been rebuilt; the trainer is where it was before."""


class EngineSampler:
    """The sampler protocol on an engine: see `agents.sampling.base.Sampler`.

    A row's draws depend on the seed and its place among the prompts alone, if the engine's arithmetic does not depend
    on the batch (in float32; not in bfloat16). An engine that fails is closed and started again, once a call.
    """

    def __init__(self, policy: Any, start: Callable[[], Engine], *, max_model_len: int | None = None) -> None:
        """Start an engine and give it the policy's weights, as version 0.

        Args:
            policy: A `ValueHeadLM`, a Hugging Face causal LM, or a PEFT model around one. What is sampled from is what
                was pushed last; a rebuilt engine gets the policy's weights as they are then.
            start: Makes an engine, each time that it is called.
            max_model_len: Longest prompt and response together; None: the model's context.

        Raises:
            ValueError: If an engine would misread the model's weights (`agents.sampling.names.check_pushable`).
            SamplerFailure: If it cannot be started, twice.
        """
        self._model = policy.lm if isinstance(policy, ValueHeadLM) else policy
        self._start = start
        limits = [limit for limit in (max_model_len, context_length(unwrap(self._model).config)) if limit]
        self._context = min(limits) if limits else None
        check_pushable(self._model)
        self._names = frozenset(weight_names(self._model))
        self._loaded: tuple[str, Fingerprint] | None = None
        self._fresh = True
        self._engine: Engine | None = None
        try:
            self.push(named_weights(self._model), 0)
        except BaseException:
            self.close()
            raise

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_token_ids: Sequence[int],
        temperature: float,
        seed: int,
        greedy: bool = False,
    ) -> Samples:
        """Draw one response per prompt; see `agents.sampling.base.Sampler.sample`.

        Raises:
            ValueError: As `TransformersSampler.sample`; a `RequestRefused` for what the engine refuses.
            SamplerFailure: If the engine fails, is rebuilt and fails again.
        """
        width = logit_width(self._model)
        check_request(prompts, max_new_tokens, stop_token_ids, temperature, width, self._context)
        stops = list(stop_token_ids)
        requests = [
            Request(list(prompt), row_seed, max_new_tokens, stops, temperature, greedy)
            for prompt, row_seed in zip(prompts, row_seeds(seed, len(prompts)), strict=True)
        ]
        return self._trying("draw", lambda engine: self._draw(engine, requests))

    def push(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Sample from these weights from now on; see `agents.sampling.base.Sampler.push`.

        Raises:
            ValueError: If names are missing or unknown; the engine is untouched then, and as good as before.
            SamplerFailure: If the engine fails, is rebuilt and fails again.
        """
        named = dict(weights)
        if named.keys() != self._names:
            unknown, missing = sorted(named.keys() - self._names), sorted(self._names - named.keys())
            wrong = f"no {', '.join(unknown[:3])}" if unknown else f"also {', '.join(missing[:3])}"
            raise ValueError(
                f"weights: expected those of the policy's language model, {wrong}, got {len(named)} tensors"
            )
        self._trying("load weights", lambda engine: self._load(engine, named, version))

    def close(self) -> None:
        """End the engine; the next call would start another."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def _trying(self, what: str, work: Callable[[Engine], Any]) -> Any:
        """Do it, and once more on a new engine if that failed."""
        try:
            return work(self._engine or self._rebuild())
        except RequestRefused:
            raise
        except Exception as error:
            first = error
        try:
            return work(self._rebuild())
        except RequestRefused:
            raise
        except Exception as error:
            with suppress(Exception):
                self.close()
            raise SamplerFailure(
                f"the engine could not {what} ({_said(first)}), was started again and failed again ({_said(error)}); "
                "nothing was learnt since the last update, and the last checkpoint is whole"
            ) from error

    def _rebuild(self) -> Engine:
        """Another engine, with the policy's weights."""
        with suppress(Exception):  # it is broken already: what failed first is what will be told
            self.close()
        engine = self._start()
        try:
            if self._loaded is not None:
                self._load(engine, dict(named_weights(self._model)), self._loaded[1].version)
        except BaseException:
            with suppress(Exception):
                engine.close()
            raise
        self._engine = engine
        return engine

    def _load(self, engine: Engine, named: Mapping[str, Tensor], version: int) -> None:
        # One label a load: weights that anybody else gave to the engine, of the same version or not, bear another.
        label = f"{version}-{secrets.token_hex(8)}"
        arrived = engine.load(named, label)
        self._loaded, self._fresh = (label, Fingerprint(version, dict(arrived))), True

    def _draw(self, engine: Engine, requests: Sequence[Request]) -> Samples:
        assert self._loaded is not None
        label, loaded = self._loaded
        drawn = engine.draw(requests) if requests else []
        if len(drawn) != len(requests):
            raise RuntimeError(f"expected {len(requests)} responses, got {len(drawn)}")
        others = sorted({one.label for one in drawn} - {label})
        if others:
            raise RuntimeError(f"expected responses of the weights {label}, got some of {', '.join(others)}")
        for request, one in zip(requests, drawn, strict=True):
            _check_response(request, one)
        if self._fresh and requests:
            check_prefixes(requests, drawn)
            self._fresh = False
        stops = set(requests[0].stop_token_ids) if requests else set()
        return Samples(
            [one.tokens for one in drawn],
            [one.logprobs for one in drawn],
            [FinishReason.STOP if one.tokens[-1] in stops else FinishReason.LENGTH for one in drawn],
            loaded,
        )


def row_seeds(seed: int, rows: int) -> list[int]:
    """A seed for each row that depends on `seed` and its place alone, distinct but once in 2⁶³.

    >>> row_seeds(3, 2) == row_seeds(3, 5)[:2], len(set(row_seeds(0, 100) + row_seeds(1, 100)))
    (True, 200)
    """
    return [int(number >> 1) for number in np.random.SeedSequence(seed).generate_state(rows, np.uint64)]


def check_prefixes(requests: Sequence[Request], drawn: Sequence[Drawn]) -> None:
    """Refuse a first batch after new weights that found prompts in a cache from before them.

    What one request finds, another of the same batch must have computed, as its prompt or its response.

    Args:
        requests: Of the batch.
        drawn: Their responses.

    Raises:
        RuntimeError: If nobody has.
    """
    lengths = {one.cached_tokens for one in drawn} - {0}
    least: dict[tuple[int, ...], int] = {}
    for request, one in zip(requests, drawn, strict=True):
        ids = request.prompt + one.tokens
        for length in lengths:
            if length <= len(ids):
                prefix = (one.cache, *ids[:length])
                least[prefix] = min(least.get(prefix, one.cached_tokens), one.cached_tokens)
    for row, (request, one) in enumerate(zip(requests, drawn, strict=True)):
        found = one.cached_tokens
        if found and least.get((one.cache, *request.prompt[:found]), found) >= found:
            raise RuntimeError(
                f"{found} tokens of prompt {row} came from a prefix cache of earlier weights: it was not reset"
            )


def _check_response(request: Request, drawn: Drawn) -> None:
    tokens, stops = drawn.tokens, set(request.stop_token_ids)
    ended = bool(tokens) and tokens[-1] in stops
    whole = ended or len(tokens) == request.max_new_tokens
    told = 0 if request.greedy else len(tokens)
    if not whole or len(tokens) > request.max_new_tokens or len(drawn.logprobs) != told:
        raise RuntimeError(
            f"expected {request.max_new_tokens} tokens or a stop token, each with its log-prob unless it is greedy, "
            f"got {len(tokens)} tokens and {len(drawn.logprobs)} log-probs"
        )
    if any(token in stops for token in tokens[:-1]):
        raise RuntimeError("expected a response to end with its first stop token, got one that goes on")
    if not all(math.isfinite(value) for value in drawn.logprobs):
        raise RuntimeError("expected finite log-probs, got NaN or infinity")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
