"""Next-token logits and values of observation batches, at the price of the tokens that are new.

Libraries of reinforcement learning pass states as they come: right-padded ids with a mask, in any order, any subset,
with repetitions. `PrefixNetwork` answers them with the numbers of a plain forward, and pays for each token once:

- while acting (gradients off), a row that extends a row of the call before by one token costs one token;
- while learning (gradients on), a batch is forwarded as its distinct longest rows, since in a causal model those
  contain every prefix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from agents.policy import ValueHeadLM
from agents.prefix_cache import PrefixCache, distinct_rows
from agents.slots import flat_hidden
from agents.weights import weights_stamp
from textenv.logprobs import packed_logprobs
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


def own_rows(input_ids: Tensor, lengths: Tensor) -> Prefixes:
    """Every state as a row of its own."""
    return Prefixes(input_ids, lengths, torch.arange(len(lengths), device=lengths.device), lengths)


def distinct_prefixes(input_ids: Tensor, lengths: Tensor) -> Prefixes:
    """The distinct longest rows of a batch, and where each of its rows is found in them.

    Rows are sorted as byte strings, zero past their ends. All rows with a common prefix then stand together and the
    prefix, if it is a row itself, before them; so a row is a prefix of some other exactly if it is one of its
    successor.

    Args:
        input_ids: `[B, L]` integers, right-padded.
        lengths: `[B]`, at least 1.

    >>> ids = torch.tensor([[7, 5, 0], [7, 5, 9], [7, 4, 0], [7, 0, 0]])
    >>> states = distinct_prefixes(ids, torch.tensor([2, 3, 2, 1]))
    >>> states.ids.tolist(), states.owner.tolist(), states.at.tolist()
    ([[7, 4, 0], [7, 5, 9]], [1, 1, 0, 0], [2, 3, 2, 1])
    """
    device, counts = input_ids.device, lengths.cpu().numpy()
    width = int(counts.max())
    ids = input_ids[:, :width].cpu().numpy()
    inside = np.arange(width) < counts[:, None]
    keys = np.where(inside, ids + 1, 0).astype(np.uint32)  # plus 1: zero is smaller than any token
    order = keys.view(f"S{4 * width}")[:, 0].argsort(kind="stable")
    keys, sorted_counts = keys[order], counts[order]
    contained = ((keys[:-1] == keys[1:]) | (np.arange(width) >= sorted_counts[:-1, None])).all(1)
    longest = np.append(~contained, True)
    owner = np.empty(len(counts), dtype=np.int64)
    owner[order] = np.cumsum(longest) - longest  # the next longest row in the sorted order
    rows = torch.from_numpy(order[longest]).to(device)
    return Prefixes(
        input_ids[:, :width].index_select(0, rows),
        lengths.index_select(0, rows.to(lengths.device)),
        torch.from_numpy(owner).to(device),
        lengths,
    )


class PrefixNetwork(nn.Module):
    """A `ValueHeadLM` as the actor and the critic of any library.

    What it keeps is dropped by itself when a weight moves by an optimizer, an in-place operation, `load_state_dict`
    or an adapter that is switched, and at each forward with gradients. Only after a write through `p.data` or NumPy
    must `clear()` be called. A copy or pickle of the network keeps nothing.

    Attributes:
        policy: Whose logits and values these are.
        temperature: Of the policy's law softmax(logits / temperature).
        cache: Whether acting keeps keys and values; False forwards whole rows.
        share: Whether a batch is forwarded as its distinct longest rows; False forwards each row.
    """

    def __init__(
        self, policy: ValueHeadLM, *, temperature: float = 1.0, cache: bool = True, share: bool = True
    ) -> None:
        """Read a policy.

        Args:
            policy: A value-headed language model.
            temperature: The environment's; logits are divided by it.
            cache: Whether acting keeps keys and values.
            share: Whether a batch is forwarded as its distinct longest rows.

        Raises:
            ValueError: If `temperature` is not positive.
        """
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature!r}")
        self.policy, self.temperature = policy, temperature
        self.cache, self.share = cache, share
        self._actor = _Trunk(cache, share)
        self._critic = self._actor if policy.critic_backbone is None else _Trunk(cache, share)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[B, V]` and values `[B]` of right-padded rows `[B, L]`, `attention_mask` nonzero at tokens."""
        states = self.states(input_ids, attention_mask)
        return self.logits(states), self.values(states)

    def states(self, input_ids: Tensor, attention_mask: Tensor) -> Prefixes:
        """What `logits`, `values` and `logprobs` take. Call it once where several of them are asked for.

        Args:
            input_ids: `[B, L]` of any numeric type, right-padded.
            attention_mask: `[B, L]`, nonzero at tokens.

        Raises:
            ValueError: If shapes differ, a row is empty, or the padding is not on the right.
        """
        inside = attention_mask != 0
        if input_ids.ndim != 2 or inside.shape != input_ids.shape:
            got = f"{tuple(input_ids.shape)} and {tuple(attention_mask.shape)}"
            raise ValueError(f"input_ids and attention_mask: expected the same shape [B, L], got {got}")
        if not bool(inside[:, 0].all() & (inside[:, 1:] <= inside[:, :-1]).all()):
            raise ValueError("attention_mask: expected tokens first and padding on the right, and no empty row")
        device = self.policy.device
        ids, lengths = input_ids.to(device, torch.int64), inside.sum(1).to(device)
        if self.share and torch.is_grad_enabled():
            return distinct_prefixes(ids, lengths)
        return own_rows(ids, lengths)

    def logits(self, states: Prefixes) -> Tensor:
        """Next-token logits `[B, V]` float32, divided by the temperature."""
        logits = output_head(self.policy.lm)(self.hidden(states)).float()
        return logits if self.temperature == 1.0 else logits / self.temperature

    def logprobs(
        self, states: Prefixes, actions: Tensor, *, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log π(a|s) `[B]` and, if asked, the entropies `[B]`, without ever holding `[B, V]`.

        Args:
            states: B states.
            actions: `[B]` token ids.
            with_entropy: Whether to compute entropies.
        """
        head = output_head(self.policy.lm)
        return packed_logprobs(self.hidden(states), head, actions.long(), self.temperature, with_entropy=with_entropy)

    def values(self, states: Prefixes) -> Tensor:
        """Values `[B]` float32, in reward units."""
        head, trunk = self.policy.value_head, self.policy.critic_backbone
        if trunk is None:
            hidden = self._actor.hidden("critic", self.policy.lm, states)
        else:
            hidden = self._critic.hidden("critic", trunk, states)
        return head.denormalize(head(hidden))

    def hidden(self, states: Prefixes) -> Tensor:
        """Final hidden states `[B, H]` of the policy's trunk, for a head of your own."""
        return self._actor.hidden("actor", self.policy.lm, states)

    def next_logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits `[B, V]`, *not* divided by the temperature: an environment's `policy`, which divides them itself."""
        with torch.no_grad():
            return output_head(self.policy.lm)(self.hidden(self.states(input_ids, attention_mask)))

    def clear(self) -> None:
        """Forget everything that is kept; needed after weights were written through `p.data` or NumPy."""
        self._actor.clear()
        self._critic.clear()


class _Trunk:
    """Hidden states of one trunk: from the cache, from shared rows, or from the forward that was just done.

    With a shared trunk the actor and the critic ask for the same states in turn: the second takes what the first left.
    Each takes once, since a graph that was gone backward through cannot be used again.
    """

    def __init__(self, cache: bool, share: bool) -> None:
        self.cache, self.share = cache, share
        self.clear()

    def clear(self) -> None:
        self._stored = PrefixCache()
        self._stamp: tuple[Any, ...] = ()
        self._left: _Left | None = None

    def hidden(self, reader: str, model: Any, states: Prefixes) -> Tensor:
        stamp = weights_stamp(model)
        if stamp != self._stamp:
            self.clear()
            self._stamp = stamp
        left, self._left = self._left, None
        if left is not None and left.serves(reader, states):
            return left.hidden
        if torch.is_grad_enabled():
            # Weights that learn are about to change, and some libraries write them through `p.data`.
            self._stored.clear()
            return self._leave(reader, states, _forward(model, states))
        cached = self._from_cache(model, states) if self.cache else None
        if cached is not None:
            return cached
        if self.share and len(states.owner) == len(states.lengths):
            return self._leave(reader, states, _forward(model, distinct_prefixes(states.ids, states.at)))
        return self._leave(reader, states, _forward(model, states))

    def _from_cache(self, model: Any, states: Prefixes) -> Tensor | None:
        """None where sharing is cheaper: a batch of prefixes of each other is one to learn from."""
        lengths = states.lengths.cpu().numpy()
        rows = np.arange(len(lengths))
        if not (np.array_equal(states.owner.cpu().numpy(), rows) and np.array_equal(states.at.cpu().numpy(), lengths)):
            return None
        ids = states.ids.cpu().numpy()
        sources = self._stored.known(ids, lengths)
        new = np.flatnonzero(sources < 0)
        if self.share and len(new):
            anew = lengths[new][distinct_rows(ids[new], lengths[new])[0]].sum()
            if 2 * int(distinct_prefixes(states.ids, states.lengths).lengths.sum()) <= anew + len(ids) - len(new):
                return None
        return self._stored.hidden(model, ids, lengths, sources)

    def _leave(self, reader: str, states: Prefixes, hidden: Tensor) -> Tensor:
        self._left = _Left("critic" if reader == "actor" else "actor", states, hidden)
        return hidden

    def __deepcopy__(self, memo: dict[int, Any]) -> _Trunk:
        return _Trunk(self.cache, self.share)

    def __reduce__(self) -> tuple[Callable[..., _Trunk], tuple[bool, bool]]:
        return _Trunk, (self.cache, self.share)


class _Left:
    """A forward that the other reader may use, once."""

    def __init__(self, reader: str, states: Prefixes, hidden: Tensor) -> None:
        self.reader, self.states, self.hidden = reader, states, hidden
        self.graph = hidden.requires_grad
        spent = self.spent = []
        if self.graph:
            # A backward that came through has freed the graph. The list, not self: a cycle would keep the graph alive.
            hidden.register_hook(lambda _: spent.append(True))

    def serves(self, reader: str, states: Prefixes) -> bool:
        if reader != self.reader or self.spent or self.graph != torch.is_grad_enabled():
            return False
        return all(a is b or torch.equal(a, b) for a, b in zip(self.states, states, strict=True))


def _forward(model: Any, states: Prefixes) -> Tensor:
    """Hidden states `[B, H]` of a plain forward of the rows."""
    width = int(states.lengths.max())
    hidden = flat_hidden(backbone(model), states.ids[:, :width])
    return hidden.index_select(0, states.owner * width + states.at - 1)
