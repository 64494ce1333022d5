"""The law of a token, and Tianshou's policies over it: what is not asked for is not computed."""

from __future__ import annotations

from typing import Any, cast

import gymnasium as gym
import torch
from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy
from tianshou.data import Batch
from torch import Tensor
from torch.distributions import Categorical, Distribution
from torch.distributions.utils import lazy_property

from agents.adapters.tianshou_bridge.reader import TextActor
from agents.sampling.draw import draw


class TokenLaw(Categorical):
    """`Categorical(logits=...)` that computes nothing before it is asked for, and draws with one number per row.

    PyTorch's own normalises and validates `[B, V]` at construction and draws with `multinomial`.
    """

    def __init__(self, logits: Tensor, *, entropy_gradient: bool = True) -> None:
        """The law softmax(logits).

        Args:
            logits: `[B, n]` float32.
            entropy_gradient: Whether the entropy is differentiable; where its coefficient is 0, it need not be.
        """
        self._param, self._num_events = logits, logits.shape[-1]
        self._entropy_gradient = entropy_gradient
        Distribution.__init__(self, logits.shape[:-1], validate_args=False)

    @lazy_property
    def _normalizer(self) -> Tensor:
        return self._param.logsumexp(-1)

    @lazy_property
    def logits(self) -> Tensor:  # type: ignore[override]
        """Normalised, `[B, n]`."""
        return self._param - self._normalizer.unsqueeze(-1)

    @lazy_property
    def probs(self) -> Tensor:  # type: ignore[override]
        """`[B, n]`."""
        return self._param.softmax(-1)

    @property
    def mode(self) -> Tensor:
        """The likeliest, `[B]`."""
        return self._param.argmax(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """One draw a row, `[B]`."""
        if tuple(sample_shape):
            return super().sample(torch.Size(sample_shape))
        with torch.no_grad():
            uniforms = torch.rand(len(self._param), dtype=torch.float64, device=self._param.device)
            return draw(self._param, uniforms, 1.0)[0]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of `[B]` draws."""
        chosen = self._param.gather(-1, value.long().unsqueeze(-1)).squeeze(-1)
        return chosen - self._normalizer

    def entropy(self) -> Tensor:
        """Entropy, `[B]`."""
        logits, normalizer = self._param, self._normalizer
        if not self._entropy_gradient:
            logits, normalizer = logits.detach(), normalizer.detach()
        return normalizer - (logits.softmax(-1) * logits).sum(-1)


class TextPolicy(DiscreteActorPolicy):
    """Tianshou's `DiscreteActorPolicy`, which in updates neither draws nor, if nobody learns from it, differentiates.

    Attributes:
        entropy_gradient: Whether the entropy of the law is differentiable; False saves its backward at `ent_coef=0`.
        kl_sources: Of environments that it can learn from. The entropy bonus of PPO and its like does not complete
            β·log π_ref to the KL: with it, measured, responses shrink to one or two tokens.
    """

    kl_sources = ("agent", "policy")

    def __init__(self, actor: TextActor, action_space: gym.Space, *, entropy_gradient: bool = True) -> None:
        """Act by an actor's logits; outside of training the likeliest token is *not* preferred: π is what is judged."""
        super().__init__(actor=actor, action_space=action_space, dist_fn=self._law)
        self.entropy_gradient = entropy_gradient

    def forward(self, batch: Any, state: Any = None, **kwargs: Any) -> Any:
        """`logits`, `dist` and `act` of a batch; in an update `act` is what was done, not drawn again.

        Raises:
            ValueError: If it acts for a trainer and nobody charges the KL.
        """
        store = cast(TextActor, self.actor).reader.store
        if self.is_within_training_step and not self.training and store.owes_kl:
            raise ValueError(
                "collector: expected one of make_collector, which charges the KL under kl_source='agent', got one "
                "that does not"
            )
        if not self.training or "act" not in batch:
            return super().forward(batch, state)
        logits, hidden = self.actor(batch.obs, state=state, info=batch.info)
        acted = torch.as_tensor(batch.act, device=logits.device)
        return Batch(logits=logits, act=acted, state=hidden, dist=self._law(logits))

    def _law(self, logits: Tensor) -> TokenLaw:
        return TokenLaw(logits, entropy_gradient=self.entropy_gradient)
