"""A pretrained language model as the policy of stable-baselines3: its own head, one trunk, no fresh layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gymnasium import spaces
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor

from agents.critic import Critic
from agents.policy import ValueHeadLM
from agents.prefix import PrefixNetwork
from agents.value_head import ValueHead
from textenv.models import unwrap


class LivePolicy:
    """A `ValueHeadLM` among the settings of a model of stable-baselines3.

    That library writes the settings into its file beside the weights. So a pickle of this holds what the policy is made
    of and none of its weights, which the file has once already; unpickled, it is a fresh policy of the same shape, and
    `load` fills it.

    Attributes:
        policy: What learns.
    """

    def __init__(self, policy: ValueHeadLM) -> None:
        """Hold a live policy."""
        self.policy = policy

    def __deepcopy__(self, memo: dict[int, Any]) -> LivePolicy:
        """The handle itself: there is one policy."""
        return self

    def __reduce__(self) -> tuple[Callable[..., LivePolicy], tuple[Any, ...]]:
        """Classes, configurations and types; no weights."""
        policy = self.policy
        base: Any = unwrap(policy.lm)
        peft_config = None if base is policy.lm else policy.lm.peft_config
        trunk: Any = policy.critic_backbone
        critic = None if trunk is None else (type(trunk), trunk.config, trunk.dtype)
        frozen = [name for name, parameter in policy.named_parameters() if not parameter.requires_grad]
        lm, size = (type(base), base.config, base.dtype), policy.value_head.linear.in_features
        return _fresh_policy, (lm, peft_config, policy.critic_kind, critic, size, frozen)


def _fresh_policy(
    lm: tuple[Any, Any, torch.dtype],
    peft_config: dict[str, Any] | None,
    critic_kind: str,
    trunk: tuple[Any, Any, torch.dtype] | None,
    size: int,
    frozen: list[str],
) -> LivePolicy:
    """What a pickled `LivePolicy` becomes: the same shape, random weights."""
    model = _fresh_model(*lm)
    if peft_config is not None:
        from peft import get_peft_model

        (name, first), *others = peft_config.items()
        model = get_peft_model(model, first, adapter_name=name)
        for name, config in others:
            model.add_adapter(name, config)
    critic = Critic(critic_kind, ValueHead(size), None if trunk is None else _fresh_model(*trunk))
    policy = ValueHeadLM(model, critic).train()
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return LivePolicy(policy)


def _fresh_model(kind: Any, config: Any, dtype: torch.dtype) -> Any:
    # Not `kind(config).to(dtype)`, which would round the frequencies of rotary positions too.
    with torch.random.fork_rng(devices=[]):
        return kind._from_config(config, dtype=dtype)


class _LanguageModelPolicy:
    """What both policies below share: everything reads the `PrefixNetwork`, and no layer is added to it.

    Attributes:
        network: Actor and critic.
        owes_kl: Whether rewards lack the KL until a callback has charged it, `kl_source="agent"`.
    """

    network: PrefixNetwork
    owes_kl: bool
    training: bool
    action_dist: Any
    optimizer: torch.optim.Optimizer
    optimizer_kwargs: dict[str, Any]

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Callable[[float], float],
        lm: LivePolicy,
        temperature: float = 1.0,
        cache: bool = True,
        share: bool = True,
        owes_kl: bool = False,
        use_sde: bool = False,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Make actor and critic of a live policy.

        Args:
            observation_space: The environment's.
            action_space: The environment's.
            lr_schedule: Learning rate from what remains of the run, 1 to 0.
            lm: What learns.
            temperature: The environment's.
            cache: As in `PrefixNetwork`.
            share: As in `PrefixNetwork`.
            owes_kl: Raise instead of collecting rewards that `TextCallback` has not charged exactly once.
            use_sde: False, which the library demands of actions that are no numbers.
            optimizer_class: Of the parameters that learn.
            optimizer_kwargs: Its arguments but for the learning rate; None: ε of 1e-5 for Adam.

        Raises:
            ValueError: If the policy's vocabulary is not the action space.
        """
        check_vocabulary(lm, action_space)
        super().__init__(
            observation_space,  # type: ignore[call-arg]  # of the class mixed in
            action_space,
            lr_schedule,
            net_arch=[],
            ortho_init=False,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )
        # The handle is kept in a list, where torch does not look for modules: its weights are the network's already.
        self._handle = [lm]
        self.network = PrefixNetwork(lm.policy, temperature=temperature, cache=cache, share=share)
        self.owes_kl, self._owed = owes_kl, False
        learning = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.optimizer = optimizer_class(learning, lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def _build(self, lr_schedule: Any) -> None:
        """Nothing: actor and critic exist."""

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()  # type: ignore[misc]
        keep = ("observation_space", "action_space", "lr_schedule", "optimizer_class", "optimizer_kwargs")
        network = self.network
        own = {"temperature": network.temperature, "cache": network.cache, "share": network.share}
        own["owes_kl"] = self.owes_kl
        return {key: data[key] for key in keep} | {"lm": self._handle[0]} | own

    def _law(self, logits: Tensor, action_masks: Any) -> Any:
        """π(·|s), renormalised over the allowed actions."""
        distribution = self.action_dist.proba_distribution(action_logits=logits)
        if action_masks is not None:
            distribution.apply_masking(action_masks)
        return distribution

    def _read(self, obs: Any) -> Any:
        # Buffers of stable-baselines3 may have made floats of the ids; they are exact below 2²⁴.
        return self.network.states(obs["input_ids"].long(), obs["attention_mask"])

    def begin_rollout(self) -> None:
        """Owe nothing: what was drawn before, somebody has drawn by hand."""
        self._owed = False

    def settle(self) -> None:
        """Take note that the KL of the actions drawn last is in their rewards.

        Raises:
            ValueError: If it was there already.
        """
        if self.owes_kl and not self._owed:
            raise ValueError("callback: expected one TextCallback in learn(callback=...), got a second one")
        self._owed = False

    def _owe(self) -> None:
        if self._owed:
            raise ValueError(
                "callback: expected a TextCallback in learn(callback=...), which charges the KL under "
                "kl_source='agent', got none"
            )
        self._owed = True

    def forward(self, obs: Any, deterministic: bool = False, action_masks: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        """Actions `[B]`, values `[B, 1]` and log-probs `[B]` of a batch of states.

        This is what rollouts call, in eval mode and without gradients; `predict` goes another way.

        Raises:
            ValueError: If `owes_kl` and nobody has settled for the actions drawn before these.
        """
        if self.owes_kl and not (deterministic or self.training or torch.is_grad_enabled()):
            self._owe()
        states = self._read(obs)
        law = self._law(self.network.logits(states), action_masks)
        actions = law.get_actions(deterministic=deterministic)
        return actions, self.network.values(states)[:, None], law.log_prob(actions)

    def evaluate_actions(self, obs: Any, actions: Tensor, action_masks: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        """Values `[B, 1]`, log-probs `[B]` and entropies `[B]` of recorded actions, differentiable."""
        states = self._read(obs)
        if action_masks is None:  # without ever holding [B, V]
            logprobs, entropy = self.network.logprobs(states, actions, with_entropy=True)
            assert entropy is not None
        else:
            law = self._law(self.network.logits(states), action_masks)
            logprobs, entropy = law.log_prob(actions.long()), law.entropy()
        return self.network.values(states)[:, None], logprobs, entropy

    def get_distribution(self, obs: Any, action_masks: Any = None) -> Distribution:
        """π(·|s)."""
        return self._law(self.network.logits(self._read(obs)), action_masks)

    def predict_values(self, obs: Any) -> Tensor:
        """Values `[B, 1]`."""
        return self.network.values(self._read(obs))[:, None]


class TextPolicy(_LanguageModelPolicy, ActorCriticPolicy):
    """The policy class of `PPO` and `A2C`: `policy_kwargs={"lm": LivePolicy(policy), "temperature": ...}`."""


class MaskableTextPolicy(_LanguageModelPolicy, MaskableActorCriticPolicy):
    """The policy class of `MaskablePPO`; the law is renormalised over the allowed tokens."""


def check_vocabulary(lm: LivePolicy, action_space: spaces.Space) -> None:
    """Raise unless each action is a token of the policy's."""
    if not isinstance(lm, LivePolicy) or not isinstance(lm.policy, ValueHeadLM):
        raise ValueError(f"lm: expected LivePolicy(a ValueHeadLM), got {type(lm).__name__}")
    if not isinstance(action_space, spaces.Discrete) or int(action_space.n) != lm.policy.vocab_size:
        raise ValueError(f"lm: expected a vocabulary of {action_space}, got {lm.policy.vocab_size}")
