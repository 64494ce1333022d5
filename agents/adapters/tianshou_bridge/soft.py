"""Maximum-entropy algorithms on text: DQN as soft Q-learning, and discrete SAC with α = β.

The environment pays r_t = score part + β·log π_ref(a_t|s_t) (`kl_source="reference"`), which no change of π makes
stale, and the algorithm's own entropy, at temperature β, makes it −β·KL(π‖π_ref) (Levine 2018, arXiv 1805.00909):

    Q(s, a) = r + V(s'),    V(s) = β·log Σ_a exp(Q(s, a)/β),    π(a|s) = exp((Q(s, a) − V(s))/β).

A language model with a value head is such a Q: `Q(s, a) = V_θ(s) + β·log π_θ(a|s)`. It starts at the reference's law.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from tianshou.algorithm.modelfree.discrete_sac import DiscreteSAC, DiscreteSACPolicy
from tianshou.algorithm.modelfree.dqn import DQN, DiscreteQLearningPolicy
from tianshou.data import Batch
from torch import Tensor, nn

from agents.adapters.tianshou_bridge.env import TextBatchEnv
from agents.adapters.tianshou_bridge.policy import TokenLaw
from agents.adapters.tianshou_bridge.reader import StateReader, TextActor, TextCritic
from textenv.kl import FixedKL


class SoftQ(nn.Module):
    """Q(s, a) = V_θ(s) + β·log π_θ(a|s) over the candidates, or over all tokens where there are none.

    log π_θ is normalised over what may be chosen, so β·logsumexp(Q/β) = V_θ and the Boltzmann law of Q is π_θ.
    """

    def __init__(self, reader: StateReader, kl_coef: float, critic: TextCritic | None = None) -> None:
        """Read Q from a language model.

        Args:
            reader: Of the policy that is Q.
            kl_coef: β > 0.
            critic: Values of the same reader, if the value scale is to be set from returns; None: a plain one.
        """
        super().__init__()
        self.actor = TextActor(reader)
        self.critic = critic if critic is not None else TextCritic(reader)
        self.kl_coef = kl_coef

    def advantages(self, obs: Any) -> Tensor:
        """β·log π(a|s) = Q − V, `[B, n]`; what acting needs."""
        return self.kl_coef * self.actor(obs)[0].log_softmax(-1)

    def q(self, obs: Any) -> Tensor:
        """Q, `[B, n]`."""
        advantages = self.advantages(obs)
        return self.critic(obs) + advantages


class SoftQModel(SoftQ):
    """`SoftQ` in the form of a model of Tianshou's Q-learning policies."""

    def forward(self, obs: Any, state: Any = None, info: Any = None) -> tuple[Tensor, Any]:
        """Q `[B, n]`, and the hidden state as it came."""
        return self.q(obs), state


