"""Log-probabilities of chosen tokens, without ever holding a float32 `[B, T, V]` tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from textenv.logprob_chunks import Head, is_plain_linear, logprobs_by_blocks, logprobs_by_rows

MAX_CHUNK_ELEMENTS = 2**22


def selected_logprobs(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    max_chunk_elements: int = MAX_CHUNK_ELEMENTS,
) -> Tensor:
    """Log-probability of each target under the head's softmax.

    `logprobs[b, t] = log softmax(head(hidden[b, t]) / temperature)[targets[b, t]]`, the softmax in float32 whatever the
    dtype of `hidden`. Positions are packed and, when their logits would exceed `max_chunk_elements`, computed in
    chunks that are recomputed in the backward pass, so the peak is one chunk in both directions.

    Args:
        hidden: Final hidden states `[B, T, H]`.
        head: Maps `[N, H]` to logits `[N, V]`, such as an output embedding module.
        targets: Token ids `[B, T]`; anything is allowed where the mask is false.
        temperature: Divides the logits; positive.
        mask: `[B, T]` bool. Where it is false nothing is computed, no gradient flows (a NaN there is harmless) and
            the result is 0.0. None means everywhere.
        max_chunk_elements: Largest number of logits held at once.

    Returns:
        Log-probs `[B, T]`, float32.

    Raises:
        ValueError: If shapes disagree, or if `temperature` or `max_chunk_elements` is not positive.

    Example:
        >>> hidden = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.2, 0.4, 0.4]]]))
        >>> selected_logprobs(hidden, torch.nn.Identity(), torch.tensor([[0, 2, 1]])).exp()
        tensor([[0.5000, 0.7000, 0.4000]])
    """
    return _compute(hidden, head, targets, temperature, mask, max_chunk_elements, with_entropy=False)[0]


def selected_logprobs_and_entropy(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    max_chunk_elements: int = MAX_CHUNK_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and the entropy of the law that it was drawn from.

    As `selected_logprobs`, with `entropy[b, t] = -sum_v p_v log p_v` for
    `p = softmax(head(hidden[b, t]) / temperature)` (a token of probability zero adds nothing). Both are differentiable.

    Args:
        hidden: Final hidden states `[B, T, H]`.
        head: Maps `[N, H]` to logits `[N, V]`.
        targets: Token ids `[B, T]`.
        temperature: Divides the logits; positive.
        mask: `[B, T]` bool; where it is false both results are 0.0 and nothing is computed.
        max_chunk_elements: Largest number of logits held at once.

    Returns:
        Log-probs and entropies, each `[B, T]`, float32.

    Raises:
        ValueError: If shapes disagree, or if `temperature` or `max_chunk_elements` is not positive.

    Example:
        >>> hidden = torch.log(torch.tensor([[[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]]))
        >>> logprobs, entropy = selected_logprobs_and_entropy(hidden, torch.nn.Identity(), torch.zeros(1, 3).long())
        >>> entropy
        tensor([[0.6931, 0.5623, 0.3251]])
    """
    logprobs, entropy = _compute(hidden, head, targets, temperature, mask, max_chunk_elements, with_entropy=True)
    assert entropy is not None
    return logprobs, entropy


def _compute(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    temperature: float,
    mask: Tensor | None,
    max_chunk_elements: int,
    *,
    with_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    _check_shapes(hidden, targets, mask)
    shape = targets.shape
    if mask is None:
        packed_hidden, packed_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        where = None
    else:
        where = mask.reshape(-1).nonzero().squeeze(1)
        # index_select on flat rows: its backward is an index_add, much cheaper than that of boolean indexing.
        packed_hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, where)
        packed_targets = targets.reshape(-1).index_select(0, where)
    logprobs, entropy = packed_logprobs(
        packed_hidden, head, packed_targets, temperature, max_chunk_elements, with_entropy=with_entropy
    )
    return unpack(logprobs, where, shape), None if entropy is None else unpack(entropy, where, shape)


def unpack(packed: Tensor, where: Tensor | None, shape: torch.Size | tuple[int, int]) -> Tensor:
    """Put packed values `[N]` at the flat positions `where` of a zero tensor of `shape`; a reshape if `where` is None.

    Example:
        >>> unpack(torch.tensor([1.0, 2.0]), torch.tensor([0, 2]), (1, 3))
        tensor([[1., 0., 2.]])
    """
    if where is None:
        return packed.reshape(shape)
    return packed.new_zeros(shape[0] * shape[1]).index_copy(0, where, packed).view(shape)


def packed_logprobs(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    temperature: float = 1.0,
    max_chunk_elements: int = MAX_CHUNK_ELEMENTS,
    *,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs (and entropies, if asked) of `N` packed positions: hidden `[N, H]`, targets `[N]`.

    The chunked kernel of `selected_logprobs`, for callers whose positions are packed already.

    Raises:
        ValueError: If `temperature` or `max_chunk_elements` is not positive.

    Example:
        >>> hidden = torch.log(torch.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]]))
        >>> packed_logprobs(hidden, torch.nn.Identity(), torch.tensor([0, 1, 0]))[0].exp()
        tensor([0.5000, 0.7500, 1.0000])
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive; got {temperature}")
    if max_chunk_elements < 1:
        raise ValueError(f"max_chunk_elements must be positive; got {max_chunk_elements}")
    if len(targets) == 0:
        empty = hidden.float().sum() * torch.zeros(0, device=hidden.device)
        return empty, (empty if with_entropy else None)
    if is_plain_linear(head):
        if head.weight.shape[0] * len(targets) > max_chunk_elements:
            return logprobs_by_blocks(hidden, head, targets, temperature, max_chunk_elements, with_entropy)
        return logprobs_by_rows(hidden, head, targets, temperature, len(targets), with_entropy)
    with torch.no_grad():
        width = head(hidden[:1]).shape[-1]
    return logprobs_by_rows(hidden, head, targets, temperature, max(1, max_chunk_elements // width), with_entropy)


def _check_shapes(hidden: Tensor, targets: Tensor, mask: Tensor | None) -> None:
    if targets.ndim != 2 or hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"hidden must be [B, T, H] and targets [B, T]; got {tuple(hidden.shape)} and {tuple(targets.shape)}"
        )
    if mask is not None and (mask.shape != targets.shape or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool of shape {tuple(targets.shape)}; got {mask.dtype} of {tuple(mask.shape)}")
