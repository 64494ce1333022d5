"""The one transition of the MDP: append a token, see whether it ended the episode.

Pure functions on tensors; `TextEnv`, `TextVectorEnv` and `replay` all come here. N rows, L prompt + response.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from textenv.types import FinishReason


class TokenState(NamedTuple):
    """N rows of the state s_t = x ⊕ y_<t, right-padded, prompt first."""

    ids: Tensor
    """`[N, L]` int64."""
    prompt_lengths: Tensor
    """`[N]` int64."""
    lengths: Tensor
    """`[N]` int64: prompt and response so far."""
    finish_reasons: Tensor
    """`[N]` int8 of `FinishReason`."""

    @property
    def response_lengths(self) -> Tensor:
        """`[N]` int64: tokens chosen so far."""
        return self.lengths - self.prompt_lengths

    def id_lists(self, rows: Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts and responses of some rows, `[r]`."""
        ids = self.ids[rows].tolist()
        cuts = zip(self.prompt_lengths[rows].tolist(), self.lengths[rows].tolist(), strict=True)
        pairs = [(row[:start], row[start:end]) for row, (start, end) in zip(ids, cuts, strict=True)]
        return [prompt for prompt, _ in pairs], [response for _, response in pairs]


def empty(rows: int, columns: int, *, device: torch.device, pad_token_id: int) -> TokenState:
    """N rows without a prompt."""
    zeros = torch.zeros(rows, dtype=torch.int64, device=device)
    ids = torch.full((rows, columns), pad_token_id, dtype=torch.int64, device=device)
    return TokenState(ids, zeros, zeros, torch.zeros(rows, dtype=torch.int8, device=device))


def begin(state: TokenState, rows: Tensor, prompts: Tensor, prompt_lengths: Tensor) -> TokenState:
    """Start an episode in some rows.

    Args:
        state: The N rows as they are.
        rows: `[r]` int64, the rows that start.
        prompts: `[r, L]` int64, the prompts, padded to the width of the state.
        prompt_lengths: `[r]` int64.

    Returns:
        The N rows; those not named are as they were.
    """
    return TokenState(
        state.ids.index_copy(0, rows, prompts),
        state.prompt_lengths.index_copy(0, rows, prompt_lengths),
        state.lengths.index_copy(0, rows, prompt_lengths),
        state.finish_reasons.index_fill(0, rows, int(FinishReason.NONE)),
    )


def append(
    state: TokenState, actions: Tensor, rows: Tensor, *, stop_token_ids: Tensor, max_new_tokens: int
) -> TokenState:
    """The transition s_{t+1} = s_t ⊕ a_t of some rows.

    Args:
        state: The N rows as they are.
        actions: `[r]` int64, a_t of the rows named.
        rows: `[r]` int64, the rows that act; none of them may have ended.
        stop_token_ids: `[S]` int64.
        max_new_tokens: The longest response.

    Returns:
        The N rows; those not named are as they were.
    """
    position = state.lengths[rows]
    ended = finish_reasons(
        actions,
        position - state.prompt_lengths[rows] + 1,
        stop_token_ids=stop_token_ids,
        max_new_tokens=max_new_tokens,
    )
    return TokenState(
        state.ids.index_put((rows, position), actions),
        state.prompt_lengths,
        state.lengths.index_copy(0, rows, position + 1),
        state.finish_reasons.index_copy(0, rows, ended),
    )


def finish_reasons(tokens: Tensor, response_lengths: Tensor, *, stop_token_ids: Tensor, max_new_tokens: int) -> Tensor:
    """Why the response ends with this token, if it does.

    A stop token ends it, also as the last token allowed; `max_new_tokens` end it otherwise. Only response tokens
    are ever passed here, so a stop token in the prompt, or one that equals BOS or PAD, means nothing.

    Args:
        tokens: Token ids, any shape.
        response_lengths: How long the response is with the token in it; same shape.
        stop_token_ids: `[S]` int64.
        max_new_tokens: The longest response.

    Returns:
        int8 of `FinishReason`, the shape of `tokens`: STOP, LENGTH or NONE.

    >>> finish_reasons(torch.tensor([5, 2, 2]), torch.tensor([1, 2, 3]),
    ...                stop_token_ids=torch.tensor([2]), max_new_tokens=3).tolist()
    [0, 1, 1]
    """
    at_limit = (response_lengths >= max_new_tokens).to(torch.int8) * int(FinishReason.LENGTH)
    return torch.where(torch.isin(tokens, stop_token_ids), int(FinishReason.STOP), at_limit).to(torch.int8)


def last_slots(mask: Tensor) -> Tensor:
    """The last slot of each row that counts: `[B, T]` bool of `[B, T]` bool; none where none counts.

    >>> last_slots(torch.tensor([[True, True, False]])).tolist()
    [[False, True, False]]
    """
    return mask & (mask.flip(1).cumsum(1).flip(1) == 1)


def endings(reasons: Tensor, *, length_end: Literal["terminate", "truncate"]) -> tuple[Tensor, Tensor]:
    """Gymnasium's two flags.

    The score is paid at a cut with `length_end="terminate"`, so nothing follows it: a learner that bootstrapped from
    the state after it would be paid twice.

    Args:
        reasons: int8 of `FinishReason`, any shape.
        length_end: What `LENGTH` means.

    Returns:
        `(terminated, truncated)`, bool, the shape of `reasons`.

    >>> [flags.tolist() for flags in endings(torch.tensor([0, 1, 2, 3]), length_end="truncate")]
    [[False, True, False, False], [False, False, True, True]]
    """
    cut = reasons == FinishReason.LENGTH
    terminated = reasons == FinishReason.STOP
    truncated = reasons == FinishReason.ABORTED
    return (terminated | cut, truncated) if length_end == "terminate" else (terminated, truncated | cut)
