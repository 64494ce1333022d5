"""The words of the MDP: why an episode ended, and what a recorded batch of episodes paid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor


class FinishReason(IntEnum):
    """Why a response ended."""

    NONE = 0
    """It has not ended."""
    STOP = 1
    """A stop token was chosen, also as the last token allowed."""
    LENGTH = 2
    """`max_new_tokens` were chosen and the last of them is no stop token."""
    ABORTED = 3
    """Something outside the MDP cut it; it is unscored and counts as truncated."""


@dataclass(frozen=True)
class ReplayRecord:
    """What the MDP paid for recorded responses; B rows, T the longest response, L the longest prompt + response.

    Every `[B, T]` tensor is 0 where `mask` is false.
    """

    ids: Tensor
    """`[B, L]` int64: prompt, then response, right-padded."""
    prompt_lengths: Tensor
    """`[B]` int64."""
    response_lengths: Tensor
    """`[B]` int64."""
    mask: Tensor
    """`[B, T]` bool: true where a sampled token counts."""
    rewards: Tensor
    """`[B, T]` float32: exactly what `step` would have paid under the same `kl_source`."""
    reward_parts: Mapping[str, Tensor]
    """`[B, T]` each: `score`, `kl` and `missing_eos`, which sum to `rewards`; then what the score was made of, by the
    names that the reward function gives."""
    ref_logprobs: Tensor
    """`[B, T]` float32: log π_ref(a_t | s_t); zeros if the environment has no reference (β = 0)."""
    logprobs: Tensor | None
    """`[B, T]` float32: log π(a_t | s_t), where given or asked for."""
    scores: Tensor
    """`[B]` float32: what the reward function gave (dense token rewards summed); 0 where `scored` is false."""
    scored: Tensor
    """`[B]` bool: whether the score was paid."""
    finish_reasons: Tensor
    """`[B]` int8 of `FinishReason`."""
    terminated: Tensor
    """`[B]` bool: the episode ended inside the MDP; nothing follows."""
    truncated: Tensor
    """`[B]` bool: it was cut from outside; a learner bootstraps from the state after the last token."""

    def __post_init__(self) -> None:
        """Hold the record to its own shapes."""
        if self.rewards.shape != self.mask.shape or self.ref_logprobs.shape != self.mask.shape:
            shapes = [tuple(tensor.shape) for tensor in (self.rewards, self.ref_logprobs)]
            raise ValueError(f"mask: expected that of rewards and ref_logprobs, {shapes}, got {tuple(self.mask.shape)}")

    @property
    def score_parts(self) -> dict[str, Tensor]:
        """`[B]` each: what the reward function says that each score was made of."""
        own = self.reward_parts.keys() - {"score", "kl", "missing_eos"}
        return {name: part.sum(1) for name, part in self.reward_parts.items() if name in own}

    @property
    def attention_mask(self) -> Tensor:
        """`[B, L]` bool: true at the prompt's and the response's tokens."""
        lengths = self.prompt_lengths + self.response_lengths
        return torch.arange(self.ids.shape[1], device=self.ids.device) < lengths[:, None]
