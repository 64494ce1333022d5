"""Logits and values of states given by handle, as Tianshou's actor and critic, with one forward where it asks twice."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from tianshou.utils.net.common import AbstractDiscreteActor, ModuleWithVectorOutput
from torch import Tensor, nn

from agents.adapters.tianshou_bridge.collect import KLCharge
from agents.adapters.tianshou_bridge.token_store import TokenStore
from agents.prefix import Prefixes, PrefixNetwork
from agents.slots import scale_gradient
from agents.value_scale import first_value_scale, update_value_scale


class StateReader:
    """Logits and values of states given by handle, each forward done once.

    Tianshou acts with gradients on, asks for the values of `obs` and of `obs_next`, then for the old log-probs, and in
    each minibatch for logits and values in turn. The reader acts without gradients, on the key/value cache; it hands
    over whole episodes before an update, so that one forward serves all three; and the same rows to actor and critic
    in a minibatch. Some algorithms (NPG, target networks) write weights through `p.data`, which leaves no trace: so it
    looks at the weights before it reads without gradients.

    Attributes:
        network: What reads.
        store: Whose handles these are.
        copied: Whether it reads a copy of the policy, such as a target network, whose weights others write.
    """

    def __init__(self, network: PrefixNetwork, store: TokenStore, *, copied: bool = False) -> None:
        """Read a policy's states.

        Args:
            network: Over the policy.
            store: Of the environment.
            copied: Whether the policy is a copy whose weights are written behind autograd's back.
        """
        self.network, self.store, self.copied = network, store, copied
        self._asked: tuple[np.ndarray, bool, Prefixes] | None = None
        self._learning = False
        self._stamp: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> StateReader:
        """Of a copy of the network and the same store."""
        return StateReader(copy.deepcopy(self.network, memo), self.store, copied=True)

    def logits(self, handles: Any, *, acting: bool) -> Tensor:
        """Next-token logits `[B, V]`, divided by the temperature."""
        return self._read("logits", handles, acting)

    def values(self, handles: Any, *, acting: bool) -> Tensor:
        """Values `[B]` float32, in reward units."""
        return self._read("values", handles, acting)

    def candidates(self, handles: Any, device: torch.device) -> Tensor:
        """The tokens to choose from, `[B, k]`."""
        return self.store.candidates(_array(handles), device)

    def forget(self) -> None:
        """Drop everything that was read."""
        self._asked = self._stamp = None
        self.network.clear()

    def _read(self, what: str, handles: Any, acting: bool) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not acting):
            if acting and not self.copied:
                if self._learning:
                    self.forget()
                self._learning = False
            else:
                self._learning = True
                if not torch.is_grad_enabled():
                    self._look()
            states = self._states(_array(handles), whole=not (acting or torch.is_grad_enabled()))
            return self.network.logits(states) if what == "logits" else self.network.values(states)

    def _look(self) -> None:
        """Forget if the weights have changed."""
        stamp = fingerprint(self.network.policy)
        if self._stamp is None or not torch.equal(stamp, self._stamp):
            self.forget()
            self._stamp = stamp

    def _states(self, handles: np.ndarray, whole: bool) -> Prefixes:
        """The same object for the same handles, so that actor and critic share a forward."""
        if self._asked is not None and self._asked[0] is handles and self._asked[1] == whole:
            return self._asked[2]
        states = self.store.states(handles, self.network.policy.device, whole=whole)
        if not self.network.share:
            ids = states.ids.index_select(0, states.owner)
            inside = torch.arange(ids.shape[1], device=ids.device) < states.at[:, None]
            states = self.network.states(ids, inside)
        self._asked = (handles, whole, states)
        return states


@torch.no_grad()
def fingerprint(module: nn.Module) -> Tensor:
    """A norm per tensor: differs when weights were written, also through `p.data`, which leaves no other trace."""
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
    norms = torch._foreach_norm(tensors)  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack([norm.double() for norm in norms])


def _array(handles: Any) -> np.ndarray:
    return handles.cpu().numpy() if isinstance(handles, Tensor) else handles


class TextActor(AbstractDiscreteActor):
    """Logits of the next token, or of the candidates where there are any, from the language model.

    Its parameters are those of the language model that learn, and no others: natural gradients are taken in them.
    """

    def __init__(self, reader: StateReader) -> None:
        """Act by what `reader` reads."""
        super().__init__(reader.store.candidate_count or reader.store.vocab_size)
        self.reader = reader
        self.lm = reader.network.policy.lm

    def forward(self, obs: Any, state: Any = None, info: Any = None) -> tuple[Tensor, Any]:
        """Logits `[B, n]` of the actions in the states of handles `[B, 2]`."""
        logits = self.reader.logits(obs, acting=not self.training)
        if self.reader.store.candidate_count:
            logits = logits.gather(1, self.reader.candidates(obs, logits.device))
        return logits, state

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Those that learn: with LoRA, Tianshou's flat gradients would fail on the others."""
        return ((name, p) for name, p in super().named_parameters(*args, **kwargs) if p.requires_grad)

    def get_preprocess_net(self) -> ModuleWithVectorOutput:
        """None apart from the model itself."""
        return cast(ModuleWithVectorOutput, nn.Identity())


