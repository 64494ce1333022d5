"""Decoding by steps of fixed shapes, which a CUDA graph records once and replays."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from agents.sampling.draw import draw

_LOOK_EVERY = 16
"""Steps between two looks at whether all rows have ended, each of which waits for the device."""


def fixed_decode(
    advance: Callable[[Tensor], Tensor],
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    uniforms: Tensor | None,
    stops: Tensor,
    temperature: float,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """Draw from rows that a decoder has read.

    Args:
        advance: The `fixed_step` of a `RowDecoder` that holds the prompts and has room for the responses.
        head: `[B, H]` to logits `[B, V]`.
        hidden: `[B, H]` at each row's last token.
        uniforms: `[B, steps]` float64 in [0, 1); None takes the most likely tokens.
        stops: `[V]` bool: tokens that end a row. Decoding ends with the last row, or a few steps later.
        temperature: Positive.
        steps: Most tokens of a row.

    Returns:
        Tokens and log-probs, `[steps, B]`; what stands after a row's first stop token means nothing.
    """
    tokens = torch.zeros(steps, len(hidden), dtype=torch.long, device=hidden.device)
    logprobs = torch.zeros(steps, len(hidden), device=hidden.device)
    ended = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    count = torch.zeros(1, dtype=torch.long, device=hidden.device)
    draws = None if uniforms is None else uniforms.T.contiguous()
    current = hidden.clone()

    def step(last: bool = False) -> None:
        row = None if draws is None else draws.index_select(0, count)[0]
        chosen, chosen_logprobs = draw(head(current), row, temperature)
        tokens.index_copy_(0, count, chosen[None])
        logprobs.index_copy_(0, count, chosen_logprobs[None])
        ended.logical_or_(stops[chosen])
        count.add_(1)
        if not last:
            current.copy_(advance(chosen))

    replay = step
    for number in range(steps - 1):
        # The first step warms up whatever allocates at its first use; the second is recorded.
        if number == 1 and hidden.device.type == "cuda":
            replay = _recorded(step, hidden.device)
        replay()
        if (number + 1) % _LOOK_EVERY == 0 and bool(ended.all()):
            return tokens, logprobs
    step(last=True)
    return tokens, logprobs


def _recorded(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The step as a CUDA graph; as it is, if it cannot be one. Recording does nothing of what is recorded."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=_capture_stream(device)):
            step()
    except RuntimeError as error:
        warnings.warn(
            f"cuda_graph: a step of this model cannot be recorded and runs without a graph: {error}", stacklevel=2
        )
        return step
    return graph.replay


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Of the model's device: PyTorch's own is of the one that was current at its first capture."""
    return torch.cuda.Stream(device)
