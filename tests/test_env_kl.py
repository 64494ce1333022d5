"""`textenv.kl`: the charge, where it lands, and the controllers; hand numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from textenv.kl import AdaptiveKL, FixedKL, as_controller, charge, credit, token_charges

REWARDS = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]])
LOGPROBS = torch.tensor([[-1.0, -2.0, math.nan], [-0.5, -1.0, -1.5]])
REFS = torch.tensor([[-2.0, -1.5, math.nan], [-0.5, -3.0, -1.0]])
MASK = torch.tensor([[True, True, False], [True, True, True]])


def test_charge_by_hand() -> None:
    # k = [[1, -.5], [0, 2, -.5]]; β = .5
    paid = charge(REWARDS, LOGPROBS, REFS, MASK, kl_coef=0.5, kl_source="agent")
    assert torch.equal(paid, torch.tensor([[-0.5, 2.25, 0.0], [1.0, -1.0, 3.25]]))
    paid = charge(REWARDS, LOGPROBS, REFS, MASK, kl_coef=0.5, kl_source="agent", kl_credit="sequence")
    assert torch.equal(paid, torch.tensor([[0.0, 1.75, 0.0], [1.0, 0.0, 2.25]]))


@pytest.mark.parametrize("source", ["policy", "reference"])
def test_charge_leaves_alone_what_the_environment_paid(source: Any) -> None:
    assert torch.equal(charge(REWARDS, LOGPROBS, REFS, MASK, kl_coef=0.5, kl_source=source), REWARDS)


def test_charge_cleans_masked_slots() -> None:
    dirty = torch.where(MASK, REWARDS, math.nan)
    assert torch.isfinite(charge(dirty, LOGPROBS, REFS, MASK, kl_coef=0.5, kl_source="agent")).all()
    assert torch.equal(charge(dirty, LOGPROBS, REFS, MASK, kl_coef=0.0, kl_source="agent"), REWARDS)


@pytest.mark.parametrize("name", ["logprobs", "ref_logprobs", "mask"])
def test_charge_wants_one_shape(name: str) -> None:
    given: dict[str, Any] = {"logprobs": LOGPROBS, "ref_logprobs": REFS, "mask": MASK}
    given[name] = given[name][:, :2]
    with pytest.raises(ValueError, match=rf"{name}: expected the shape of rewards \(2, 3\), got \(2, 2\)"):
        charge(REWARDS, **given, kl_coef=0.5, kl_source="agent")


def test_the_environments_own_charges() -> None:
    logprobs, refs = LOGPROBS[1], REFS[1]
    assert token_charges(None, refs, kl_coef=0.5, kl_source="agent").tolist() == [0, 0, 0]
    assert token_charges(logprobs, refs, kl_coef=0.5, kl_source="policy").tolist() == [0, -1, 0.25]
    assert token_charges(None, refs, kl_coef=0.5, kl_source="reference").tolist() == [-0.25, -1.5, -0.5]
    assert token_charges(None, refs, kl_coef=0.0, kl_source="policy").tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="logprobs: expected log π of every token under kl_source='policy'"):
        token_charges(None, refs, kl_coef=0.5, kl_source="policy")


def test_credit_keeps_each_sum() -> None:
    charges = torch.where(MASK, REFS, 7.0)
    for how in ("token", "sequence"):
        assert torch.allclose(credit(charges, MASK, how).sum(1), torch.tensor([-3.5, -4.5]))
    assert credit(charges, MASK, "sequence").tolist() == [[0, -3.5, 0], [0, 0, -4.5]]


def test_fixed() -> None:
    controller = as_controller(0.2)
    controller.update(100.0, 1000)
    assert isinstance(controller, FixedKL) and controller.value == 0.2
    assert as_controller(controller) is controller


def test_adaptive_by_hand() -> None:
    """Ziegler et al. 2019, §2.2: e = clip(KL/target − 1, ±0.2), β ← β(1 + e·n/horizon)."""
    controller = AdaptiveKL(0.1, target=6.0, horizon=1000)
    controller.update(6.6, 100)  # e = 0.1
    assert controller.value == pytest.approx(0.1 * 1.01)
    controller.update(60.0, 100)  # clipped
    assert controller.value == pytest.approx(0.1 * 1.01 * 1.02)
    controller.update(0.0, 100)
    assert controller.value == pytest.approx(0.1 * 1.01 * 1.02 * 0.98)
    again = AdaptiveKL(0.5, target=6.0, horizon=1000)
    again.load_state_dict(controller.state_dict())
    assert again == controller
    assert as_controller(controller) is controller


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedKL(-0.1), "kl_coef: expected a finite number >= 0, got -0.1"),
        (lambda: as_controller(float("nan")), "kl_coef: expected a finite number >= 0, got nan"),
        (lambda: as_controller(True), "kl_coef: expected a finite number >= 0, got True"),
        (lambda: as_controller("0.1"), "kl_coef: expected a number >= 0 or a controller"),  # type: ignore[arg-type]
        (lambda: AdaptiveKL(0.0), "value: expected a number > 0, got 0"),
        (lambda: AdaptiveKL(target=-1.0), "target: expected a finite number >= 0, got -1.0"),
        (lambda: AdaptiveKL(horizon=0), "horizon: expected a number > 0, got 0"),
    ],
)
def test_bad_coefficients(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
