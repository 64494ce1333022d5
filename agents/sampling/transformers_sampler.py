"""Sampling with the model at hand, on a key/value cache, with nothing between the logits and the draw."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from agents.policy import ValueHeadLM
from agents.sampling.base import Samples, check_request
from agents.sampling.draw import draw
from agents.sampling.fixed import fixed_decode
from agents.sampling.sync import live_fingerprint
from textenv.decoders import row_decoder
from textenv.models import backbone, context_length, logit_width, output_head, unwrap
from textenv.recompute import Decoder, RecomputeDecoder
from textenv.types import FinishReason

_KEEP_FRACTION = 0.75
Row = tuple[list[int], list[float], FinishReason]
"""Tokens, their log-probs, and how the response ended."""


class TransformersSampler:
    """Draws from a live Hugging Face model; its weights are read anew at each call, its mode is left alone.

    A row's draws depend on the seed and its place among the prompts alone: not on `max_batch`, nor on when other rows
    end.
    """

    def __init__(self, policy: Any, *, max_batch: int | None = None, cuda_graph: bool = False) -> None:
        """Sample from `policy`.

        Args:
            policy: A `ValueHeadLM`, a Hugging Face causal LM, a PEFT model around one, or a `Shared` one.
            max_batch: Most rows decoded at once (None: all).
            cuda_graph: Whether a step is recorded once in each call and replayed, which spares the launches that bound
                small batches on a GPU. Rows that ended are then carried to the end. Needs "sdpa" attention; elsewhere
                than on CUDA the same steps run without a graph.

        Raises:
            ValueError: If `max_batch` is not positive.
        """
        if max_batch is not None and max_batch < 1:
            raise ValueError(f"max_batch must be positive or None; got {max_batch}")
        self._cuda_graph = cuda_graph
        self._model = policy.lm if isinstance(policy, ValueHeadLM) else policy
        self._max_batch = max_batch
        self._version: int | None = None

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
            ValueError: If a prompt is empty, has unknown ids or leaves no room in the model's context, or if
                `temperature`, `max_new_tokens` or `stop_token_ids` make no sense.
        """
        width = logit_width(self._model)
        context = context_length(unwrap(self._model).config)
        check_request(prompts, max_new_tokens, stop_token_ids, temperature, width, context)
        rows = self._rows(prompts, max_new_tokens, stop_token_ids, temperature, seed, greedy)
        logprobs = [[] if greedy else row[1] for row in rows]
        found = None if self._version is None else live_fingerprint(self._model, self._version)
        return Samples([row[0] for row in rows], logprobs, [row[2] for row in rows], found)

    def _rows(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_token_ids: Sequence[int],
        temperature: float,
        seed: int,
        greedy: bool,
    ) -> list[Row]:
        """The responses to a request that was checked."""
        width = logit_width(self._model)
        device = next(backbone(self._model).parameters()).device
        stops = torch.zeros(width, dtype=torch.bool, device=device)
        stops[list(stop_token_ids)] = True
        # All uniforms at once and row by row: whatever else happens, row i reads its own.
        generator = torch.Generator(device).manual_seed(seed)
        uniforms = torch.rand(len(prompts), max_new_tokens, dtype=torch.float64, device=device, generator=generator)
        size = self._max_batch or max(1, len(prompts))
        parts = [
            self._decode(prompts[first : first + size], uniforms[first : first + size], stops, temperature, greedy)
            for first in range(0, len(prompts), size)
        ]
        return [row for part in parts for row in part]

    def push(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Only the version is news: the model is live. If it is not the one that trains, its checksums will tell."""
        self._version = version

    def close(self) -> None:
        """Nothing to give back."""

    @torch.inference_mode()
    def _decode(
        self, prompts: Sequence[Sequence[int]], uniforms: Tensor, stops: Tensor, temperature: float, greedy: bool
    ) -> list[Row]:
        count, steps = uniforms.shape
        decoder, hidden = self._prefill(prompts, steps, stops.device)
        head = output_head(self._model)
        if self._cuda_graph and not isinstance(decoder, RecomputeDecoder):
            fixed, draws = cast(Any, decoder).fixed_step(), None if greedy else uniforms
            return _cut(*fixed_decode(fixed, head, hidden, draws, stops, temperature, steps), stops)
        tokens = torch.zeros(steps, count, dtype=torch.long, device=stops.device)
        logprobs = torch.zeros(steps, count, device=stops.device)
        live = torch.arange(count, device=stops.device)  # which prompts the decoder's rows are
        ended = torch.zeros(count, dtype=torch.bool, device=stops.device)  # of the decoder's rows
        everyone = True
        for step in range(steps):
            chosen, chosen_logprobs = draw(head(hidden), None if greedy else uniforms[:, step], temperature)
            if everyone:
                tokens[step], logprobs[step] = chosen, chosen_logprobs
            else:
                tokens[step, live], logprobs[step, live] = chosen, chosen_logprobs
            ended |= stops[chosen]
            remaining = len(ended) - int(ended.sum())
            if remaining == 0 or step == steps - 1:
                break
            if remaining <= _KEEP_FRACTION * len(ended):
                keep = (~ended).nonzero().squeeze(1)
                decoder.keep(keep)
                live, uniforms, chosen, ended, everyone = live[keep], uniforms[keep], chosen[keep], ended[keep], False
            hidden = decoder.advance(chosen)
        return _cut(tokens, logprobs, stops)

    def _prefill(self, prompts: Sequence[Sequence[int]], steps: int, device: torch.device) -> tuple[Decoder, Tensor]:
        """A decoder that has read the prompts, and the hidden state at each one's last token.

        Prompts that come several times (groups) are read once and their cache is copied.
        """
        distinct = {tuple(prompt): None for prompt in prompts}
        # Copying costs memory traffic: not for the odd prompt that comes twice.
        repeated = 2 * len(distinct) <= len(prompts)
        ids, lengths = _right_padded(list(distinct) if repeated else prompts, device)
        decoder = row_decoder(self._model, len(ids), ids.shape[1] + steps)
        hidden = decoder.prefill(None, ids, lengths)
        if repeated:
            places = {prompt: place for place, prompt in enumerate(distinct)}
            copies = torch.tensor([places[tuple(prompt)] for prompt in prompts], device=device)
            decoder.keep(copies)
            hidden = hidden.index_select(0, copies)
        return decoder, hidden


def _right_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
    return ids, torch.tensor([len(prompt) for prompt in prompts])


def _cut(tokens: Tensor, logprobs: Tensor, stops: Tensor) -> list[Row]:
    """Cut each row after its first stop token; `tokens` and `logprobs` are `[T, B]`."""
    is_stop = stops[tokens]
    lengths = torch.where(is_stop.any(0), is_stop.int().argmax(0) + 1, len(tokens)).tolist()
    stopped = is_stop.any(0).tolist()
    rows = zip(tokens.T.tolist(), logprobs.T.tolist(), lengths, stopped, strict=True)
    return [(t[:n], p[:n], FinishReason.STOP if stop else FinishReason.LENGTH) for t, p, n, stop in rows]
