"""Drawing responses the way TRL's users do: through Hugging Face's `generate`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.adapters.trl_compat.model import AutoModelForCausalLMWithValueHead, evaluating
from agents.sampling.draw import draw

# What generate does if neither its arguments nor the model's generation config say anything, and what leaves the law
# of the tokens alone. A name that is missing in a version of transformers counts as neutral.
_DEFAULTS: dict[str, Any] = {"do_sample": False, "top_k": 50}
_NEUTRAL: dict[str, Callable[[Any], bool]] = {
    "do_sample": bool,
    "temperature": lambda value: value == 1,
    "top_k": lambda value: value == 0,
    "top_p": lambda value: value >= 1,
    "min_p": lambda value: value == 0,
    "typical_p": lambda value: value >= 1,
    "num_beams": lambda value: value == 1,
    "repetition_penalty": lambda value: value == 1,
    "no_repeat_ngram_size": lambda value: value == 0,
    "min_length": lambda value: value <= 0,
    "min_new_tokens": lambda value: value <= 0,
}


class LengthSampler:
    """Draws a length from `min_value` to `max_value - 1`, all as likely, by NumPy's global generator."""

    def __init__(self, min_value: int, max_value: int) -> None:
        """Check the range.

        Raises:
            ValueError: If it is empty or not positive.
        """
        if not 0 < min_value < max_value:
            raise ValueError(f"min_value, max_value: expected 0 < min_value < max_value, got {min_value}, {max_value}")
        self.values = list(range(min_value, max_value))

    def __call__(self) -> int:
        """One length."""
        return int(np.random.choice(self.values))


