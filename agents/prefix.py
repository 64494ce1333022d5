"""Next-token logits and values of observation batches, at the price of the tokens that are new.

Libraries of reinforcement learning pass states as they come: right-padded ids with a mask, in any order, any subset, with
repetitions. `PrefixNetwork` answers them with the numbers of a plain forward, and pays for each token once:

- while acting (gradients off), a row that extends a row seen before by one token costs one token;
- while learning (gradients on), a batch is forwarded as its distinct longest rows, since in a causal model those
  contain every prefix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from agents.policy import ValueHeadLM
from agents.slots import flat_hidden
from textenv.models import backbone, output_head


class Prefixes(NamedTuple):
    """B states as prefixes of U rows: state b is `ids[owner[b], :at[b]]`."""

    ids: Tensor
    """`[U, L]` int64, right-padded with any legal id."""
    lengths: Tensor
    """`[U]` int64: how many ids of each row count."""
    owner: Tensor
    """`[B]` int64: the row that a state is a prefix of."""
    at: Tensor
    """`[B]` int64: its length, from 1 to that of its row."""


def distinct_prefixes(input_ids: Tensor, lengths: Tensor) -> Prefixes:
    """The distinct longest rows of a batch, and where each of its rows is found in them.

    Args:
        input_ids: `[B, L]`, right-padded.
        lengths: `[B]`, at least 1.
    """
    rows = torch.arange(len(lengths), device=lengths.device)
    return Prefixes(input_ids.long(), lengths, rows, lengths)


class PrefixNetwork(nn.Module):
    """A `ValueHeadLM` as the actor and the critic of any library.

    Attributes:
        policy: Whose logits and values these are.
        temperature: Of the policy's law softmax(logits / temperature).
    """

    def __init__(
        self, policy: ValueHeadLM, *, temperature: float = 1.0, cache: bool = True, share: bool = True
    ) -> None:
        """Read a policy.

        Args:
            policy: A value-headed language model.
            temperature: The environment's; logits are divided by it.
            cache: Whether acting keeps keys and values; False forwards whole rows.
            share: Whether a batch is forwarded as its distinct longest rows; False forwards each row.
        """
        super().__init__()
        self.policy, self.temperature = policy, temperature
        self.cache, self.share = cache, share

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[B, V]` and values `[B]` of right-padded rows `[B, L]`, `attention_mask` nonzero at tokens."""
        states = self.states(input_ids, attention_mask)
        return self.logits(states), self.values(states)

    def states(self, input_ids: Tensor, attention_mask: Tensor) -> Prefixes:
        """What `logits` and `values` take, of right-padded rows `[B, L]` with a mask, nonzero at tokens.

        Call it once where both are asked for.
        """
        return distinct_prefixes(input_ids, attention_mask.long().sum(1))

    def logits(self, states: Prefixes) -> Tensor:
        """Next-token logits `[B, V]` float32, divided by the temperature."""
        hidden = self._hidden(backbone(self.policy.lm), states)
        return output_head(self.policy.lm)(hidden).float() / self.temperature

    def values(self, states: Prefixes) -> Tensor:
        """Values `[B]` float32, in reward units."""
        trunk = self.policy.critic_backbone if self.policy.critic_backbone is not None else backbone(self.policy.lm)
        head = self.policy.value_head
        return head.denormalize(head(self._hidden(trunk, states)))

    def clear(self) -> None:
        """Forget everything that is kept; needed after weights were written behind autograd's back (`p.data`)."""

    def _hidden(self, trunk: nn.Module, states: Prefixes) -> Tensor:
        width = int(states.lengths.max())
        hidden = flat_hidden(trunk, states.ids[:, :width])
        return hidden.index_select(0, states.owner * width + states.at - 1)
