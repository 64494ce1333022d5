"""Importance weights between sampler and trainer, by enumeration: what they make exact, and what they only mend."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from agents import PPOConfig
from agents.mismatch import CorrectionLevel, SamplerMismatch, check_mismatch, correction_weights, mismatch
from tests.test_exact_gradient import EXACT, World, relative_error

CAP = 50.0  # above every ratio here: `gradient` asserts it


def noisy(size: float) -> Callable[[Tensor], Tensor]:
    """The same noise at each call: whether token weights are nearer than none is a matter of chance."""

    def changed(logits: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        return logits + size * torch.randn(logits.shape, generator=generator, dtype=logits.dtype)

    return changed


def rounded(logits: Tensor) -> Tensor:
    """Log-probs as a sampler in bfloat16 has them."""
    return logits.bfloat16().log_softmax(-1).double()


GAPS = {"0.01": noisy(0.01), "0.1": noisy(0.1), "0.3": noisy(0.3), "bfloat16": rounded}


@pytest.fixture(params=range(3))
def world(request: pytest.FixtureRequest) -> World:
    return World.seeded(request.param)


def sampler(world: World, gap: str) -> World:
    """The same text MDP under the law that samples."""
    return World(GAPS[gap](world.logits.detach()), world.ref_logits, world.scores)


def gradient(world: World, behavior: World, level: CorrectionLevel, cap: float = CAP, drop: bool = False) -> Tensor:
    """What the chain finds where responses come from `behavior`, and the rewards are the trainer's."""
    old, told = world.selected(world.logits).detach(), behavior.selected(behavior.logits)
    weights = correction_weights(old, told, world.mask, level=level, cap=cap, drop=drop)
    assert cap != CAP or float(weights.max()) < CAP
    values = torch.zeros_like(old)
    return world.policy_gradient(world.rewards(world.k1()), values, weights=behavior.probabilities * weights)


@pytest.mark.parametrize("gap", GAPS)
def test_sequence_weights_below_the_cap_give_the_exact_gradient(world: World, gap: str) -> None:
    behavior = sampler(world, gap)
    assert relative_error(gradient(world, behavior, "sequence"), world.true_gradient()) < EXACT
    assert relative_error(gradient(world, behavior, "none"), world.true_gradient()) > 1e-4  # there is something to mend


@pytest.mark.parametrize("gap", GAPS)
def test_token_weights_are_nearer_than_none(world: World, gap: str) -> None:
    behavior, truth = sampler(world, gap), world.true_gradient()
    token, none = (relative_error(gradient(world, behavior, level), truth) for level in ("token", "none"))
    assert token < none


def test_a_cap_is_a_bias_and_dropping_a_larger_one(world: World) -> None:
    behavior, truth = sampler(world, "0.3"), world.true_gradient()
    cut, dropped = (relative_error(gradient(world, behavior, "sequence", 1.1, drop), truth) for drop in (False, True))
    assert EXACT < cut < dropped


def test_the_kl_is_that_of_the_enumeration(world: World) -> None:
    """The mean of k3 over the sampler's law is KL(μ‖π) exactly."""
    behavior = sampler(world, "0.3")
    old, told = world.selected(world.logits).detach(), behavior.selected(behavior.logits)
    law, other = behavior.logits.log_softmax(-1), world.logits.detach().log_softmax(-1)
    divergence = (law.exp() * (law - other)).sum(-1)
    visits = torch.where(world.mask, behavior.probabilities, 0.0)
    # Tokens come as often as they are drawn: 10⁵ copies of the enumeration's rows, near enough.
    copies = (behavior.probabilities[:, 0] * 100_000).round().long()
    found = mismatch(*(x.repeat_interleave(copies, 0) for x in (old, told)), world.mask.repeat_interleave(copies, 0))
    exact = (visits * divergence[world.states]).sum() / visits.sum()
    assert float(found.kl) == pytest.approx(float(exact), rel=1e-2)
    assert 0.5 < float(found.effective_frac) < 1 and float(found.worst_sequence) > float(found.logprob_gap) > 0


