"""Masked reductions and whitening: numbers known from elsewhere, loops, and what must not matter."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agents import masked
from tests import oracles

NINE = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])
ALL = torch.ones(3, 3, dtype=torch.bool)

# Time says nothing about right or wrong on a shared machine.
generated = settings(deadline=None, max_examples=80)

REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "clean": masked.clean,
    "sum": masked.masked_sum,
    "sum of rows": lambda x, m: masked.masked_sum(x, m, -1),
    "mean": masked.masked_mean,
    "mean of rows": lambda x, m: masked.masked_mean(x, m, -1),
    "weighted mean": lambda x, m: masked.masked_mean(x, m, weights=x.detach().abs()),
    "variance": masked.masked_var,
    "biased variance": lambda x, m: masked.masked_var(x, m, False),
    "whiten": masked.whiten,
    "whiten, mean kept": lambda x, m: masked.whiten(x, m, False),
    "weighted whiten": lambda x, m: masked.whiten(x, m, weights=x.detach().abs()),
}


@st.composite
def tables(draw: st.DrawFn, least: int = 0) -> tuple[Tensor, Tensor]:
    """Random numbers in float64 and a mask with at least that many slots."""
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    size = shape[0] * shape[1]
    numbers = draw(st.lists(st.floats(-10, 10, width=16), min_size=size, max_size=size))
    flags = draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(lambda f: sum(f) >= min(least, size)))
    return torch.tensor(numbers, dtype=torch.float64).view(shape), torch.tensor(flags).view(shape)


@pytest.mark.parametrize(
    ("unbiased", "first_row"), [(False, [0.0508, 0.4381, 0.8254]), (True, [0.1394, 0.5046, 0.8697])]
)
def test_whitening_vectors_without_mean_shift(unbiased: bool, first_row: list[float]) -> None:
    """The golden vectors of Huang et al. 2023, to the four digits that are published."""
    white = masked.whiten(NINE, ALL, shift_mean=False, unbiased=unbiased)
    assert white[0].tolist() == pytest.approx(first_row, abs=5e-5)


@pytest.mark.parametrize("unbiased", [False, True])
def test_whitening_vectors_with_mean_shift_are_the_same_minus_the_mean(unbiased: bool) -> None:
    # By hand: mean 1.6, squares sum to 0.6, so z = (x - 1.6) / sqrt(0.6 / 9) or sqrt(0.6 / 8).
    divisor = math.sqrt(0.6 / (8 if unbiased else 9))
    expected = torch.tensor([[(1.2 + 0.1 * i - 1.6) / divisor for i in range(9)]]).view(3, 3)
    torch.testing.assert_close(masked.whiten(NINE, ALL, unbiased=unbiased), expected, atol=2e-6, rtol=0)


def test_whitening_excludes_masked_slots_from_mean_and_variance() -> None:
    padded = torch.cat([NINE, torch.full((3, 2), 1e6)], dim=1)
    mask = torch.cat([ALL, torch.zeros(3, 2, dtype=torch.bool)], dim=1)
    white = masked.whiten(padded, mask, shift_mean=False)
    torch.testing.assert_close(white[:, :3], masked.whiten(NINE, ALL, shift_mean=False))
    assert torch.equal(white[:, 3:], torch.zeros(3, 2))


@generated
@given(tables(least=2), st.booleans(), st.booleans())
def test_reductions_equal_the_loops(table: tuple[Tensor, Tensor], shift_mean: bool, unbiased: bool) -> None:
    x, mask = table
    numbers = oracles.counted(x.tolist(), mask.tolist())
    assert masked.masked_sum(x, mask).item() == pytest.approx(math.fsum(numbers), abs=1e-12)
    assert masked.masked_mean(x, mask).item() == pytest.approx(oracles.mean(numbers), abs=1e-12)
    assert masked.masked_var(x, mask, unbiased).item() == pytest.approx(oracles.variance(numbers, unbiased), abs=1e-11)
    rows = [oracles.mean(oracles.counted([r], [m])) for r, m in zip(x.tolist(), mask.tolist(), strict=True)]
    assert masked.masked_mean(x, mask, -1).tolist() == pytest.approx(rows, abs=1e-12)
    if oracles.variance(numbers, unbiased) > 1e-16:
        expected = oracles.whiten(x.tolist(), mask.tolist(), shift_mean, unbiased)
        # The mean's rounding, 1e-15, over the smallest spread that numbers of 16 bits can have here.
        torch.testing.assert_close(
            masked.whiten(x, mask, shift_mean, unbiased),
            torch.tensor(expected, dtype=torch.float64),
            atol=1e-6,
            rtol=1e-6,
        )


@generated
@given(tables(least=2), st.integers(-40, 40))
def test_whitening_is_bit_identical_under_powers_of_two(table: tuple[Tensor, Tensor], power: int) -> None:
    x, mask = table[0].float(), table[1]
    x = torch.where(x.abs() < 1e-3, torch.zeros_like(x), x)  # so that no square underflows
    assert torch.equal(masked.whiten(x * 2.0**power, mask), masked.whiten(x, mask))


def test_whitening_with_an_absolute_epsilon_would_not_be() -> None:
    """Negative control: the textbook formula fails the test above."""

    def textbook(x: Tensor) -> Tensor:
        return (x - x.mean()) * torch.rsqrt(x.var() + 1e-8)

    assert not torch.equal(textbook(NINE * 2.0**-10), textbook(NINE))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100, 4097])
@pytest.mark.parametrize("value", [0.0, 0.1, -1 / 3, 1e-20, 1e12])
def test_whitening_a_constant_gives_zero_and_not_amplified_rounding(count: int, value: float) -> None:
    x, mask = torch.full((1, count), value), torch.ones(1, count, dtype=torch.bool)
    assert torch.equal(masked.whiten(x, mask), torch.zeros_like(x))
    torch.testing.assert_close(masked.whiten(x, mask, shift_mean=False), x)


def test_whitening_of_one_counted_slot_and_of_none() -> None:
    x = torch.tensor([[3.0, 5.0]])
    assert masked.whiten(x, torch.tensor([[True, False]])).tolist() == [[0.0, 0.0]]
    assert masked.whiten(x, torch.tensor([[True, False]]), shift_mean=False).tolist() == [[3.0, 0.0]]
    assert masked.whiten(x, torch.tensor([[False, False]]), shift_mean=False).tolist() == [[0.0, 0.0]]


@generated
@given(tables(least=2))
def test_integer_weights_are_repetitions(table: tuple[Tensor, Tensor]) -> None:
    x, mask = table
    weights = torch.randint(1, 4, x.shape, generator=torch.Generator().manual_seed(0)).double()
    numbers = oracles.counted(x.tolist(), mask.tolist())
    times = oracles.counted(weights.tolist(), mask.tolist())
    repeated = [v for v, n in zip(numbers, times, strict=True) for _ in range(int(n))]
    assert masked.masked_mean(x, mask, weights=weights).item() == pytest.approx(oracles.mean(repeated), abs=1e-12)
    biased = masked.masked_var(x, mask, False, weights=weights)
    assert biased.item() == pytest.approx(oracles.variance(repeated, False), abs=1e-11)


def test_weights_of_one_change_nothing_and_a_common_factor_neither() -> None:
    for unbiased in (False, True):
        plain = masked.whiten(NINE, ALL, unbiased=unbiased)
        assert torch.equal(masked.whiten(NINE, ALL, unbiased=unbiased, weights=torch.ones(3, 3)), plain)
        tenth = masked.whiten(NINE, ALL, unbiased=unbiased, weights=torch.full((3, 3), 0.1))
        torch.testing.assert_close(tenth, plain)


def test_weighted_whitening_has_weighted_mean_zero_and_variance_one() -> None:
    x, weights = torch.randn(3, 4).double(), torch.rand(3, 4).double()
    mask = torch.rand(3, 4) < 0.8
    white = masked.whiten(x, mask, unbiased=False, weights=weights)
    kept = weights * mask
    assert (kept * white).sum().item() == pytest.approx(0, abs=1e-12)
    assert ((kept * white**2).sum() / kept.sum()).item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_nan_under_the_mask_changes_no_metric_and_no_gradient(name: str, poison: float) -> None:
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    healthy = torch.where(mask, NINE, torch.zeros(()))
    results = []
    for x in (healthy, torch.where(mask, NINE, torch.tensor(poison))):
        leaf = x.clone().requires_grad_()
        result = REDUCTIONS[name](leaf, mask)
        (result * torch.arange(1.0, result.numel() + 1).view(result.shape)).sum().backward()
        results.append((result.detach(), leaf.grad))
    for clean, poisoned in zip(*results, strict=True):
        assert clean is not None and poisoned is not None
        assert clean.isfinite().all() and torch.equal(clean, poisoned)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_nothing_counted_is_zero_and_not_nan(name: str) -> None:
    leaf = NINE.clone().requires_grad_()
    result = REDUCTIONS[name](leaf, ~ALL)
    result.sum().backward()
    assert torch.equal(result, torch.zeros_like(result))
    assert leaf.grad is not None and torch.equal(leaf.grad, torch.zeros_like(NINE))


def test_whitening_a_constant_has_a_finite_gradient() -> None:
    leaf = torch.ones(1, 3, requires_grad=True)
    masked.whiten(leaf, torch.ones(1, 3, dtype=torch.bool)).sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()


def test_statistics_of_half_precision_are_computed_in_float32() -> None:
    x = torch.full((1, 4096), 1.5, dtype=torch.bfloat16)
    total = masked.masked_sum(x, torch.ones(1, 4096, dtype=torch.bool))
    assert total.dtype == torch.float32 and total.item() == 6144


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: masked.masked_mean(NINE, ALL[:2]), r"mask: expected shape \(3, 3\) like x, got \(2, 3\)"),
        (lambda: masked.clean(NINE, torch.ones(3, 3)), r"mask: expected dtype torch.bool, got torch.float32"),
        (lambda: masked.whiten(NINE, ALL, weights=torch.ones(3, 1)), r"weights: expected shape \(3, 3\) like x"),
    ],
)
def test_errors_name_the_argument(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
