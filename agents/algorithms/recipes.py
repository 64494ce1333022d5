"""Named algorithms: each function puts components together, with settings of the loop that suit them.

A change of one's own is an argument, or `dataclasses.replace` of what comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from agents.algorithms.aggregation import FixedLength, SequenceMean, TokenMean
from agents.algorithms.base import Algorithm, Estimator, ValueLoss
from agents.algorithms.estimators import (
    GAE,
    GreedyBaseline,
    GroupNormalized,
    LeaveOneOut,
    LengthAdaptiveGAE,
    ReturnToGo,
    RunningBaseline,
    Scaled,
    Whitened,
)
from agents.algorithms.objectives import Clipped, PolicyGradient, ReferenceKL, SequenceClipped
from agents.config import PPOConfig, TrainConfig

_SEVERAL_STEPS = TrainConfig(epochs=2, minibatches=4, learning_rate=2e-4)
# A gradient without a ratio is right for one step: small rollouts, so that there are many.
_ONE_STEP = TrainConfig(batch_episodes=16, epochs=1, minibatches=1, learning_rate=3e-4)


def from_config(config: PPOConfig) -> Algorithm:
    """The algorithm that a `PPOConfig` describes: the clipped surrogate on GAE, a token mean, and a critic.

    Its `defaults` are the config's settings of the loop; the others are in its components.
    """
    estimator: Estimator = GAE(config.gae_lambda)
    if config.whiten_advantages:
        estimator = Whitened(estimator)
    return Algorithm(
        estimator,
        Clipped(config.clip_eps, config.clip_eps_high, config.dual_clip),
        TokenMean(),
        critic=ValueLoss(config.value_clip_eps, config.value_coef, config.trunk_value_coef, config.value_stats_decay),
        defaults=config.loop,
        name="ppo",
    )


def ppo() -> Algorithm:
    """PPO (Schulman et al. 2017) with the settings of `PPOConfig()`; `agents.PPO` takes others."""
    return from_config(PPOConfig())


def vapo(alpha: float = 1.0, clip_eps: float = 0.2, clip_eps_high: float = 0.28) -> Algorithm:
    """VAPO (arXiv 2504.05118): length-adaptive λ, returns with λ = 1, clip-higher, a token mean.

    Its critic pretraining is `critic_warmup_updates`, its groups `replace(vapo(), group_size=16)`. Its loss on positive
    examples is left out. Its α = 0.05 is for responses of thousands of tokens; here it is 1.
    """
    return Algorithm(
        Whitened(LengthAdaptiveGAE(alpha)),
        Clipped(clip_eps, clip_eps_high),
        TokenMean(),
        critic=ValueLoss(),
        defaults=_SEVERAL_STEPS,
        name="vapo",
    )


def a2c(lam: float = 0.98) -> Algorithm:
    """Advantage actor-critic (Mnih et al. 2016, synchronous): one step on each rollout, no ratio, no clip."""
    return Algorithm(
        Whitened(GAE(lam)),
        PolicyGradient(),
        TokenMean(),
        critic=ValueLoss(clip_eps=None),
        defaults=_ONE_STEP,
        name="a2c",
    )


def reinforce(decay: float = 0.9) -> Algorithm:
    """REINFORCE (Williams 1992) against a running mean of the returns, over their root mean square."""
    return Algorithm(
        Scaled(RunningBaseline(decay)), PolicyGradient(), TokenMean(), defaults=_ONE_STEP, name="reinforce"
    )


def reinforce_baseline() -> Algorithm:
    """REINFORCE with a learnt baseline (Sutton & Barto 2018, §13.4): Gₜ − V(sₜ), which is GAE with λ = 1."""
    return Algorithm(
        Scaled(GAE(1.0)),
        PolicyGradient(),
        TokenMean(),
        critic=ValueLoss(clip_eps=None),
        defaults=_ONE_STEP,
        name="reinforce_baseline",
    )


def reinforce_plus_plus(clip_eps: float = 0.2, clip_eps_high: float | None = None) -> Algorithm:
    """REINFORCE++ (arXiv 2501.03262): what came after each token, KL in it, normalised over the whole rollout."""
    return Algorithm(
        Whitened(ReturnToGo()),
        Clipped(clip_eps, clip_eps_high),
        TokenMean(),
        defaults=_SEVERAL_STEPS,
        name="reinforce++",
    )


def remax() -> Algorithm:
    """ReMax (arXiv 2310.10505): REINFORCE against the greedy response to the same prompt.

    Whitened, because greedy responses may be better or worse than sampled ones all in all, by more than prompts differ.
    """
    return Algorithm(
        Whitened(GreedyBaseline()), PolicyGradient(), TokenMean(), greedy=True, defaults=_ONE_STEP, name="remax"
    )


def rloo(group_size: int = 4, clip_eps: float = 0.2, clip_eps_high: float | None = None) -> Algorithm:
    """RLOO (arXiv 2402.14740): each response against the mean of the others to its prompt, over their root mean square.

    The clipped surrogate takes several steps on a rollout; the first is the paper's.
    """
    return Algorithm(
        Scaled(LeaveOneOut()),
        Clipped(clip_eps, clip_eps_high),
        TokenMean(),
        group_size=group_size,
        defaults=_SEVERAL_STEPS,
        name="rloo",
    )


def grpo(
    group_size: int = 8,
    clip_eps: float = 0.2,
    clip_eps_high: float | None = None,
    *,
    kl_loss: bool = False,
) -> Algorithm:
    """GRPO (arXiv 2402.03300): returns normalised within each prompt's group, a mean over each response.

    The KL is charged in the reward, so that β means what it means everywhere; `kl_loss=True` puts it into the loss, as
    the paper does, there against advantages that are in standard deviations of a group.
    """
    return Algorithm(
        GroupNormalized(),
        Clipped(clip_eps, clip_eps_high),
        SequenceMean(),
        group_size=group_size,
        kl_loss=ReferenceKL() if kl_loss else None,
        defaults=_SEVERAL_STEPS,
        name="grpo",
    )


def dr_grpo(group_size: int = 8, clip_eps: float = 0.2, clip_eps_high: float | None = None) -> Algorithm:
    """Dr. GRPO (arXiv 2503.20783): GRPO without its two biases, the group's deviation and the response's length.

    Advantages are divided by their root mean square over the rollout, a factor common to all.
    """
    return Algorithm(
        Scaled(GroupNormalized(std=False)),
        Clipped(clip_eps, clip_eps_high),
        FixedLength(),
        group_size=group_size,
        defaults=_SEVERAL_STEPS,
        name="dr_grpo",
    )


def gspo(
    group_size: int = 8, clip_eps: float = 0.02, clip_eps_high: float | None = 0.03, *, per_token: bool = False
) -> Algorithm:
    """GSPO (arXiv 2507.18071): GRPO with the ratio of whole responses; `per_token` is GSPO-token.

    The paper's half-widths, 3e-4 and 4e-4, are for responses of thousands of tokens, whose mean log-ratio moves less.
    """
    return Algorithm(
        GroupNormalized(),
        SequenceClipped(clip_eps, clip_eps_high, per_token),
        SequenceMean(),
        group_size=group_size,
        defaults=_SEVERAL_STEPS,
        name="gspo",
    )


RECIPES: Mapping[str, Callable[[], Algorithm]] = {
    "ppo": ppo,
    "vapo": vapo,
    "a2c": a2c,
    "reinforce": reinforce,
    "reinforce_baseline": reinforce_baseline,
    "reinforce++": reinforce_plus_plus,
    "remax": remax,
    "rloo": rloo,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "gspo": gspo,
}
"""What each is called on the command line."""
