"""Advantages and returns against sums written out, hand numbers, and identities between the formulas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agents import masked, returns
from tests import oracles

# Time says nothing about right or wrong on a shared machine.
generated = settings(deadline=None, max_examples=80)


@dataclass(frozen=True)
class Case:
    """Rows of several episodes, with holes and padding."""

    rewards: Tensor
    values: Tensor
    mask: Tensor
    endings: list[list[str]]
    bootstraps: Tensor
    gamma: float
    lam: float

    def ends_as(self, ending: str) -> Tensor:
        return torch.tensor([[e == ending for e in row] for row in self.endings])


def table_strategy(rows: int, length: int) -> st.SearchStrategy[Tensor]:
    cells = st.lists(st.floats(-4, 4, width=16), min_size=rows * length, max_size=rows * length)
    return cells.map(lambda numbers: torch.tensor(numbers, dtype=torch.float64).view(rows, length))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    flags = st.lists(st.booleans(), min_size=length, max_size=length)
    ends = st.lists(st.sampled_from(["", "", "terminated", "truncated"]), min_size=length, max_size=length)
    return Case(
        rewards=draw(table_strategy(rows, length)),
        values=draw(table_strategy(rows, length)),
        mask=torch.tensor(draw(st.lists(flags, min_size=rows, max_size=rows))),
        endings=draw(st.lists(ends, min_size=rows, max_size=rows)),
        bootstraps=draw(table_strategy(rows, length)),
        gamma=draw(st.sampled_from([1.0, 0.9])),
        lam=draw(st.sampled_from([0.0, 0.5, 0.95, 1.0])),
    )


def expected_advantages(case: Case) -> Tensor:
    columns = (case.rewards, case.values, case.mask, case.endings, case.bootstraps)
    rows = zip(*(c if isinstance(c, list) else c.tolist() for c in columns), strict=True)
    return torch.tensor([oracles.advantages_of_row(*row, case.gamma, case.lam) for row in rows], dtype=torch.float64)


def advantages_with(case: Case, rewards: Tensor, values: Tensor, **changes: Tensor) -> Tensor:
    """Our way from data to advantages; `changes` break one boundary on purpose."""
    found = returns.step_boundaries(
        case.mask,
        case.ends_as("terminated"),
        case.ends_as("truncated"),
        case.bootstraps,
        values,
        case.gamma,
        case.lam,
    )._replace(**changes)
    return masked.clean(returns.gae(rewards, values, *found), case.mask)


@generated
@given(cases())
def test_gae_equals_the_sum_over_episodes(case: Case) -> None:
    """Termination, truncation, resets within a row, skipped slots and padding, without any branch in `gae`."""
    rewards, values = masked.clean(case.rewards, case.mask), masked.clean(case.values, case.mask)
    # float64 sums of at most nine terms below 20.
    torch.testing.assert_close(advantages_with(case, rewards, values), expected_advantages(case), atol=1e-11, rtol=0)


@generated
@given(cases())
def test_skipped_slots_refer_to_the_values_that_gae_is_given(case: Case) -> None:
    """Values under the mask may also be left as they are, as long as the same tensor goes to both."""
    rewards = masked.clean(case.rewards, case.mask)
    torch.testing.assert_close(
        advantages_with(case, rewards, case.values), expected_advantages(case), atol=1e-11, rtol=0
    )


@generated
@given(st.data())
def test_gae_vectorised_equals_loop(data: st.DataObject) -> None:
    """Any discounts and λ per slot, zeros among them."""
    rows, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 17))
    rewards, values, next_values = (data.draw(table_strategy(rows, length)) for _ in range(3))
    weights = st.lists(st.sampled_from([0.0, 0.5, 0.9, 1.0]), min_size=rows * length, max_size=rows * length)
    discounts, lambdas = (torch.tensor(data.draw(weights)).double().view(rows, length) for _ in range(2))
    columns = (rewards, values, next_values, discounts, lambdas)
    loop = [oracles.gae_loop(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]
    torch.testing.assert_close(returns.gae(*columns), torch.tensor(loop, dtype=torch.float64), atol=1e-11, rtol=0)
    sums = [oracles.discounted_returns(r, d, 0.7) for r, d in zip(rewards.tolist(), discounts.tolist(), strict=True)]
    bootstrap = torch.full((rows,), 0.7, dtype=torch.float64)
    found = returns.discounted_returns(rewards, discounts, bootstrap)
    torch.testing.assert_close(found, torch.tensor(sums, dtype=torch.float64), atol=1e-11, rtol=0)


def test_gae_by_hand() -> None:
    """The last reward 1, V = 1, 2, 3, γ = 1, λ = ½: δ = (2 - 1, 3 - 2, 1 - 3) = (1, 1, -2)."""
    values, mask = torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3, dtype=torch.bool)
    found = returns.masked_gae(torch.tensor([[0.0, 0.0, 1.0]]), values, mask, gamma=1.0, gae_lambda=0.5)
    assert found.advantages.tolist() == [[1.0, 0.0, -2.0]]
    assert found.returns.tolist() == [[2.0, 2.0, 1.0]]


def test_termination_pays_nothing_after_and_truncation_bootstraps_by_hand() -> None:
    values, mask = torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool)
    cut, bootstrap = torch.tensor([False, True]), torch.tensor([float("nan"), 10.0])
    found = returns.masked_gae(
        torch.ones(2, 2), values, mask, gamma=0.5, gae_lambda=1.0, truncated=cut, bootstrap_values=bootstrap
    )
    # Terminated: 1 + ½, 1. Truncated: the last is 1 + ½·10 = 6, the first 1 + ½·6. A NaN bootstrap is not read.
    assert found.advantages.tolist() == [[1.5, 1.0], [4.0, 6.0]]


def test_boundaries_as_data() -> None:
    """The table of the design, one row per kind of slot."""
    mask = torch.tensor([[True, False, True, True, True, False]])
    terminated = torch.tensor([[False, False, True, False, False, False]])
    truncated = torch.tensor([[False, False, False, False, True, False]])
    values = torch.arange(1.0, 7.0).unsqueeze(0)
    found = returns.step_boundaries(mask, terminated, truncated, torch.full((1, 6), 9.0), values, 0.5, 0.25)
    assert found.next_values.tolist() == [[3.0, 2.0, 0.0, 5.0, 9.0, 6.0]]
    assert found.discounts.tolist() == [[0.5, 1.0, 0.0, 0.5, 0.5, 1.0]]
    assert found.lambdas.tolist() == [[0.25, 1.0, 0.25, 0.25, 0.0, 1.0]]


def test_termination_wins_over_truncation() -> None:
    """Gymnasium allows both flags at once; the score was paid, so nothing is bootstrapped."""
    here, values = torch.tensor([[True, True]]), torch.tensor([[1.0, 2.0]])
    found = returns.step_boundaries(here, here, here, torch.full((1, 2), 9.0), values, 0.5, 0.25)
    assert found.next_values.tolist() == [[0.0, 0.0]] and found.discounts.tolist() == [[0.0, 0.0]]


@generated
@given(cases())
def test_rows_of_one_episode_equal_the_general_boundaries(case: Case) -> None:
    cut, bootstrap = case.ends_as("truncated")[:, 0], case.bootstraps[:, 0]
    found = returns.masked_gae(
        case.rewards,
        case.values,
        case.mask,
        gamma=case.gamma,
        gae_lambda=case.lam,
        truncated=cut,
        bootstrap_values=bootstrap,
    )
    for row in range(len(cut)):
        slots = case.mask[row].nonzero().flatten().tolist()
        expected = oracles.advantages_of_episode(
            case.rewards[row, slots].tolist(),
            case.values[row, slots].tolist(),
            case.gamma,
            case.lam,
            bootstrap[row].item() if cut[row] else None,
        )
        assert found.advantages[row, slots].tolist() == pytest.approx(expected, abs=1e-11)
    outside = torch.zeros_like(found.advantages)
    assert torch.equal(torch.where(case.mask, outside, found.advantages), outside)
    assert torch.equal(torch.where(case.mask, outside, found.returns), outside)


@generated
@given(cases(), st.sampled_from([float("nan"), float("inf"), 1e30]))
def test_nan_under_the_mask_changes_no_advantage_and_no_gradient(case: Case, poison: float) -> None:
    results = []
    for hole in (0.0, poison):
        leaf = torch.where(case.mask, case.values, hole).requires_grad_()
        rewards = torch.where(case.mask, case.rewards, hole)
        found = returns.masked_gae(rewards, leaf, case.mask, gamma=case.gamma, gae_lambda=case.lam)
        (found.advantages**2).sum().backward()
        results.append((*found, leaf.grad))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


@generated
@given(cases())
def test_padding_changes_nothing(case: Case) -> None:
    rows = case.mask.shape[0]
    plain = returns.masked_gae(case.rewards, case.values, case.mask, gamma=case.gamma, gae_lambda=case.lam)
    for sides in ((0, 3), (2, 0)):
        rewards, values = (torch.nn.functional.pad(x, sides, value=7.0) for x in (case.rewards, case.values))
        mask = torch.nn.functional.pad(case.mask, sides, value=False)
        padded = returns.masked_gae(rewards, values, mask, gamma=case.gamma, gae_lambda=case.lam)
        inside = slice(sides[0], sides[0] + case.mask.shape[1])
        assert rows == len(padded.advantages)
        # The doubling groups the terms otherwise in a longer row: rounding only.
        torch.testing.assert_close(padded.advantages[:, inside], plain.advantages, atol=1e-12, rtol=0)


@generated
@given(cases())
def test_with_lambda_one_advantage_plus_value_is_the_discounted_return(case: Case) -> None:
    """An identity between two formulas, with a bootstrap and without."""
    length = case.rewards.shape[1]
    everything = torch.ones_like(case.mask)
    for bootstrap in (None, case.bootstraps[:, 0]):
        cut = None if bootstrap is None else torch.ones_like(everything[:, 0])
        found = returns.masked_gae(
            case.rewards,
            case.values,
            everything,
            gamma=case.gamma,
            gae_lambda=1.0,
            truncated=cut,
            bootstrap_values=bootstrap,
        )
        expected = returns.discounted_returns(case.rewards, case.gamma, bootstrap)
        torch.testing.assert_close(found.returns, expected, atol=1e-11 * length, rtol=0)


def test_returns_come_before_whitening() -> None:
    """The targets are advantage + value of the raw advantages, whatever happens to those afterwards."""
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 5).double() * 9, torch.randn(2, 5).double()
    mask = torch.ones(2, 5, dtype=torch.bool)
    found = returns.masked_gae(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
    white = masked.whiten(found.advantages, mask)
    expected = torch.tensor(
        [oracles.discounted_returns(row, [1.0] * 5) for row in rewards.tolist()], dtype=torch.float64
    )
    torch.testing.assert_close(found.returns, expected, atol=1e-11, rtol=0)
    # Negative control: formed after whitening they are far off.
    assert (white + values - expected).abs().max() > 1


def test_the_oracle_catches_wrong_boundaries() -> None:
    """Negative controls: each boundary broken alone moves an advantage by more than a rounding."""
    case = Case(
        rewards=torch.tensor([[1.0, 0.0, 2.0, -1.0, 3.0]]).double(),
        values=torch.tensor([[0.5, 4.0, -1.0, 2.0, 1.0]]).double(),
        mask=torch.tensor([[True, False, True, True, True]]),
        endings=[["", "", "terminated", "", "truncated"]],
        bootstraps=torch.full((1, 5), 5.0).double(),
        gamma=0.9,
        lam=0.8,
    )
    expected = expected_advantages(case)
    right = advantages_with(case, masked.clean(case.rewards, case.mask), case.values)
    torch.testing.assert_close(right, expected, atol=1e-12, rtol=0)
    one = torch.ones_like(case.values)
    wrong: dict[str, Tensor] = {
        "the next slot as successor": advantages_with(
            case, case.rewards, case.values, next_values=case.values.roll(-1)
        ),
        "no termination": advantages_with(case, case.rewards, case.values, discounts=0.9 * one),
        "skipped slots zeroed": advantages_with(case, case.rewards, case.values, discounts=0.9 * case.mask),
        "skipped slots decayed": advantages_with(case, case.rewards, case.values, lambdas=0.8 * one),
        "rewards one slot late": advantages_with(case, case.rewards.roll(1), case.values),
    }
    for name, found in wrong.items():
        assert (found - expected).abs().max() > 0.01, name


@generated
@given(cases(), st.integers(-20, 20))
def test_advantages_scale_exactly_with_powers_of_two(case: Case, power: int) -> None:
    factor = 2.0**power
    plain = returns.masked_gae(case.rewards, case.values, case.mask, gamma=0.9, gae_lambda=0.8)
    scaled = returns.masked_gae(case.rewards * factor, case.values * factor, case.mask, gamma=0.9, gae_lambda=0.8)
    assert torch.equal(plain.advantages * factor, scaled.advantages)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: returns.gae(x, x[:, :2], x, 1.0, 1.0),
            r"values: expected shape \(2, 3\) like rewards, got \(2, 2\)",
        ),
        (lambda x: returns.gae(x[0], x[0], x[0], 1.0, 1.0), r"rewards: expected shape \[B, T\], got \(3,\)"),
        (lambda x: returns.gae(x, x, x, x[:1], 1.0), r"discounts: expected shape"),
        (lambda x: returns.discounted_returns(x, 1.0, x[0]), r"bootstrap: expected shape \(2,\)"),
        (lambda x: returns.boundaries(x > 0, x[:, 0] > 0, None, x, 1.0, 1.0), r"bootstrap_values: expected one value"),
        (lambda x: returns.boundaries(x > 0, x > 0, x[:, 0], x, 1.0, 1.0), r"truncated: expected shape \(2,\)"),
    ],
)
def test_errors_name_the_argument(call: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3))
