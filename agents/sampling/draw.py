"""Drawing a token from logits."""

from __future__ import annotations

import torch
from torch import Tensor


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
    # Sums in float64: in float32 the error over a large vocabulary exceeds small probabilities.
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    # right=True: the first token whose sum exceeds u, so a token of probability 0 is never drawn, not even at u = 0.
    chosen = torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)
    chosen = chosen.clamp_(max=logits.shape[-1] - 1)
    # The log of a float32 softmax: what is drawn has a probability far from underflow.
    return chosen.squeeze(1), probs.gather(1, chosen).log_().squeeze(1)
