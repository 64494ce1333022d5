"""Next-token logits and values of observation batches, at the price of the tokens that are new.

Libraries of reinforcement learning pass states as they come: right-padded ids with a mask, in any order, any subset,
with repetitions. `PrefixNetwork` answers them with the numbers of a plain forward, and pays for each token once:

- while acting (gradients off), a row that extends a row of the call before by one token costs one token;
- while learning (gradients on), a batch is forwarded as its distinct longest rows, since in a causal model those
  contain every prefix, and what these begin with alike is computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from agents.policy import ValueHeadLM
from agents.prefix_cache import PrefixCache, distinct_rows
from agents.weights import held_weights, weights_stamp
from textenv.logprobs import packed_logprobs
from textenv.models import backbone, output_head
from textenv.packing import Packing, packed_hidden


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
    or an adapter that is switched. A forward with gradients ends what acting kept, and a backward what that forward
    kept. Only after a write into `p.data` or through NumPy must `clear()` be called. A copy or pickle of the network
    keeps nothing.

    Attributes:
        policy: Whose logits and values these are.
        temperature: Of the policy's law softmax(logits / temperature).
        cache: Whether acting keeps keys and values; False forwards whole rows, and keeps nothing without gradients, as
            a target network must whose weights are written through `p.data`.
        share: Whether a batch is forwarded as its distinct longest rows, and their common beginnings once; False
            forwards each row.
    """

    def __init__(
        self, policy: ValueHeadLM, *, temperature: float = 1.0, cache: bool = True, share: bool = True
    ) -> None:
        """Read a policy.

        Args:
            policy: A value-headed language model.
            temperature: The environment's; logits are divided by it.
            cache: Whether acting keeps keys and values.
            share: Whether a batch is forwarded as its distinct longest rows, and their common beginnings once.

        Raises:
            ValueError: If `temperature` is not positive.
        """
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature!r}")
        self.policy, self.temperature = policy, temperature
        self.cache, self.share = cache, share
        self._actor = _Trunk()
        self._critic = self._actor if policy.critic_backbone is None else _Trunk()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[B, V]` and values `[B]` of right-padded rows `[B, L]`, `attention_mask` nonzero at tokens."""
        states = self.states(input_ids, attention_mask)
        return self.logits(states), self.values(states)

    def states(self, input_ids: Tensor, attention_mask: Tensor) -> Prefixes:
        """What `logits`, `values` and `logprobs` take. Call it once where several of them are asked for.

        They share a forward whenever the rows of the states are the same, be it for other prefixes of them.

        Args:
            input_ids: `[B, L]` of any numeric type, right-padded.
            attention_mask: `[B, L]`, nonzero at tokens.

        Raises:
            ValueError: If shapes differ, a row is empty, or the padding is not on the right.
        """
        if input_ids.ndim != 2 or attention_mask.shape != input_ids.shape:
            got = f"{tuple(input_ids.shape)} and {tuple(attention_mask.shape)}"
            raise ValueError(f"input_ids and attention_mask: expected the same shape [B, L], got {got}")
        inside = attention_mask != 0
        lengths = inside.sum(1)
        filled = torch.arange(inside.shape[1], device=inside.device) < lengths.clamp(min=1)[:, None]
        if not torch.equal(inside, filled):
            raise ValueError("attention_mask: expected tokens first and padding on the right, and no empty row")
        device = self.policy.device
        ids, lengths = input_ids.where(inside, 0).to(device, torch.int64), lengths.to(device)
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
        hidden = self._critic.hidden(self.policy.lm if trunk is None else trunk, states, self.cache, self.share)
        return head.denormalize(head(hidden))

    def hidden(self, states: Prefixes) -> Tensor:
        """Final hidden states `[B, H]` of the policy's trunk, for a head of your own."""
        return self._actor.hidden(self.policy.lm, states, self.cache, self.share)

    def next_logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits `[B, V]`, *not* divided by the temperature: an environment's `policy`, which divides them itself."""
        with torch.no_grad():
            return output_head(self.policy.lm)(self.hidden(self.states(input_ids, attention_mask)))

    def clear(self) -> None:
        """Forget everything that is kept; needed after weights were written through `p.data` or NumPy."""
        self._actor.clear()
        self._critic.clear()


class _Trunk:
    """Hidden states of one trunk: from the cache, from the forward that was just done, or from a new one."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._stored = PrefixCache()
        self._stamp: tuple[Any, ...] = ()
        self._held: list[Tensor] = []
        self._last: _Last | None = None

    def hidden(self, model: Any, states: Prefixes, cache: bool, share: bool) -> Tensor:
        stamp = weights_stamp(model)
        if stamp != self._stamp:
            self.clear()
            self._stamp, self._held = stamp, held_weights(model)
        learning = torch.is_grad_enabled()
        if learning:
            # Weights that learn are about to change, and some libraries write them through `p.data`.
            self._stored.clear()
        else:
            own = _are_own_rows(states)
            if own and cache and (cached := self._from_cache(model, states, share)) is not None:
                return cached
            if own and share:
                states = distinct_prefixes(states.ids, states.at)
        if self._last is None or not self._last.serves(states):
            self._last = None  # free it before the next takes its place
            last = _Last(model, states, share)
            if not (learning or cache):
                return last.at(states)  # without a cache nothing is kept between forwards without gradients
            self._last = last
        return self._last.at(states)

    def _from_cache(self, model: Any, states: Prefixes, share: bool) -> Tensor | None:
        """None where sharing is cheaper: a batch of prefixes of each other is one to learn from."""
        ids, lengths = states.ids.cpu().numpy(), states.lengths.cpu().numpy()
        sources = self._stored.known(ids, lengths)
        new = np.flatnonzero(sources < 0)
        if share and len(new):
            anew = lengths[new][distinct_rows(ids[new], lengths[new])[0]].sum()
            shared = int(distinct_prefixes(states.ids, states.lengths).lengths.sum())
            if 2 * shared <= anew + len(ids) - len(new):
                return None
        return self._stored.hidden(model, ids, lengths, sources)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Trunk:
        return _Trunk()

    def __reduce__(self) -> tuple[Callable[[], _Trunk], tuple[()]]:
        return _Trunk, ()


class _Last:
    """The last forward of whole rows: what the actor, the critic and the states one token on all read."""

    def __init__(self, model: Any, states: Prefixes, share: bool) -> None:
        self.ids, self.lengths = states.ids, states.lengths
        packing = Packing.of(states.lengths, states.ids if share else None)
        self.starts = packing.starts
        self.flat = packed_hidden(backbone(model), states.ids, packing)
        self.graph = torch.is_grad_enabled()
        spent = self.spent = []
        if self.flat.requires_grad:
            # A backward that came through has freed the graph. The list, not self: a cycle would keep the graph alive.
            self.flat.register_hook(lambda _: spent.append(True))

    def serves(self, states: Prefixes) -> bool:
        if self.spent or self.graph != torch.is_grad_enabled():
            return False
        pairs = ((self.ids, states.ids), (self.lengths, states.lengths))
        return all(a is b or torch.equal(a, b) for a, b in pairs)

    def at(self, states: Prefixes) -> Tensor:
        return self.flat.index_select(0, self.starts[states.owner] + states.at - 1)


def _are_own_rows(states: Prefixes) -> bool:
    owner, at, lengths = states.owner.cpu().numpy(), states.at.cpu().numpy(), states.lengths.cpu().numpy()
    return np.array_equal(owner, np.arange(len(lengths))) and np.array_equal(at, lengths)