class SoftQCritic(SoftQ):
    """`SoftQ` in the form of a critic of Tianshou's discrete SAC."""

    def forward(self, obs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Q `[B, n]`."""
        return self.q(obs)


class SoftQPolicy(DiscreteQLearningPolicy):
    """Draws from the Boltzmann law of Q at temperature β, where Tianshou's takes the maximum."""

    kl_sources = ("reference",)

    def __init__(self, model: SoftQModel, action_space: gym.Space) -> None:
        """Act by `model`."""
        super().__init__(model=model, action_space=action_space)

    def forward(self, batch: Any, state: Any = None, model: Any = None) -> Any:
        """`logits` are Q (Q − V while acting), `dist` is the law, `act` a draw; in an update what was done."""
        if not self.training and model is None:
            q, hidden = self.model.advantages(batch.obs), state
        else:
            q, hidden = (self.model if model is None else model)(batch.obs, state=state, info=batch.info)
        law = TokenLaw(q / self.model.kl_coef)
        act = torch.as_tensor(batch.act) if self.training and "act" in batch else law.sample()
        return Batch(logits=q, act=act, state=hidden, dist=law)


class _SoftReturns:
    """n-step returns in which every step but the first also earns its entropy, −β·log π(a|s).

    G_t = r_t + Σ_{0<i<n} (r_{t+i} − β·log π(a_{t+i}|s_{t+i})) + V(s_{t+n})

    At the optimum this equals Q(s_t, a_t) whatever the actions were (path consistency: Nachum et al. 2017, arXiv
    1702.08892, eq. 14), so old episodes may be learnt from. Tianshou's own n-step returns have no entropy in them; with
    rewards that hold β·log π_ref they would charge each token its surprise under the reference.
    """

    def _entropy_costs(self, batch: Any) -> Tensor:
        """β·log π(a|s) `[B]` of recorded transitions."""
        raise NotImplementedError

    def _preprocess_batch(self, batch: Any, buffer: Any, indices: np.ndarray) -> Any:
        inherited: Any = super()
        for pair in self._lagged_networks._lagged_network_pairs:  # type: ignore[attr-defined]
            # The value scale is a buffer, and Tianshou's targets follow parameters only. It is set before the first
            # step, when target and source are still equal.
            if pair.source.critic.rescale():
                pair.target.load_state_dict(pair.source.state_dict())
        return inherited._preprocess_batch(batch, buffer, indices)

    def compute_nstep_return(  # type: ignore[override]
        self, batch: Any, buffer: Any, indices: np.ndarray, target_q_fn: Any, gamma: float = 1.0, n_step: int = 1
    ) -> Any:
        inherited: Any = super()
        if n_step == 1:
            return inherited.compute_nstep_return(batch, buffer, indices, target_q_fn, gamma, n_step)
        reached, step = [indices], indices
        for _ in range(n_step - 1):
            step = buffer.next(step)
            reached.append(step)
        passed = np.unique(np.concatenate(reached))
        with torch.no_grad():
            costs = self._entropy_costs(Batch(obs=buffer.obs[passed], act=buffer.act[passed], info=Batch()))
        spread = np.zeros(len(buffer.rew))
        spread[passed] = costs.cpu().numpy()
        charged = _Charged(buffer, buffer.rew - spread)
        result = inherited.compute_nstep_return(
            batch, charged, indices, lambda _, last: target_q_fn(buffer, last), gamma, n_step
        )
        result.returns = result.returns + torch.as_tensor(spread[indices]).to(result.returns)[:, None]
        return result


class _Charged:
    """A buffer with other rewards."""

    def __init__(self, buffer: Any, rewards: np.ndarray) -> None:
        self._buffer, self.rew = buffer, rewards

    def __getattr__(self, name: str) -> Any:
        return getattr(self._buffer, name)


def _values_of_successors(buffer: Any, indices: np.ndarray, value: Any, like: Tensor) -> Tensor:
    """V(s') `[B]`, 0 after a termination, where there is nothing to choose from."""
    values = torch.zeros(len(indices), device=like.device)
    alive = np.flatnonzero(~np.asarray(buffer.terminated[indices], dtype=bool))
    if len(alive):
        batch = Batch(obs=np.asarray(buffer[indices[alive]].obs_next), info=Batch())
        values[torch.as_tensor(alive, device=like.device)] = value(batch).float()
    return values


class SoftDQN(_SoftReturns, DQN):
    """Tianshou's DQN with the soft value V = β·logsumexp(Q/β) where it takes a maximum."""

    policy: SoftQPolicy

    def __init__(self, **options: Any) -> None:
        """Tianshou's own arguments, but for `gamma`, which is 1, and `is_double`, which a soft maximum has no use for.

        Raises:
            ValueError: If another discount is asked for.
        """
        _discount(options)
        super().__init__(**options, is_double=False)

    def _q(self, batch: Any) -> Tensor:
        model = self.model_old if self.use_target_network else self.policy.model
        return self.policy(batch, model=model).logits

    def _target_q(self, buffer: Any, indices: np.ndarray) -> Tensor:
        beta = self.policy.model.kl_coef
        like = next(self.policy.parameters())
        return _values_of_successors(buffer, indices, lambda b: beta * (self._q(b) / beta).logsumexp(-1), like)

    def _entropy_costs(self, batch: Any) -> Tensor:
        q, beta = self._q(batch), self.policy.model.kl_coef
        acted = torch.as_tensor(batch.act, device=q.device).long()[:, None]
        return q.gather(1, acted)[:, 0] - beta * (q / beta).logsumexp(-1)


class SoftSACPolicy(DiscreteSACPolicy):
    """Tianshou's, drawing from π outside of training too: π is what is judged, not its likeliest tokens."""

    kl_sources = ("reference",)

    def __init__(self, actor: TextActor, action_space: gym.Space) -> None:
        """Act by an actor's logits."""
        super().__init__(actor=actor, action_space=action_space, deterministic_eval=False)

    def forward(self, batch: Any, state: Any = None, **kwargs: Any) -> Any:
        """`logits`, `dist` and `act` of a batch; in an update `act` is what was done."""
        logits, hidden = self.actor(batch.obs, state=state, info=batch.info)
        law = TokenLaw(logits)
        act = torch.as_tensor(batch.act) if self.training and "act" in batch else law.sample()
        return Batch(logits=logits, act=act, state=hidden, dist=law)


class SoftSAC(_SoftReturns, DiscreteSAC):
    """Tianshou's discrete SAC with α = β and n-step returns that hold the entropies on the way."""

    policy: SoftSACPolicy

    def __init__(self, *, kl_coef: float, **options: Any) -> None:
        """Tianshou's own arguments, but for `gamma`, which is 1, and `alpha`, which is `kl_coef`.

        Raises:
            ValueError: If another discount or α is asked for.
        """
        _discount(options)
        if options.setdefault("alpha", float(kl_coef)) != kl_coef:
            raise ValueError(f"alpha: expected β = {kl_coef}, got {options['alpha']!r}")
        super().__init__(**options)

    def _target_q(self, buffer: Any, indices: np.ndarray) -> Tensor:
        like = next(self.policy.parameters())
        return _values_of_successors(
            buffer, indices, lambda b: self._target_q_compute_value(b, self._target_q_compute_action(b)), like
        )

    def _entropy_costs(self, batch: Any) -> Tensor:
        law = self.policy(batch).dist
        return self.alpha.value * law.log_prob(torch.as_tensor(batch.act, device=law.logits.device))


def _discount(options: dict[str, Any]) -> None:
    if options.setdefault("gamma", 1.0) != 1.0:
        raise ValueError(f"gamma: expected 1, for the KL is not discounted, got {options['gamma']!r}")


def fixed_kl_coef(venv: TextBatchEnv) -> float:
    """The β that soft Q and SAC take as their temperature.

    Raises:
        ValueError: If the environment does not pay β·log π_ref, or β is 0 or moves, so that replayed rewards would be
            in another β's money.
    """
    task = venv.task
    if task.kl_source != "reference":
        raise ValueError(f"kl_source: expected 'reference' for a maximum-entropy algorithm, got {task.kl_source!r}")
    if not isinstance(task.controller, FixedKL) or not task.kl_coef > 0:
        raise ValueError(f"kl_coef: expected a fixed β > 0 for a maximum-entropy algorithm, got {task.controller!r}")
    return task.kl_coef