@torch.no_grad()
def respond_to_batch(model: Any, queries: Tensor, txt_len: int = 20, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Continue prompts of one length by exactly `txt_len` tokens; no token ends a response.

    Args:
        model: A value-headed model, or a Hugging Face causal language model.
        queries: `[B, L]`, without padding.
        txt_len: Tokens to draw.
        top_k: Keep the k likeliest only; 0: all. Anything else draws from another law than `step` scores.
        top_p: Likewise, the smallest set of that probability; 1: all.

    Returns:
        `[B, txt_len]`.

    Raises:
        ValueError: If `queries` has no rows and columns.
    """
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    if queries.ndim != 2 or queries.numel() == 0:
        raise ValueError(f"queries: expected shape [B, L], got {tuple(queries.shape)}")
    filters: list[Any] = [TopKLogitsWarper(top_k)] if top_k > 0 else []
    filters += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    lm = model.pretrained_model if isinstance(model, AutoModelForCausalLMWithValueHead) else model
    ids = queries = queries.to(lm.device)
    drawn, past = [], None
    with evaluating(lm):
        for _ in range(txt_len):
            output = lm(input_ids=ids, past_key_values=past, use_cache=True)
            logits, past = output.logits[:, -1].float(), output.past_key_values
            for keep in filters:
                logits = keep(queries, logits)
            ids = draw(logits, torch.rand(len(ids), dtype=torch.float64).to(ids.device), 1.0)[0][:, None]
            drawn.append(ids)
    return torch.cat(drawn, dim=1) if drawn else queries[:, :0]


@dataclass(frozen=True)
class Layout:
    """How queries are laid out for generate, and what of its result is wanted."""

    return_prompt: bool
    """Whether queries are part of what comes back."""
    remove_padding: bool
    """Whether the responses to a list are cut after their first stop id."""
    pad_to_multiple_of: int | None
    """The queries of a list are padded to a multiple of this."""
    batch_size: int
    """Queries of a list that are continued together."""


def respond(
    model: AutoModelForCausalLMWithValueHead,
    tokenizer: Any,
    queries: Tensor | list[Tensor],
    length_sampler: Callable[[], int] | None,
    layout: Layout,
    generation_kwargs: Mapping[str, Any],
) -> Any:
    """Continue one query, or a list of them in batches.

    Args:
        model: What is asked.
        tokenizer: Its EOS ends responses too, and its padding id fills.
        queries: Token ids `[l]`, or a list of such.
        length_sampler: Gives `max_new_tokens` of each batch.
        layout: How.
        generation_kwargs: For Hugging Face's `generate`.

    Returns:
        `[1, l + n]` or `[1, n]` for one query; for a list a list of `[l + n]` or `[n]`.

    Raises:
        ValueError: If a query has another shape, or generate gives something else than one sequence per query.
    """
    for query in queries if isinstance(queries, list) else [queries]:
        if not isinstance(query, Tensor) or query.ndim != 1 or len(query) == 0:
            raise ValueError(f"query_tensor: expected token ids of shape [l], or a list of such, got {query!r}")
    kwargs = dict(generation_kwargs)
    if isinstance(queries, Tensor):
        if length_sampler is not None:
            kwargs["max_new_tokens"] = length_sampler()
        row = queries[None].to(model.device)
        sequence = model.generate(input_ids=row, attention_mask=torch.ones_like(row), **kwargs)
        return sequence if layout.return_prompt else sequence[:, row.shape[1] :]
    stops = stop_ids(model, tokenizer, kwargs)
    fillers = (kwargs.get("pad_token_id"), tokenizer.pad_token_id, *stops, 0)
    filler = next(i for i in fillers if i is not None)
    results: list[Tensor] = []
    for start in range(0, len(queries), layout.batch_size):
        if length_sampler is not None:
            kwargs["max_new_tokens"] = length_sampler()
        part = queries[start : start + layout.batch_size]
        results += _respond_together(model, part, filler, stops, {"pad_token_id": filler, **kwargs}, layout)
    return results


def _respond_together(
    model: AutoModelForCausalLMWithValueHead,
    queries: Sequence[Tensor],
    filler: int,
    stops: Sequence[int],
    generation_kwargs: Mapping[str, Any],
    layout: Layout,
) -> list[Tensor]:
    """Continue queries of any lengths, padded on the left, where generate wants the padding."""
    width, step = max(len(query) for query in queries), layout.pad_to_multiple_of or 1
    width += -width % step
    device = model.device
    ids = torch.full((len(queries), width), filler, device=device)
    mask = torch.zeros_like(ids)
    for row, query in enumerate(queries):
        ids[row, width - len(query) :] = query.to(device)
        mask[row, width - len(query) :] = 1
    sequences = model.generate(input_ids=ids, attention_mask=mask, **generation_kwargs)
    if not isinstance(sequences, Tensor) or len(sequences) != len(queries):
        raise ValueError(
            "generation_kwargs: expected one sequence per query (no return_dict_in_generate, num_return_sequences 1), "
            "got something else from generate"
        )
    results = []
    for query, sequence in zip(queries, sequences, strict=True):
        response = sequence[width:]
        if layout.remove_padding:
            # In the response alone: a query may hold EOS, and does where EOS is BOS too.
            ends = torch.isin(response, torch.tensor(stops, device=device)).nonzero()
            response = response[: int(ends[0]) + 1] if len(ends) else response
        results.append(torch.cat([query.to(device), response]) if layout.return_prompt else response)
    return results


def stop_ids(
    model: AutoModelForCausalLMWithValueHead, tokenizer: Any, generation_kwargs: Mapping[str, Any]
) -> list[int]:
    """Ids that end a response: what generate stops at, and the tokenizer's EOS, as in TRL."""
    given = _setting(model, generation_kwargs, "eos_token_id")
    ids = [given] if isinstance(given, int) else list(given or [])
    return [*ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]


def warn_of_another_law(model: AutoModelForCausalLMWithValueHead, generation_kwargs: Mapping[str, Any]) -> None:
    """Warn if generate draws from another law than the softmax at temperature 1, which is what `step` scores.

    Then the importance ratio is wrong from the first minibatch on, and the KL of the samples can fall below 0.
    """
    settings = {name: _setting(model, generation_kwargs, name) for name in _NEUTRAL}
    foreign = {name: value for name, value in settings.items() if value is not None and not _NEUTRAL[name](value)}
    if foreign:
        what = ", ".join(f"{name}={value!r}" for name, value in foreign.items())
        warnings.warn(
            f"generate draws with {what}, but step() scores responses by the softmax at temperature 1; to train on "
            "them pass do_sample=True, top_k=0, top_p=1.0, min_length=-1 and temperature 1",
            stacklevel=3,
        )


def _setting(model: AutoModelForCausalLMWithValueHead, generation_kwargs: Mapping[str, Any], name: str) -> Any:
    """What generate will use: its argument, else the config it is given or the model's, else the default."""
    if generation_kwargs.get(name) is not None:
        return generation_kwargs[name]
    config = generation_kwargs.get("generation_config") or model.pretrained_model.generation_config
    value = getattr(config, name, None)
    return _DEFAULTS.get(name) if value is None else value
