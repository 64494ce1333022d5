"""What a sampler takes and gives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from agents.sampling.sync import Fingerprint
from textenv.types import FinishReason


@dataclass(frozen=True)
class Samples:
    """One response per prompt, in the prompts' order."""

    responses: list[list[int]]
    """The ids chosen, a stop token included."""
    logprobs: list[list[float]]
    """log π of each of them at the sampling temperature, softmax in float32; of greedy responses none, empty rows."""
    finish_reasons: list[FinishReason]
    """STOP or LENGTH; a stop token as the last one allowed is STOP."""
    fingerprint: Fingerprint | None = None
    """Of the weights that drew them; None where nothing was ever pushed."""

    def __post_init__(self) -> None:
        """Check that the three agree.

        Raises:
            ValueError: If they do not have one entry per prompt, or log-probs are not one per token, or none at all.
        """
        counts = {len(self.responses), len(self.logprobs), len(self.finish_reasons)}
        told = any(self.logprobs)
        if len(counts) != 1 or any(len(p) != told * len(r) for r, p in zip(self.responses, self.logprobs, strict=True)):
            raise ValueError(
                "responses, logprobs and finish_reasons must have one entry per prompt, logprobs per token"
            )


class Sampler(Protocol):
    """Anything that continues prompts with a policy."""

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
        """Draw one response per prompt from softmax(logits / temperature).

        Args:
            prompts: Token ids, each at least one; repeat a prompt to sample it several times.
            max_new_tokens: Longest response.
            stop_token_ids: A response ends with the first of these that is chosen; what prompts hold does not matter.
            temperature: Positive.
            seed: The same seed gives the same samples; no global random state is read or moved.
            greedy: Take the most likely token at each place instead. No log-probs are told: they are drawn from no law,
                and an engine would have to send those of the whole vocabulary.
        """
        ...

    def push(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Sample from these weights from now on, and tell of them in `Samples.fingerprint`.

        Args:
            weights: Of the language model alone, under the names of its checkpoint (`agents.sampling.named_weights`).
            version: Their label.

        Raises:
            ValueError: If names are missing or unknown; what was sampled from before still is.
        """
        ...

    def close(self) -> None:
        """Give back memory and processes; nothing is sampled any more."""
        ...


def check_request(
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_token_ids: Sequence[int],
    temperature: float,
    vocab_size: int,
    context: int | None,
) -> None:
    """Refuse a request that a sampler could only answer wrongly.

    Raises:
        ValueError: Naming the argument.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive; got {temperature}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    if any(not 0 <= stop < vocab_size for stop in stop_token_ids):
        raise ValueError(f"stop_token_ids must be from 0 to {vocab_size - 1}; got {list(stop_token_ids)}")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompts must not be empty; row {row} is")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise ValueError(f"prompts must hold ids from 0 to {vocab_size - 1}; row {row} does not")
        if context is not None and len(prompt) + max_new_tokens > context:
            raise ValueError(
                f"prompts: row {row} has {len(prompt)} tokens, and with max_new_tokens {max_new_tokens} exceeds the "
                f"model's context of {context}"
            )
