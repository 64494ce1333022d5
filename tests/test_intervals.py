"""Intervals: against hand numbers, brute-force deletion, and how often they hold the truth."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from agents import intervals
from agents.intervals import Estimate, Statistic

ROWS = [[1.0, 3.0], [2.0, 2.0], [9.0, 1.0], [0.0, -2.0]]
SIZES = [[2.0, 1.0], [3.0, 1.0], [4.0, 4.0], [1.0, 2.0]]


def deleted(statistic: Callable[[list[int]], float], prompts: int) -> tuple[float, float]:
    """Value and standard error by leaving each prompt out and computing anew."""
    without = [statistic([j for j in range(prompts) if j != i]) for i in range(prompts)]
    centre = sum(without) / prompts
    variance = (prompts - 1) / prompts * sum((x - centre) ** 2 for x in without)
    return statistic(list(range(prompts))), math.sqrt(variance)


def test_a_mean_has_the_standard_error_of_the_prompts_means() -> None:
    # Prompt means 2, 2, 5, -1: mean 2, sum of squares 18, sd sqrt(6), over sqrt(4).
    estimate = intervals.mean(ROWS).estimate()
    assert estimate.value == pytest.approx(2.0)
    assert estimate.se == pytest.approx(math.sqrt(6) / 2)
    assert (estimate.low, estimate.high) == pytest.approx((2 - 1.959964 * 1.2247449, 2 + 1.959964 * 1.2247449))


def test_responses_of_one_prompt_are_not_independent() -> None:
    once = np.random.default_rng(0).normal(size=(20, 1))
    copied = np.repeat(once, 10, axis=1)
    assert intervals.mean(copied).se == pytest.approx(intervals.mean(once).se)


def test_a_ratio_is_that_of_sums_and_its_error_that_of_deletion() -> None:
    def by_hand(kept: list[int]) -> float:
        return sum(sum(ROWS[i]) for i in kept) / sum(sum(SIZES[i]) for i in kept)

    value, se = deleted(by_hand, 4)
    statistic = intervals.ratio(ROWS, SIZES)
    assert statistic.value == pytest.approx(value) == pytest.approx(16 / 18)
    assert statistic.se == pytest.approx(se)
    exponential, error = deleted(lambda kept: math.exp(by_hand(kept)), 4)
    assert (statistic.exp().value, statistic.exp().se) == pytest.approx((exponential, error))


def test_differences_and_ratios_are_paired() -> None:
    ours, theirs = intervals.mean(ROWS), intervals.mean([[v + 1 for v in row] for row in ROWS])
    difference = (ours - theirs).estimate()
    assert (difference.value, difference.se) == pytest.approx((-1.0, 0.0), abs=1e-12)
    kept = intervals.mean(SIZES) / intervals.mean([[2 * v for v in row] for row in SIZES])
    assert (kept.value, kept.se) == pytest.approx((0.5, 0.0), abs=1e-12)
    assert math.isnan((ours / intervals.mean([[0.0]] * 4)).value)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        shift = rng.normal(size=(60, 1))  # what a prompt's responses have in common
        sizes = rng.integers(1, 9, size=(60, 3)).astype(float)
        estimate = intervals.ratio((2.0 + shift + rng.normal(size=(60, 3))) * sizes, sizes).estimate()
        held += estimate.low <= 2.0 <= estimate.high
    assert 0.92 <= held / 400 <= 0.975  # 0.95 ± 2.5 standard errors of 400 draws, and the normal's slight narrowness


def test_one_prompt_has_no_interval() -> None:
    estimate = intervals.mean([[1.0, 2.0]]).estimate()
    assert estimate.value == 1.5
    assert math.isnan(estimate.se) and math.isnan(estimate.low)
    assert estimate.as_dict() == {"value": 1.5, "se": None, "low": None, "high": None}
    assert math.isnan(intervals.share([[1.0]]).high)


def test_wilson_by_hand() -> None:
    # 8 of 10 with z = 1.96: centre (.8 + .19207) / 1.38415, half width .25 (Wilson 1927, any textbook: .490 to .943).
    # n − 1 in the variance of the prompts: p(1 − p)/SE² = 9 trials, not 10.
    found = intervals.share([[1.0]] * 8 + [[0.0]] * 2)
    z, n, p = 1.959964, 9.0, 0.8
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half), abs=1e-6)
    assert found.low == pytest.approx(0.473, abs=0.005)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_share_at_its_end_is_not_certain(value: float) -> None:
    found = intervals.share([[value]] * 100)
    width = 1.959964**2 / (100 + 1.959964**2)
    assert found.value == value
    assert (found.low, found.high) == pytest.approx((0.0, width) if value == 0 else (1 - width, 1.0), abs=1e-6)


def test_wilson_of_a_textbook() -> None:
    # Newcombe 1998, Table I, method 3: 81/263, 15/148, 0/20 and 1/29.
    table = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611), (1, 29): (0.0061, 0.1718)}
    for (successes, trials), ends in table.items():
        found = intervals.wilson(successes / trials, trials)
        assert (found.low, found.high) == pytest.approx(ends, abs=5e-5)
    assert intervals.wilson(15 / 148, 148).se == pytest.approx(math.sqrt(15 / 148 * 133 / 148 / 148))
    for p, trials in ((1.1, 5), (math.nan, 5), (0.5, 0)):
        with pytest.raises(ValueError, match=r"^p, trials: expected a number in \[0, 1\] and one > 0, got"):
            intervals.wilson(p, trials)


def test_wins_count_all_pairs_of_a_prompt_and_ties_half() -> None:
    # Prompt 0: 1>0, 1=1, 3>0, 3>1 -> 3.5/4. Prompt 1: 0<5, 0<6, 0<5, 0<6 -> 0.
    found = intervals.wins([[1.0, 3.0], [0.0, 0.0]], [[0.0, 1.0], [5.0, 6.0]])
    assert found.value == pytest.approx(3.5 / 8)
    turned = intervals.wins([[0.0, 1.0], [5.0, 6.0]], [[1.0, 3.0], [0.0, 0.0]])
    assert found.value + turned.value == pytest.approx(1.0)


def test_wins_do_not_mix_prompts() -> None:
    assert intervals.wins([[1.0], [10.0]], [[2.0], [11.0]]).value == 0.0


def estimate(low: float, high: float) -> Estimate:
    return Estimate((low + high) / 2, (high - low) / 3.92, low, high)


@pytest.mark.parametrize(
    ("score", "second", "tolerance", "flag"),
    [
        ((0.1, 0.5), (-0.5, -0.1), 0.0, True),
        ((-0.1, 0.5), (-0.5, -0.1), 0.0, None),  # the score may not have risen
        ((0.1, 0.5), (-0.5, 0.1), 0.0, None),  # the second reward may not have fallen
        ((-0.1, 0.5), (-0.5, 0.1), 0.0, None),
        ((0.1, 0.5), (0.1, 0.5), 0.0, False),  # both rose
        ((-0.5, -0.1), (-0.5, -0.1), 0.0, False),  # both fell
        ((0.1, 0.5), (-0.15, -0.1), 0.2, False),  # by less than is tolerated
        ((0.1, 0.5), (-0.5, -0.1), 0.2, None),  # by more or by less than is tolerated
        ((0.1, 0.5), (-0.5, -0.3), 0.2, True),
        ((0.1, 0.5), (0.0, 0.0), 0.0, False),  # the very same second rewards have not fallen
        ((0.0, 0.0), (-0.5, -0.1), 0.0, False),
    ],
)
def test_the_flag(score: tuple[float, float], second: tuple[float, float], tolerance: float, flag: bool | None) -> None:
    assert intervals.over_optimised(estimate(*score), estimate(*second), tolerance) is flag


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"^values: expected a row of numbers for each prompt"):
        intervals.mean([1.0, 2.0])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"^denominators: expected the shape of numerators, \(4, 2\), got \(1, 2\)"):
        intervals.ratio(ROWS, [[1.0, 1.0]])
    with pytest.raises(ValueError, match=r"^theirs: expected scores of 4 prompts, got 1"):
        intervals.wins(ROWS, [[1.0, 1.0]])
    with pytest.raises(ValueError, match=r"^other: expected a number of 4 prompts, got 1"):
        intervals.mean(ROWS) - intervals.mean([[1.0]])
    with pytest.raises(ValueError, match=r"^tolerance: expected a number >= 0, got -1"):
        intervals.over_optimised(estimate(0, 1), estimate(0, 1), -1)
    with pytest.raises(ValueError, match=r"^score_gain, second_gain: expected estimates from at least two prompts"):
        intervals.over_optimised(intervals.mean([[1.0]]).estimate(), estimate(0, 1))


def test_a_statistic_is_what_it_is_given() -> None:
    assert Statistic(1.0, np.array([1.0, 3.0])).se == pytest.approx(1.0)  # sqrt(1/2 · (1 + 1))
