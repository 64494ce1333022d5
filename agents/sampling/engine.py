"""Sampling by an engine with weights of its own: what is asked, what is checked, and what happens when it fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from agents.policy import ValueHeadLM
from agents.sampling.base import Samples, check_request
from agents.sampling.sync import Fingerprint, named_weights
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
    """Of each, under softmax(logits / temperature)."""
    version: str
    """Of the weights that drew all of it, as the engine says."""
    cached_tokens: int = 0
    """How much of the prompt was found in the engine's prefix cache."""


class Engine(Protocol):
    """Something that draws, with weights that are given to it."""

    def load(self, weights: Mapping[str, Tensor], version: str) -> Mapping[str, int]:
        """Take weights, forget whatever was computed with others, and tell the checksums of what arrived."""
        ...

    def draw(self, requests: Sequence[Request]) -> list[Drawn]:
        """One response a request, in their order."""
        ...

    def close(self) -> None:
        """Give back memory and processes."""
        ...


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
        """
        self._model = policy.lm if isinstance(policy, ValueHeadLM) else policy
        self._start = start
        limits = [limit for limit in (max_model_len, context_length(unwrap(self._model).config)) if limit]
        self._context = min(limits) if limits else None
        self._names = frozenset(name for name, _ in named_weights(self._model))
        self._loaded, self._fresh = Fingerprint(-1, {}), True
        self._engine: Engine | None = None
        self.push(named_weights(self._model), 0)

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
            ValueError: As `TransformersSampler.sample`, or for what the engine refuses.
            SamplerFailure: If the engine fails, is rebuilt and fails again.
        """
        width = logit_width(self._model)
        check_request(prompts, max_new_tokens, stop_token_ids, temperature, width, self._context)
        stops = list(stop_token_ids)
        requests = [
            Request(list(prompt), row_seed, max_new_tokens, stops, temperature, greedy)
            for prompt, row_seed in zip(prompts, row_seeds(seed, len(prompts)), strict=True)
        ]
        # A request that the engine refuses is no failure of the engine.
        return self._trying("draw", lambda engine: self._draw(engine, requests), refusal=ValueError)

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

    def _trying(self, what: str, work: Callable[[Engine], Any], refusal: type[Exception] | tuple[()] = ()) -> Any:
        """Do it, and once more on a new engine if that failed."""
        try:
            return work(self._engine or self._rebuild())
        except refusal:
            raise
        except Exception as error:
            first = error
        try:
            return work(self._rebuild())
        except Exception as error:
            raise SamplerFailure(
                f"the engine could not {what} ({_said(first)}), was started again and failed again ({_said(error)}); "
                "nothing was learnt since the last update, and the last checkpoint is whole"
            ) from error

    def _rebuild(self) -> Engine:
        """Another engine, with the policy's weights."""
        engine, self._engine = self._engine, None
        if engine is not None:
            with suppress(Exception):  # it is broken already: what failed first is what will be told
                engine.close()
        self._engine = self._start()
        if self._loaded.version >= 0:
            self._load(self._engine, dict(named_weights(self._model)), self._loaded.version)
        return self._engine

    def _load(self, engine: Engine, named: Mapping[str, Tensor], version: int) -> None:
        arrived = engine.load(named, str(version))
        self._loaded, self._fresh = Fingerprint(version, dict(arrived)), True

    def _draw(self, engine: Engine, requests: Sequence[Request]) -> Samples:
        drawn = engine.draw(requests) if requests else []
        if len(drawn) != len(requests):
            raise RuntimeError(f"expected {len(requests)} responses, got {len(drawn)}")
        if self._fresh:
            check_prefixes([request.prompt for request in requests], [one.cached_tokens for one in drawn])
            self._fresh = False
        for request, one in zip(requests, drawn, strict=True):
            _check_response(request, one)
        versions = {one.version for one in drawn} or {str(self._loaded.version)}
        if len(versions) != 1:
            raise RuntimeError(f"expected responses of one version of the weights, got {', '.join(sorted(versions))}")
        stops = set(requests[0].stop_token_ids) if requests else set()
        return Samples(
            [one.tokens for one in drawn],
            [one.logprobs for one in drawn],
            [FinishReason.STOP if one.tokens[-1] in stops else FinishReason.LENGTH for one in drawn],
            Fingerprint(int(versions.pop()), self._loaded.checksums),
        )


def row_seeds(seed: int, rows: int) -> list[int]:
    """A seed for each row that depends on `seed` and its place alone, distinct but once in 2⁶³.

    >>> row_seeds(3, 2) == row_seeds(3, 5)[:2], len(set(row_seeds(0, 100) + row_seeds(1, 100)))
    (True, 200)
    """
    return [int(number >> 1) for number in np.random.SeedSequence(seed).generate_state(rows, np.uint64)]


def check_prefixes(prompts: Sequence[Sequence[int]], cached: Sequence[int]) -> None:
    """Refuse a first batch after new weights that found prompts in a cache from before them.

    What one request finds, another of the same batch must have computed.

    Args:
        prompts: Of the batch.
        cached: How many tokens of each were found.

    Raises:
        RuntimeError: If nobody has.

    >>> check_prefixes([[1, 2, 3], [1, 2, 4]], [0, 2])
    >>> check_prefixes([[1, 2, 3], [1, 2, 4]], [2, 2])
    Traceback (most recent call last):
    ...
    RuntimeError: 2 tokens of prompt 0 came from a prefix cache of earlier weights: it was not reset
    """
    least: dict[tuple[int, ...], int] = {}
    for prompt, found in zip(prompts, cached, strict=True):
        for length in {count for count in cached if 0 < count <= len(prompt)}:
            prefix = tuple(prompt[:length])
            least[prefix] = min(least.get(prefix, found), found)
    for row, (prompt, found) in enumerate(zip(prompts, cached, strict=True)):
        if found and least[tuple(prompt[:found])] >= found:
            raise RuntimeError(
                f"{found} tokens of prompt {row} came from a prefix cache of earlier weights: it was not reset"
            )


def _check_response(request: Request, drawn: Drawn) -> None:
    tokens, stops = drawn.tokens, set(request.stop_token_ids)
    ended = bool(tokens) and tokens[-1] in stops
    whole = ended or len(tokens) == request.max_new_tokens
    if not whole or len(tokens) > request.max_new_tokens or len(drawn.logprobs) != len(tokens):
        raise RuntimeError(
            f"expected {request.max_new_tokens} tokens or a stop token, each with its log-prob, got {len(tokens)} "
            f"tokens and {len(drawn.logprobs)} log-probs"
        )
    if any(token in stops for token in tokens[:-1]):
        raise RuntimeError("expected a response to end with its first stop token, got one that goes on")
    if not all(math.isfinite(value) for value in drawn.logprobs):
        raise RuntimeError("expected finite log-probs, got NaN or infinity")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