def test_whatever_stands_outside_of_the_mask_changes_nothing() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    old = torch.tensor([[-1.0, -2.0, math.nan], [-0.5, math.inf, math.nan]])
    behavior = torch.tensor([[-1.1, -1.5, math.nan], [-0.7, 3.0, -math.inf]])
    clean = [torch.where(mask, x, torch.zeros_like(x)) for x in (old, behavior)]
    for level in ("token", "sequence", "none"):
        found = correction_weights(old, behavior, mask, level=level)
        assert torch.equal(found, correction_weights(*clean, mask, level=level)) and found.isfinite().all()
    assert mismatch(old, behavior, mask) == mismatch(*clean, mask)
    empty = mismatch(old, behavior, torch.zeros_like(mask))
    assert [float(number) for number in empty] == [0, 0, 0, 0, 1, 0]


def test_a_hopeless_gap_stays_finite() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    old, behavior = torch.tensor([[-0.1, -500.0]]), torch.tensor([[-500.0, -0.1]])
    assert correction_weights(old, behavior, mask).tolist() == [[2.0, pytest.approx(math.exp(-20))]]
    assert correction_weights(old, behavior, mask, drop=True)[0, 0] == 0
    assert all(number.isfinite() for number in mismatch(old, behavior, mask))


# The alarm: what is ordinary must pass at the default, and what is wrong must not.

ALARM = PPOConfig().mismatch_alarm
ROLLOUT = (64, 48)


def told(gap: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Trainer's and sampler's log-probs that differ by `gap`, all of which count."""
    behavior = torch.full_like(gap, -2.0)
    return behavior + gap, behavior, torch.ones_like(gap, dtype=torch.bool)


def normal(size: float, shape: tuple[int, int] = ROLLOUT) -> Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(3))


def offset_logits() -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of a law over 32,000 tokens, in float32 and of its logits in bfloat16, which are 8 to 40 large."""
    generator = torch.Generator().manual_seed(3)
    logits = 20 + 3 * torch.randn(400, 32_000, generator=generator)
    chosen = torch.distributions.Categorical(logits=logits).logits.exp().multinomial(1, generator=generator)
    behavior = logits.bfloat16().float().log_softmax(-1).gather(1, chosen)
    return logits.log_softmax(-1).gather(1, chosen), behavior, torch.ones_like(chosen, dtype=torch.bool)


def outlier(gap: float, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    gaps = normal(0.01, shape)
    gaps[1, 2] = gap
    return told(gaps)


ORDINARY: dict[str, Callable[[], tuple[Tensor, Tensor, Tensor]]] = {
    "bfloat16, small logits": lambda: told(normal(0.01)),
    "bfloat16, a large vocabulary and large logits": offset_logits,
    "one token far off": lambda: outlier(2.97, ROLLOUT),
    "one token far off in a small rollout": lambda: outlier(1.66, (8, 16)),
    "one token beyond all measure": lambda: outlier(18.0, (8, 16)),
    "one token that the trainer thinks impossible": lambda: outlier(-30.0, (8, 16)),
}
WRONG: dict[str, Callable[[], tuple[Tensor, Tensor, Tensor]]] = {
    "stale weights": lambda: told(normal(0.2)),
    "half-synced weights": lambda: told(normal(0.3)),
    "a stale cache of some prompts": lambda: told(torch.cat([normal(1.0, (4, 48)), torch.zeros(60, 48)])),
    "another law altogether": lambda: told(normal(3.0)),
    "NaN": lambda: told(torch.full(ROLLOUT, math.nan)),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_what_is_ordinary_raises_no_alarm(name: str) -> None:
    made = ORDINARY[name]()
    check_mismatch(*made, ALARM)
    if "far off" in name:  # the mean of all would have, at half the alarm
        assert float(mismatch(*made).kl) > 5e-3
    if "large" in name:
        assert 1e-4 < float(mismatch(*made).kl) < 5e-3


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_raises_it(name: str) -> None:
    with pytest.raises(SamplerMismatch, match=r"above the alarm of 0\.01"):
        check_mismatch(*WRONG[name](), ALARM)


def test_the_bounded_kl_is_the_kl_of_small_gaps() -> None:
    found = mismatch(*told(normal(0.2)))
    assert float(found.bounded_kl) == pytest.approx(float(found.kl), rel=1e-3)
    assert float(found.kl) == pytest.approx(0.02, rel=0.1)  # nats, the least that a stale engine was seen to have
