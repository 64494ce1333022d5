"""Names that code for TRL up to 0.11 imports: its controllers of β, and what is not here."""

from __future__ import annotations

from typing import Any, NoReturn

from textenv.kl import AdaptiveKL, FixedKL

# What `step` and `generate` of 0.11 called on the trainer itself, so that a subclass could change them.
_NOT_CALLED = (
    "_early_stop",
    "_generate_batched",
    "_kl_penalty",
    "_step_safety_checker",
    "batched_forward_pass",
    "compute_advantages",
    "compute_rewards",
    "gather_stats",
    "loss",
    "prepare_model_inputs",
    "record_step_stats",
    "train_minibatch",
)


class AdaptiveKLController(AdaptiveKL):
    """`AdaptiveKL` with the arguments of TRL's."""

    def __init__(self, init_kl_coef: float, target: float, horizon: float) -> None:
        """Start at β = `init_kl_coef`, and steer to `target` nats per response within about `horizon` episodes."""
        super().__init__(init_kl_coef, target, horizon)


class FixedKLController(FixedKL):
    """`FixedKL` with the argument of TRL's."""

    def __init__(self, kl_coef: float) -> None:
        """Stay at β = `kl_coef`."""
        super().__init__(kl_coef)


class AutoModelForSeq2SeqLMWithValueHead:
    """Not here: it can be imported, and says so when it is used."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Refuse; arguments as TRL's.

        Raises:
            ValueError: Always.
        """
        _refuse_encoder_decoder()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse; arguments as TRL's.

        Raises:
            ValueError: Always.
        """
        _refuse_encoder_decoder()


def _refuse_encoder_decoder() -> NoReturn:
    raise ValueError(
        "model: expected a causal language model (AutoModelForCausalLMWithValueHead), because states are prefixes of "
        "one text here, got an encoder-decoder"
    )


def refuse_overrides(trainer: type) -> None:
    """Raise if a subclass of the trainer defines what TRL's `step` would have called and the one here does not.

    Args:
        trainer: The subclass; what it inherits from other classes counts too.

    Raises:
        TypeError: Naming the methods.
    """
    found = sorted({name for base in trainer.__mro__ for name in _NOT_CALLED if name in vars(base)})
    if found:
        raise TypeError(
            f"{trainer.__name__}: expected no method of TRL's that step() does not call here, got {', '.join(found)}; "
            "change the scores given to step(), or write the loop over agents.PPO's collect and update"
        )