class TextCritic(nn.Module):
    """Values in reward units, whose gradient does not depend on that unit.

    V = σ·u + μ with μ and σ the running moments of the returns, as the native agent has it (`agents.value_scale`). A
    squared error of V is σ² times that of u; the gradient of V is divided by σ², so `vf_coef=0.5` weighs the value term
    as the native `value_coef=1.0` does, whatever the rewards' scale. The numbers themselves are untouched.

    Its parameters are the value head and a separate trunk; a shared trunk belongs to the actor.
    """

    def __init__(
        self, reader: StateReader, charge: KLCharge | None = None, *, gamma: float = 1.0, decay: float | None = 0.9
    ) -> None:
        """Judge what `reader` reads.

        Args:
            reader: The actor's, so that they share forwards.
            charge: Knows the rewards collected, whose returns set μ and σ before each update; None: they stay.
            gamma: Discount of those returns.
            decay: Memory of μ and σ, per collection; None: the first collection sets them for good.
        """
        super().__init__()
        policy = reader.network.policy
        self.reader, self.gamma, self.decay = reader, gamma, decay
        self.value_head, self.critic_backbone = policy.value_head, policy.critic_backbone
        self._charge, self._seen = charge, 0

    def learn_scale_from(self, charge: KLCharge) -> None:
        """Take the rewards from there."""
        self._charge = charge

    def forward(self, obs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Values `[B, 1]` of the states of handles `[B, 2]`."""
        acting = not self.training
        if not acting:
            self.rescale()
        values = self.reader.values(obs, acting=acting)
        if values.requires_grad:
            values = scale_gradient(values, 1.0 / float(self.value_head.value_std) ** 2)
        return values[:, None]

    def rescale(self) -> bool:
        """Once a collection, take the moments of its returns; whether they were taken now."""
        charge = self._charge
        if charge is None or charge.collections == self._seen or not charge.rewards:
            return False
        self._seen = charge.collections
        head = self.value_head
        returns = [_returns(rewards, self.gamma) for rewards in charge.rewards]
        packed = torch.as_tensor(np.concatenate(returns), dtype=torch.float32)[None]
        mask = torch.ones_like(packed, dtype=torch.bool)
        if head.value_count == 0:
            first_value_scale(head, packed, mask)
            return True
        if self.decay is not None:
            update_value_scale(head, packed, mask, self.decay)
        return self.decay is not None


def _returns(rewards: np.ndarray, gamma: float) -> np.ndarray:
    returns, following = np.empty_like(rewards), 0.0
    for t in reversed(range(len(rewards))):
        returns[t] = following = rewards[t] + gamma * following
    return returns
