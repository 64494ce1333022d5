"""Ancestral sampling with a key-value cache, for rows of equal length."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    start: Tensor,
    new_tokens: int,
    *,
    stop_id: int,
    pad_id: int,
    generator: torch.Generator,
    temperature: float | Tensor = 1.0,
    logit_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Continue every row of ``start`` until it says ``stop_id`` or has ``new_tokens`` more tokens.

    Args:
        model: A causal language model.
        start: Token ids [B, P] without padding.
        new_tokens: Most tokens to add.
        stop_id: The id that ends a row; it is kept.
        pad_id: The id written after a row's end.
        generator: Source of randomness, on the device of ``start``.
        temperature: One number, or one per row as [B, 1].
        logit_bias: Added to the logits, [B, V], or None.

    Returns:
        The rows [B, P + T], right-padded, and their lengths [B], the stop token counted.
    """
    cache = DynamicCache(config=model.config)
    rows, step_input = [start], start
    done = torch.zeros(len(start), dtype=torch.bool, device=start.device)
    lengths = torch.full((len(start),), start.shape[1], device=start.device)
    for position in range(new_tokens):
        output = model(input_ids=step_input, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = output.logits[:, -1].float()
        if logit_bias is not None:
            logits = logits + logit_bias
        token = torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator)
        rows.append(torch.where(done[:, None], pad_id, token))
        lengths += ~done
        done |= token[:, 0] == stop_id
        step_input = token
        # Asking whether all are done waits for the device, so it is asked seldom.
        if position % 16 == 15 and bool(done.all()):
            break
    return torch.cat(rows, dim=1), lengths


def make_generator(device: str, seed: int) -> torch.Generator:
    """A seeded source of randomness on ``device``."""
    return torch.Generator(device=device).manual_seed(seed)
