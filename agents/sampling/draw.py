"""Drawing a token from logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LARGE = 2048
"""Vocabulary from which blocks are faster, measured on a CPU."""
_BLOCK = 128
"""Tokens of a block."""


def draw(logits: Tensor, uniforms: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution, and its log-probability.

    Args:
        logits: `[B, V]` in any dtype.
        uniforms: One float64 number in [0, 1) per row; None takes the most likely token.
        temperature: Positive.

    Returns:
        Tokens `[B]` int64 and their log-probs `[B]` float32.

    Example:
        >>> logits = torch.log(torch.tensor([[0.5, 0.0, 0.5], [0.2, 0.3, 0.5], [0.2, 0.3, 0.5]]))
        >>> draw(logits, torch.tensor([0.5, 0.1999, 0.2001]).double(), 1.0)[0]
        tensor([2, 0, 1])
    """
    probs = torch.softmax(logits.float() / temperature if temperature != 1.0 else logits.float(), dim=-1)
    if uniforms is None:
        chosen = probs.argmax(-1, keepdim=True)
        return chosen.squeeze(1), probs.gather(1, chosen).log_().squeeze(1)
    invert = _invert if probs.shape[-1] < _LARGE else _invert_by_blocks
    chosen = invert(probs, uniforms).clamp_(max=probs.shape[-1] - 1)
    # The log of a float32 softmax: what is drawn has a probability far from underflow.
    return chosen.squeeze(1), probs.gather(1, chosen).log_().squeeze(1)


def _invert(probs: Tensor, uniforms: Tensor) -> Tensor:
    """`[B, 1]`: for each row the first token whose cumulative sum exceeds u times the whole."""
    # Sums in float64: in float32 the error over a large vocabulary exceeds small probabilities.
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    # right=True: the first token whose sum exceeds u, so a token of probability 0 is never drawn, not even at u = 0.
    return torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)


def _invert_by_blocks(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The same, first among the sums of blocks, then within one: sums are several times faster than cumulative ones."""
    blocks = F.pad(probs, (0, -probs.shape[-1] % _BLOCK)).view(len(probs), -1, _BLOCK)
    cumulative = F.pad(blocks.sum(-1, dtype=torch.float64).cumsum(-1), (1, 0))
    aim = (uniforms * cumulative[:, -1])[:, None]
    block = torch.searchsorted(cumulative[:, 1:].contiguous(), aim, right=True).clamp_(max=blocks.shape[1] - 1)
    within = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1).cumsum(-1, dtype=torch.float64)
    # Below the block's own sum whatever rounding did: what is found there has a probability.
    rest = torch.minimum(aim - cumulative.gather(1, block), torch.nextafter(within[:, -1:], within.new_zeros(())))
    return block * _BLOCK + torch.searchsorted(within, rest, right=True)
