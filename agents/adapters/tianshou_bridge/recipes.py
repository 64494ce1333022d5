"""Tianshou's algorithms on text, put together: from a policy and an environment to a trained policy."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from tianshou.algorithm.algorithm_base import Algorithm
from tianshou.algorithm.modelfree.a2c import A2C
from tianshou.algorithm.modelfree.npg import NPG
from tianshou.algorithm.modelfree.ppo import PPO
from tianshou.algorithm.modelfree.reinforce import Reinforce
from tianshou.algorithm.modelfree.trpo import TRPO
from tianshou.data import Collector
from torch import nn

import agents.adapters.tianshou_bridge.episodes as by_episode
from agents.adapters.checks import check_learner
from agents.adapters.tianshou_bridge.collect import KLCharge, TextCollectStats, charge_of, make_collector
from agents.adapters.tianshou_bridge.env import TextBatchEnv
from agents.adapters.tianshou_bridge.optim import AdamFactory
from agents.adapters.tianshou_bridge.policy import TextPolicy
from agents.adapters.tianshou_bridge.reader import StateReader, TextActor, TextCritic
from agents.adapters.tianshou_bridge.soft import (
    SoftDQN,
    SoftQCritic,
    SoftQModel,
    SoftQPolicy,
    SoftSAC,
    SoftSACPolicy,
    fixed_kl_coef,
)
from agents.policy import ValueHeadLM
from agents.prefix import PrefixNetwork
from textenv.models import unwrap

ALGORITHMS = ("ppo", "a2c", "reinforce", "npg", "trpo", "dqn", "sac")
_CLASSES: dict[str, tuple[Any, Any]] = {
    "ppo": (PPO, by_episode.EpisodePPO),
    "a2c": (A2C, by_episode.EpisodeA2C),
    "reinforce": (Reinforce, by_episode.EpisodeReinforce),
    "npg": (NPG, by_episode.EpisodeNPG),
    "trpo": (TRPO, by_episode.EpisodeTRPO),
}


@dataclass(frozen=True)
class TianshouConfig:
    """Settings of `make_algorithm` and `train`; an algorithm reads those that it has.

    An iteration is one collection and what is learnt from it. Everything about the task is the environment's.

    Raises:
        ValueError: For a count or a rate that is none.
    """

    iterations: int = 60
    """Iterations of `train`, over which the learning rate falls."""
    episodes: int = 64
    """Episodes of a collection."""
    epochs: int = 2
    """On-policy: passes over each collection."""
    minibatches: int = 4
    """On-policy: optimizer steps of a pass."""
    by_episode: bool = True
    """Whether minibatches are whole episodes; False: Tianshou's shuffled transitions."""
    learning_rate: float = 2e-4
    """Adam's step size."""
    linear_schedule: bool = True
    """Whether it falls to 0 over the iterations."""
    adam_eps: float = 1e-5
    """Adam's ε."""
    max_grad_norm: float | None = 1.0
    """Bound of the gradient's norm, of actor and critic apart; None: none."""
    gamma: float = 1.0
    """Discount; 1 for soft Q and SAC."""
    gae_lambda: float = 0.98
    """λ of the advantages."""
    normalize_advantages: bool = True
    """Advantages (REINFORCE: returns, by running moments) to mean 0 and variance 1."""
    clip_eps: float = 0.2
    """PPO: half-width of the trust region of the ratio."""
    value_coef: float = 0.5
    """PPO, A2C: weight of the squared value error, in units of the returns' variance."""
    entropy_coef: float = 0.0
    """PPO, A2C: weight of the entropy bonus."""
    trust_region_size: float = 0.1
    """NPG: length of the step along the natural gradient."""
    max_kl: float = 0.005
    """TRPO: bound of KL(π_old‖π) per token of a step."""
    critic_iterations: int = 5
    """NPG, TRPO: steps of the critic in each minibatch."""
    buffer_episodes: int = 512
    """Off-policy: episodes that the replay buffer holds."""
    gradient_steps: int = 16
    """Off-policy: optimizer steps of an iteration."""
    batch_episodes: int = 16
    """Off-policy: episodes of a batch; without `by_episode`, as many transitions as they have at most."""
    n_step: int | None = None
    """Off-policy: steps of a return before it trusts V; None: to the end of the response."""
    target_update_freq: int = 16
    """DQN: optimizer steps between copies to the target network; 0: no target network."""
    tau: float = 0.05
    """SAC: share by which the target critics follow at each optimizer step."""
    max_batchsize: int = 1 << 20
    """Transitions of one forward before an update."""
    cache: bool = True
    """Whether acting keeps keys and values (`PrefixNetwork`)."""
    share: bool = True
    """Whether a batch is forwarded as its distinct episodes (`PrefixNetwork`)."""
    seed: int = 0
    """Of NumPy's and PyTorch's global generators, which Tianshou draws from, and of the environment."""

    def __post_init__(self) -> None:
        """Check counts and rates."""
        counts = ("iterations", "episodes", "epochs", "minibatches", "critic_iterations", "buffer_episodes")
        for name in (*counts, "gradient_steps", "batch_episodes", "max_batchsize"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
        if self.n_step is not None and (not isinstance(self.n_step, int) or self.n_step < 1):
            raise ValueError(f"n_step: expected an integer >= 1 or None, got {self.n_step!r}")
        for name in ("learning_rate", "adam_eps", "clip_eps", "value_coef", "trust_region_size", "max_kl"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a finite number >= 0, got {getattr(self, name)!r}")


DEFAULTS: dict[str, TianshouConfig] = {
    "ppo": TianshouConfig(),
    "a2c": TianshouConfig(epochs=1, learning_rate=4e-4),
    "reinforce": TianshouConfig(epochs=1, learning_rate=3e-4),
    "npg": TianshouConfig(epochs=1, minibatches=1, learning_rate=1e-3),
    "trpo": TianshouConfig(epochs=1, minibatches=1, learning_rate=1e-3),
    "dqn": TianshouConfig(learning_rate=3e-4),
    "sac": TianshouConfig(learning_rate=3e-4),
}
"""Settings that learn, by algorithm; change them with `dataclasses.replace`."""


class Setup(NamedTuple):
    """An algorithm, and what it learns from."""

    name: str
    """Of `ALGORITHMS`."""
    algorithm: Algorithm[Any, Any]
    """Tianshou's, or a subclass."""
    collector: Collector[TextCollectStats]
    """Tianshou's."""
    config: TianshouConfig
    """As given."""

    @property
    def venv(self) -> TextBatchEnv:
        """The environment."""
        env = self.collector.env
        assert isinstance(env, TextBatchEnv)
        return env


def make_algorithm(name: str, policy: ValueHeadLM, envs: Any, config: TianshouConfig | None = None) -> Setup:
    """Put one of Tianshou's algorithms on a policy and an environment.

    Args:
        name: One of `ALGORITHMS`.
        policy: What learns. For `dqn` it is Q; for `sac` the actor, of which the critics are copies.
        envs: A `TextBatchEnv`, or a Gymnasium vector environment with `autoreset_mode="Disabled"`.
        config: Settings; None: `DEFAULTS[name]`.

    Raises:
        ValueError: For an unknown name, a policy of another vocabulary, a `kl_source` that the algorithm cannot
            learn under, or attention that NPG and TRPO cannot differentiate twice.
    """
    if name not in ALGORITHMS:
        raise ValueError(f"name: expected one of {', '.join(ALGORITHMS)}, got {name!r}")
    config = config if config is not None else DEFAULTS[name]
    venv = envs if isinstance(envs, TextBatchEnv) else TextBatchEnv(envs)
    check_learner(policy, venv.task)
    if name in ("npg", "trpo") and not uses_eager_attention(policy):
        raise ValueError(
            f"policy: expected eager attention for {name}, whose Fisher-vector products are second derivatives; "
            "call use_eager_attention(policy) first"
        )
    reader = StateReader(_network(policy, venv, config), venv.store)
    if name in ("dqn", "sac"):
        algorithm, collector = _off_policy(name, reader, venv, config)
    else:
        algorithm, collector = _on_policy(name, reader, venv, config)
    return Setup(name, algorithm, collector, config)


def _network(policy: ValueHeadLM, venv: TextBatchEnv, config: TianshouConfig) -> PrefixNetwork:
    temperature = float(venv.task.options.temperature)
    return PrefixNetwork(policy, temperature=temperature, cache=config.cache, share=config.share)


def _on_policy(name: str, reader: StateReader, venv: TextBatchEnv, config: TianshouConfig) -> tuple[Any, Any]:
    learns_entropy = name in ("ppo", "a2c") and config.entropy_coef != 0
    actor = TextActor(reader)
    policy = TextPolicy(actor, venv.envs.single_action_space, entropy_gradient=learns_entropy)
    steps = venv.task.options.max_new_tokens
    # Room for what a row may collect while others are slow.
    collector = make_collector(policy, venv, size=max(config.episodes, len(venv)) * steps * 2)
    common: dict[str, Any] = {"policy": policy, "optim": _adam(config, config.iterations), "gamma": config.gamma}
    chosen = _CLASSES[name][config.by_episode]
    if name == "reinforce":
        return chosen(**common, return_standardization=config.normalize_advantages), collector
    critic = TextCritic(reader, charge_of(collector), gamma=config.gamma)
    common |= {"critic": critic, "gae_lambda": config.gae_lambda, "max_batchsize": config.max_batchsize}
    if name in ("npg", "trpo"):
        common |= {
            "optim_critic_iters": config.critic_iterations,
            "advantage_normalization": config.normalize_advantages,
        }
        special = {"max_kl": config.max_kl} if name == "trpo" else {"trust_region_size": config.trust_region_size}
        return chosen(**common, **special), collector
    common |= {"vf_coef": config.value_coef, "ent_coef": config.entropy_coef}
    if name == "ppo":
        common |= {"eps_clip": config.clip_eps, "advantage_normalization": config.normalize_advantages}
    return chosen(**common), collector


def _off_policy(name: str, reader: StateReader, venv: TextBatchEnv, config: TianshouConfig) -> tuple[Any, Any]:
    beta = fixed_kl_coef(venv)
    space, horizon = venv.envs.single_action_space, venv.task.options.max_new_tokens
    optim = _adam(config, config.iterations * config.gradient_steps)
    common: dict[str, Any] = {"gamma": config.gamma, "n_step_return_horizon": config.n_step or horizon}
    if name == "dqn":
        # Target networks have the value scale of the start; it is set once, while both still agree.
        critic = TextCritic(reader, gamma=config.gamma, decay=None)
        policy: Any = SoftQPolicy(SoftQModel(reader, beta, critic), space)
    else:
        policy = SoftSACPolicy(TextActor(reader), space)
    collector = make_collector(policy, venv, _replay(venv, config))
    charge = charge_of(collector)
    if name == "dqn":
        policy.model.critic.learn_scale_from(charge)
        algorithm = SoftDQN(policy=policy, optim=optim, target_update_freq=config.target_update_freq, **common)
        return algorithm, collector
    critics = [_sac_critic(reader, venv, config, beta, charge) for _ in range(2)]
    algorithm = SoftSAC(
        policy=policy,
        policy_optim=optim,
        critic=critics[0],
        critic_optim=optim,
        critic2=critics[1],
        tau=config.tau,
        kl_coef=beta,
        **common,
    )
    return algorithm, collector


def _replay(venv: TextBatchEnv, config: TianshouConfig) -> Any:
    size = max(config.buffer_episodes, len(venv)) * venv.task.options.max_new_tokens
    kind = by_episode.EpisodeReplayBuffer if config.by_episode else by_episode.VectorReplayBuffer
    return kind(size, len(venv))


def _sac_critic(
    reader: StateReader, venv: TextBatchEnv, config: TianshouConfig, beta: float, charge: KLCharge
) -> SoftQCritic:
    """A Q of its own, grown from a copy of the policy; the heads differ, or the smaller of two would be either."""
    policy = copy.deepcopy(reader.network.policy)
    own = StateReader(_network(policy, venv, config), venv.store)
    nn.init.normal_(policy.value_head.linear.weight, std=0.1 / math.sqrt(policy.value_head.linear.in_features))
    return SoftQCritic(own, beta, TextCritic(own, charge, gamma=config.gamma, decay=None))


def _adam(config: TianshouConfig, updates: int) -> AdamFactory:
    return AdamFactory(
        config.learning_rate,
        eps=config.adam_eps,
        max_grad_norm=config.max_grad_norm,
        updates=updates if config.linear_schedule else None,
    )


def uses_eager_attention(policy: ValueHeadLM) -> bool:
    """Whether the policy's attention can be differentiated twice: fused kernels have no second derivative."""
    return unwrap(policy.lm).config._attn_implementation == "eager"


def use_eager_attention(policy: ValueHeadLM) -> None:
    """Switch the policy's attention to plain matrix products, as NPG and TRPO need it; a separate critic keeps its own.

    Numbers change in the last digits only.
    """
    policy.lm.set_attn_implementation("eager")
