"""Losses, their reduction and their diagnostics: scalar oracles, gradients known in closed form, and invariances."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agents import diagnostics, losses
from tests import oracles

LOW_HIGH = st.tuples(st.sampled_from([0.1, 0.2]), st.sampled_from([None, 0.28]))
# Time says nothing about right or wrong on a shared machine.
generated = settings(deadline=None, max_examples=80)

# name -> loss of (x, constant, constant); x is what is trained.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "clipped surrogate": lambda x, a, b, **k: losses.clipped_surrogate(x, a, b, 0.2, **k),
    "dual clip": lambda x, a, b, **k: losses.clipped_surrogate(x, a, b, 0.2, dual_clip=3.0, **k),
    "policy gradient": lambda x, a, b, **k: losses.policy_gradient(x, a, **k),
    "clipped value": lambda x, a, b, **k: losses.clipped_value(x, a, b, 0.2, **k),
    "plain value": lambda x, a, b, **k: losses.clipped_value(x, a, b, None, **k),
    "kl": lambda x, a, b, **k: losses.kl_loss(x, a, old_logprobs=b, **k),
    "ratios": lambda x, a, b, **k: losses.importance_ratios(x, a, **k),
}
METRICS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "approx kl": lambda x, a, b, m: diagnostics.approx_kl(x, a, m),
    "clip fraction": lambda x, a, b, m: diagnostics.clip_fraction(x, a, b, 0.2, m),
    "value clip fraction": lambda x, a, b, m: diagnostics.value_clip_fraction(x, a, b, 0.2, m),
    "explained variance": lambda x, a, b, m: diagnostics.explained_variance(x, a, m),
}


def three_tables(seed: int = 0, rows: int = 4, length: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, a, b = torch.randn(3, rows, length, generator=generator, dtype=torch.float64)
    return x, a, b, torch.rand(rows, length, generator=generator) < 0.7


# Values.


@generated
@given(st.floats(-25, 25), st.floats(-5, 5), LOW_HIGH, st.sampled_from([None, 3.0]))
def test_clipped_surrogate_equals_the_scalar_formula(
    log_ratio: float, advantage: float, eps: tuple[float, float | None], dual_clip: float | None
) -> None:
    logprob, old, weight = (torch.tensor([[v]], dtype=torch.float64) for v in (log_ratio - 1, -1.0, advantage))
    found = losses.clipped_surrogate(logprob, old, weight, eps[0], clip_eps_high=eps[1], dual_clip=dual_clip)
    expected = oracles.clipped_surrogate(log_ratio - 1, -1.0, advantage, eps[0], eps[1], dual_clip)
    assert found.item() == pytest.approx(expected, rel=1e-12, abs=1e-300)


@generated
@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(-5, 5), st.sampled_from([None, 0.0, 0.2]))
def test_clipped_value_equals_the_scalar_formula(
    value: float, old_value: float, target: float, clip_eps: float | None
) -> None:
    tensors = (torch.tensor([[v]], dtype=torch.float64) for v in (value, old_value, target))
    found = losses.clipped_value(*tensors, clip_eps).item()
    assert found == pytest.approx(oracles.clipped_value(value, old_value, target, clip_eps), rel=1e-12, abs=1e-12)


def test_clipped_surrogate_by_hand() -> None:
    """All four corners: the minimum clips only where leaving the trust region looks profitable."""
    ratios = torch.tensor([[1.5, 1.5, 0.5, 0.5]])
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    found = losses.clipped_surrogate(ratios.log(), torch.zeros(1, 4), advantages, 0.2)
    torch.testing.assert_close(found, torch.tensor([[-1.2, 1.5, -0.5, 0.8]]))
    wider = losses.clipped_surrogate(ratios.log(), torch.zeros(1, 4), advantages, 0.2, clip_eps_high=0.4)
    torch.testing.assert_close(wider, torch.tensor([[-1.4, 1.5, -0.5, 0.8]]))
    bounded = losses.clipped_surrogate(torch.tensor([[9.0, 9.0]]).log(), torch.zeros(1, 2), -torch.ones(1, 2), 0.2)
    torch.testing.assert_close(bounded, torch.tensor([[9.0, 9.0]]))
    bounded = losses.clipped_surrogate(
        torch.tensor([[9.0, 2.0]]).log(), torch.zeros(1, 2), -torch.ones(1, 2), 0.2, dual_clip=3.0
    )
    torch.testing.assert_close(bounded, torch.tensor([[3.0, 2.0]]))


def test_clipped_value_by_hand() -> None:
    """From 0 towards a target of 2 with ε = ½: beyond ½ the error counts as if the value had stopped there."""
    found = losses.clipped_value(torch.tensor([[0.4, 1.0, 3.0]]), torch.zeros(1, 3), torch.full((1, 3), 2.0), 0.5)
    torch.testing.assert_close(found, torch.tensor([[0.5 * 1.6**2, 0.5 * 1.5**2, 0.5 * 1.5**2]]))


def test_ratios_stay_finite() -> None:
    found = losses.importance_ratios(torch.tensor([[1000.0, -1000.0]]), torch.zeros(1, 2))
    assert found.tolist() == [[pytest.approx(math.exp(20)), pytest.approx(math.exp(-20))]]


# Gradients.


def test_at_ratio_one_the_surrogate_has_the_gradient_of_policy_gradient() -> None:
    """An identity between two losses, where old and new policy are the same."""
    logprobs, _, advantages, _ = three_tables()
    for extra in ({}, {"dual_clip": 3.0}, {"clip_eps_high": 0.28}):
        gradients = []
        for loss in (
            lambda x, extra=extra: losses.clipped_surrogate(x, logprobs, advantages, 0.2, **extra),
            lambda x: losses.policy_gradient(x, advantages),
        ):
            leaf = logprobs.clone().requires_grad_()
            gradients.append(torch.autograd.grad(loss(leaf).sum(), leaf)[0])
        torch.testing.assert_close(gradients[0], gradients[1])
        torch.testing.assert_close(gradients[0], -advantages)


def test_clipped_tokens_have_no_gradient_and_the_others_all_of_it() -> None:
    ratios = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.1]])
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0]])
    leaf = ratios.log().requires_grad_()
    losses.clipped_surrogate(leaf, torch.zeros(1, 5), advantages, 0.2).sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, torch.tensor([[0.0, 1.5, -0.5, 0.0, -1.1]]))


@pytest.mark.parametrize("name", LOSSES)
def test_constants_receive_no_gradient(name: str) -> None:
    x, a, b, _ = (t.requires_grad_() if t.is_floating_point() else t for t in three_tables())
    LOSSES[name](x, a, b).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert a.grad is None and b.grad is None


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -1e30])
@pytest.mark.parametrize("name", LOSSES)
def test_nan_under_the_mask_changes_no_loss_and_no_gradient(name: str, poison: float) -> None:
    *tables, mask = three_tables()
    results = []
    for hole in (0.0, poison):
        leaf, a, b = (t.masked_fill(~mask, hole) for t in tables)
        leaf.requires_grad_()
        loss = losses.aggregate(LOSSES[name](leaf, a, b, mask=mask), mask)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for clean, poisoned in zip(*results, strict=True):
        assert clean is not None and clean.isfinite().all() and torch.equal(clean, poisoned)
    assert results[0][0] != 0


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "ratios"])
def test_without_a_mask_the_loss_is_the_same_where_it_counts(name: str) -> None:
    *tables, mask = three_tables()
    assert torch.equal(LOSSES[name](*tables)[mask], LOSSES[name](*tables, mask=mask)[mask])
    assert not LOSSES[name](*tables, mask=mask)[~mask].any()


# Reduction.


@generated
@given(st.integers(0, 1000), st.sampled_from(["token", "sequence"]), st.sampled_from([None, 7.5]))
def test_aggregate_equals_the_loop(seed: int, how: Literal["token", "sequence"], denominator: float | None) -> None:
    loss, _, _, mask = three_tables(seed)
    found = losses.aggregate(loss, mask, how, denominator).item()
    assert found == pytest.approx(oracles.aggregate(loss.tolist(), mask.tolist(), how, denominator), abs=1e-12)


@generated
@given(st.integers(0, 1000), st.sets(st.integers(1, 7)), st.sampled_from(["token", "sequence"]))
def test_aggregation_does_not_depend_on_microbatches(
    seed: int, cuts: set[int], how: Literal["token", "sequence"]
) -> None:
    """With the global count the parts add up to the whole, loss and gradient, however unequal the rows."""
    loss, _, _, mask = three_tables(seed, rows=8)
    count = (mask if how == "token" else mask.any(1)).sum().clamp(min=1)
    leaf = loss.requires_grad_()
    whole = losses.aggregate(leaf, mask, how)
    edges = [0, *sorted(cuts), 8]
    parts = torch.stack([losses.aggregate(leaf[i:j], mask[i:j], how, count) for i, j in pairwise(edges)]).sum()
    torch.testing.assert_close(parts, whole, atol=1e-12, rtol=0)
    gradients = [torch.autograd.grad(scalar, leaf)[0] for scalar in (whole, parts)]
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-12, rtol=0)


def test_mean_of_microbatch_means_would_depend_on_them() -> None:
    """Negative control: the reduction that several trainers have."""
    loss, mask = torch.tensor([[1.0, 1.0], [4.0, 0.0]]), torch.tensor([[True, True], [True, False]])
    assert losses.aggregate(loss, mask) == 2
    assert (losses.aggregate(loss[:1], mask[:1]) + losses.aggregate(loss[1:], mask[1:])) / 2 == 2.5


def test_aggregate_of_nothing_is_zero() -> None:
    loss = torch.full((2, 3), float("nan"), requires_grad=True)
    for how in ("token", "sequence"):
        found = losses.aggregate(loss, torch.zeros(2, 3, dtype=torch.bool), how)
        assert found == 0 and not torch.autograd.grad(found, loss)[0].any()


# Diagnostics.


def test_diagnostics_equal_the_loops() -> None:
    x, a, b, mask = three_tables(5)
    triples = list(zip(*(oracles.counted(t.tolist(), mask.tolist()) for t in (x, a, b)), strict=True))
    ratios = [math.exp(new - old) for new, old, _ in triples]
    k3 = oracles.mean([oracles.k_estimators(old, new)[2] for new, old, _ in triples])
    assert diagnostics.approx_kl(x, a, mask).item() == pytest.approx(k3)
    clipped = [(r > 1.28 and adv > 0) or (r < 0.8 and adv < 0) for r, (_, _, adv) in zip(ratios, triples, strict=True)]
    found = diagnostics.clip_fraction(x, a, b, 0.2, mask, clip_eps_high=0.28)
    assert 0 < sum(clipped) < len(clipped) and found.item() == pytest.approx(sum(clipped) / len(clipped))
    clipped = [oracles.clipped_value(*t, 0.2) > oracles.clipped_value(*t, None) for t in triples]
    found = diagnostics.value_clip_fraction(x, a, b, 0.2, mask)
    assert 0 < sum(clipped) < len(clipped) and found.item() == pytest.approx(sum(clipped) / len(clipped))
    unexplained = oracles.variance([target - value for value, target, _ in triples], unbiased=False)
    explained = 1 - unexplained / oracles.variance([target for _, target, _ in triples], unbiased=False)
    assert diagnostics.explained_variance(x, a, mask).item() == pytest.approx(explained)


def test_approx_kl_estimates_the_divergence_from_the_old_policy() -> None:
    """By enumeration: weighted by π_old, the mean over all actions is KL(π_old‖π), and not the other direction."""
    logits, old_logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).double()
    new, old = (torch.log_softmax(x, -1) for x in (logits, old_logits))
    one = torch.ones(1, 1, dtype=torch.bool)
    mean = sum(old[i].exp() * diagnostics.approx_kl(new[i].view(1, 1), old[i].view(1, 1), one) for i in range(6))
    assert float(mean) == pytest.approx(oracles.kl(old_logits.tolist(), logits.tolist()), rel=1e-12)
    assert float(mean) != pytest.approx(oracles.kl(logits.tolist(), old_logits.tolist()), rel=0.01)


def test_diagnostics_before_the_first_optimizer_step() -> None:
    x, _, b, mask = three_tables()
    assert diagnostics.approx_kl(x, x, mask) == 0
    assert diagnostics.clip_fraction(x, x, b, 0.2, mask) == 0
    assert diagnostics.value_clip_fraction(x, x, b, 0.2, mask) == 0


def test_explained_variance_of_perfect_constant_and_opposite_values() -> None:
    targets, mask = torch.tensor([[1.0, 2.0, 4.0]]), torch.ones(1, 3, dtype=torch.bool)
    assert diagnostics.explained_variance(targets, targets, mask) == 1
    assert diagnostics.explained_variance(targets + 5, targets, mask) == 1
    assert diagnostics.explained_variance(torch.full((1, 3), 7.0), targets, mask).item() == pytest.approx(0, abs=1e-6)
    assert diagnostics.explained_variance(-targets, targets, mask).item() == pytest.approx(-3)
    assert diagnostics.explained_variance(targets, torch.full((1, 3), 0.1), mask) == 0


@pytest.mark.parametrize("count", [1, 7, 100, 4097])
def test_explained_variance_of_constant_returns_is_zero_and_not_rounding(count: int) -> None:
    """The mean of many 0.1 is not 0.1 in float32; what is left over is no variance."""
    mask = torch.ones(1, count, dtype=torch.bool)
    values = torch.linspace(-1, 1, count).unsqueeze(0)
    assert diagnostics.explained_variance(values, torch.full((1, count), 0.1), mask) == 0


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -1e30])
@pytest.mark.parametrize("name", METRICS)
def test_nan_under_the_mask_changes_no_metric(name: str, poison: float) -> None:
    *tables, mask = three_tables()
    results = [float(METRICS[name](*(t.masked_fill(~mask, hole) for t in tables), mask)) for hole in (0, poison)]
    assert results[0] == results[1] and math.isfinite(results[0])


@pytest.mark.parametrize("name", METRICS)
def test_metrics_of_nothing_are_finite(name: str) -> None:
    *tables, mask = three_tables()
    assert float(METRICS[name](*tables, torch.zeros_like(mask))) in (0.0, 1.0)


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.clipped_surrogate(X, X, X[:1], 0.2), r"advantages: expected shape \(2, 3\) like logprobs"),
        (lambda: losses.clipped_surrogate(X, X, X, -0.2), r"clip_eps: expected a non-negative number, got -0.2"),
        (lambda: losses.clipped_surrogate(X, X, X, 0.2, clip_eps_high=-1), r"clip_eps_high: expected a non-neg"),
        (lambda: losses.clipped_surrogate(X, X, X, 0.2, dual_clip=0.5), r"dual_clip: expected a number above 1"),
        (lambda: losses.clipped_value(X, X, X, -1), r"clip_eps: expected a non-negative number, got -1"),
        (lambda: losses.clipped_value(X, X[:1], X, 0.2), r"old_values: expected shape"),
        (lambda: losses.policy_gradient(X, X[:1]), r"advantages: expected shape"),
        (lambda: losses.kl_loss(X, X[:1]), r"ref_logprobs: expected shape"),
        (lambda: losses.aggregate(X, X > 0, "mean"), r"""how: expected "token" or "sequence", got 'mean'"""),
        (lambda: losses.aggregate(X, X > 0, denominator=0), r"denominator: expected a positive count, got 0"),
        (lambda: diagnostics.explained_variance(X, X[:1], X > 0), r"returns: expected shape"),
    ],
)
def test_errors_name_the_argument(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
