"""The settings of training, and those of PPO."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from agents.checks import at_least, number
from agents.mismatch import CorrectionLevel

LrSchedule = Literal["constant", "linear", "cosine"]
OldLogprobs = Literal["forward", "sampler"]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of the loop that every algorithm shares; an update is one rollout learnt from, a step one minibatch.

    Temperature, stop tokens, response length and β are the environment's, and read there. What an algorithm estimates
    and how it loses are the algorithm's.

    Raises:
        ValueError: Naming the field, what was expected and what came.
    """

    batch_episodes: int = 64
    """Episodes of a rollout."""
    epochs: int = 2
    """Passes over each rollout."""
    minibatches: int = 4
    """Optimizer steps of an epoch, each on its share of the episodes."""
    microbatch_episodes: int | None = None
    """Episodes of one forward and backward; None: a whole minibatch. Changes memory, never the update."""
    learning_rate: float = 2e-4
    """Adam's step size for the language model."""
    critic_learning_rate: float | None = None
    """Adam's step size for the value head and a separate critic; None: `learning_rate`."""
    lr_schedule: LrSchedule = "linear"
    """How both fall from update to update, to 0 after `schedule_updates`."""
    schedule_updates: int | None = None
    """Length of the schedule; None: as many as `learn` has been asked for in all."""
    warmup_updates: int = 0
    """Updates over which both rise linearly first."""
    critic_warmup_updates: int = 0
    """First updates in which the critic alone learns."""
    adam_eps: float = 1e-5
    """Adam's ε; PyTorch's 1e-8 makes the first steps several times too large."""
    max_grad_norm: float | None = 1.0
    """Bound of the gradient's norm, of the language model and of the critic apart."""
    gamma: float = 1.0
    """Discount."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    whiten_rewards: bool = False
    """Rewards to variance 1 over the rollout, the mean kept; gives up the invariance to their scale."""
    score_clip: float | None = None
    """Scores are clipped to ±this before they are learnt from, in reward units; None: they are not."""
    max_update_kl: float | None = None
    """An update stops before the step at which KL(π_old‖π) per token exceeds this; None: it never does."""
    old_logprobs: OldLogprobs = "forward"
    """Whose log π_old is: that of the trainer's own forward over each rollout, or the sampler's, which spares the
    forward but in every 16th rollout, where the two are compared."""
    correction: CorrectionLevel = "token"
    """Importance weights of the policy's loss where sampler and trainer differ (`agents.mismatch`)."""
    correction_cap: float = 2.0
    """Their largest."""
    correction_drop: bool = False
    """Whether what exceeds the cap weighs 0 instead of the cap."""
    mismatch_alarm: float | None = 1e-2
    """Nats per token of bounded KL from the sampler to the trainer above which its samples are refused; None: none."""
    eval_every: int = 0
    """Updates between evaluations on the held-out prompts; 0: none."""
    bf16: bool | None = None
    """Autocast to bfloat16; None: on GPUs only."""
    seed: int = 0
    """Of prompts, samples and minibatches."""

    def __post_init__(self) -> None:
        """Check each field."""
        for name in ("batch_episodes", "epochs", "minibatches"):
            at_least(name, getattr(self, name), 1)
        for name in ("warmup_updates", "critic_warmup_updates", "eval_every", "seed"):
            at_least(name, getattr(self, name), 0)
        for name in ("microbatch_episodes", "schedule_updates"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)
        if self.minibatches > self.batch_episodes:
            limit = f"batch_episodes={self.batch_episodes}"
            raise ValueError(f"minibatches: expected at most {limit}, got {self.minibatches}")
        for name in ("learning_rate", "entropy_coef", "adam_eps"):
            number(name, getattr(self, name))
        number("correction_cap", self.correction_cap, above=0.0)
        for name in ("critic_learning_rate", "max_grad_norm", "score_clip", "max_update_kl", "mismatch_alarm"):
            if getattr(self, name) is not None:
                number(name, getattr(self, name))
        number("gamma", self.gamma, high=1.0)
        for name in ("whiten_rewards", "correction_drop"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if self.bf16 is not None and not isinstance(self.bf16, bool):
            raise ValueError(f"bf16: expected True, False or None, got {self.bf16!r}")
        for name, kind in (
            ("lr_schedule", LrSchedule),
            ("old_logprobs", OldLogprobs),
            ("correction", CorrectionLevel),
        ):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}: expected one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")

    @property
    def loop(self) -> TrainConfig:
        """The settings of the loop alone: those of this class."""
        return TrainConfig(**{field.name: getattr(self, field.name) for field in fields(TrainConfig)})

    @property
    def forward_episodes(self) -> int:
        """Episodes of one forward: a microbatch, or a whole minibatch."""
        return self.microbatch_episodes or -(-self.batch_episodes // self.minibatches)


@dataclass(frozen=True)
class PPOConfig(TrainConfig):
    """Settings of `PPO`: those of the loop, and of the clipped surrogate on whitened GAE with a critic.

    Raises:
        ValueError: Naming the field, what was expected and what came.
    """

    gae_lambda: float = 0.98
    """λ of the advantages."""
    clip_eps: float = 0.2
    """Half-width of the trust region of the probability ratio."""
    clip_eps_high: float | None = None
    """Its upper half-width; None: `clip_eps`."""
    dual_clip: float | None = None
    """Bound c > 1 of the loss where the advantage is negative (Ye et al. 2020); None: none."""
    value_clip_eps: float | None = 0.2
    """Half-width of the value clip, in standard deviations of the returns; None: no clip."""
    value_coef: float = 1.0
    """Weight of the value loss, which is in units of the returns' variance."""
    trunk_value_coef: float = 1.0
    """Share of the value loss's gradient that reaches a shared trunk."""
    value_stats_decay: float = 0.9
    """Memory of the running mean and variance of the returns, per update."""
    whiten_advantages: bool = True
    """Advantages to mean 0 and variance 1 over the rollout."""

    def __post_init__(self) -> None:
        """Check each field; `PPO` makes the components of them, which check the others again."""
        super().__post_init__()
        for name in ("clip_eps", "value_coef", "trunk_value_coef"):
            number(name, getattr(self, name))
        for name in ("clip_eps_high", "value_clip_eps"):
            if getattr(self, name) is not None:
                number(name, getattr(self, name))
        for name in ("gae_lambda", "value_stats_decay"):
            number(name, getattr(self, name), high=1.0)
        if self.dual_clip is not None:
            number("dual_clip", self.dual_clip, above=1.0)
        if not isinstance(self.whiten_advantages, bool):
            raise ValueError(f"whiten_advantages: expected True or False, got {self.whiten_advantages!r}")
