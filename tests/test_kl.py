"""The estimators of the divergence: their means, and what each differentiates to, by enumerating the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agents import kl, losses
from tests import oracles

S, V = 3, 5


class States(NamedTuple):
    """Two laws over V actions at S states; every action of every state is one "token", weighted by its probability."""

    logits: Tensor
    ref_logits: Tensor

    def logprobs(self) -> tuple[Tensor, Tensor]:
        return torch.log_softmax(self.logits, -1), torch.log_softmax(self.ref_logits, -1)


@pytest.fixture
def states() -> States:
    generator = torch.Generator().manual_seed(3)
    logits, ref_logits = torch.randn(2, S, V, generator=generator, dtype=torch.float64)
    return States(logits.requires_grad_(), ref_logits)


def gradient(scalar: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(scalar, leaf, retain_graph=True)[0]


def divergence_gradient(logits: Tensor, ref_logits: Tensor, reverse: bool = False) -> Tensor:
    """∇ Σ_s KL by central differences of the float64 loop; shares nothing with autograd or with our code."""
    rows = []
    for row, ref in zip(logits.tolist(), ref_logits.tolist(), strict=True):

        def forward(point: list[float], ref: list[float] = ref) -> float:
            return oracles.kl(ref, point) if reverse else oracles.kl(point, ref)

        rows.append(oracles.numerical_gradient(forward, row))
    return torch.tensor(rows, dtype=torch.float64)


ATOL = 1e-9  # central differences at 1e-5 are good to about 1e-10


@settings(deadline=None, max_examples=80)
@given(st.floats(-6, 0), st.floats(-6, 0))
def test_estimators_equal_the_scalar_formulas(logprob: float, ref_logprob: float) -> None:
    tensors = torch.tensor([[logprob]]).double(), torch.tensor([[ref_logprob]]).double()
    found = [estimator(*tensors).item() for estimator in (kl.k1, kl.k2, kl.k3)]
    # k3 is a difference of numbers up to e^6 in float64.
    assert found == pytest.approx(oracles.k_estimators(*(x.item() for x in tensors)), abs=1e-12)
    assert found[1] >= 0 and found[2] >= -1e-15


def test_exact_equals_the_loop(states: States) -> None:
    found = kl.exact(*states).tolist()
    expected = [oracles.kl(p, q) for p, q in zip(states.logits.tolist(), states.ref_logits.tolist(), strict=True)]
    assert found == pytest.approx(expected, abs=1e-13)


def test_k1_and_k3_are_unbiased_and_k2_is_not(states: States) -> None:
    logprobs, ref_logprobs = states.logprobs()
    expected = kl.exact(*states)
    for estimator in (kl.k1, kl.k3):
        torch.testing.assert_close((logprobs.exp() * estimator(logprobs, ref_logprobs)).sum(-1), expected)
    bias = (logprobs.exp() * kl.k2(logprobs, ref_logprobs)).sum(-1) / expected - 1
    assert bias.abs().max() > 0.1


def test_k1_as_a_loss_has_gradient_zero(states: States) -> None:
    logprobs, ref_logprobs = states.logprobs()
    found = gradient((logprobs.detach().exp() * kl.k1(logprobs, ref_logprobs)).sum(), states.logits)
    assert found.abs().max() < 1e-15 * V
    assert divergence_gradient(*states).abs().max() > 0.1  # which is not the truth's


def test_k2_as_a_loss_has_the_gradient_of_the_kl_to_the_reference(states: States) -> None:
    logprobs, ref_logprobs = states.logprobs()
    found = gradient((logprobs.detach().exp() * kl.k2(logprobs, ref_logprobs)).sum(), states.logits)
    torch.testing.assert_close(found, divergence_gradient(*states), atol=ATOL, rtol=0)
    torch.testing.assert_close(found, gradient(kl.exact(*states).sum(), states.logits))


def test_k3_as_a_loss_has_the_gradient_of_the_reverse_kl(states: States) -> None:
    logprobs, ref_logprobs = states.logprobs()
    found = gradient((logprobs.detach().exp() * kl.k3(logprobs, ref_logprobs)).sum(), states.logits)
    torch.testing.assert_close(found, divergence_gradient(*states, reverse=True), atol=ATOL, rtol=0)


def test_no_target_is_another_or_its_negative(states: States) -> None:
    """Negative control: the two directions differ by far more than the tolerances above."""
    forward, reverse = divergence_gradient(*states), divergence_gradient(*states, reverse=True)
    assert (forward - reverse).norm() / forward.norm() > 0.1
    assert torch.cosine_similarity(forward.flatten(), -forward.flatten(), dim=0) < 0


def test_kl_loss_in_later_epochs_is_weighted_by_the_constant_ratio(states: States) -> None:
    """Tokens from another law π_old: weighted by π_old and times sg(ρ), the gradient is still that of the KL."""
    logprobs, ref_logprobs = states.logprobs()
    old_logits = states.logits.detach() + 0.5 * torch.randn(S, V, generator=torch.Generator().manual_seed(1)).double()
    old_logprobs = torch.log_softmax(old_logits, -1)
    weights = old_logprobs.exp()
    expected = divergence_gradient(*states)
    found = gradient((weights * losses.kl_loss(logprobs, ref_logprobs, old_logprobs=old_logprobs)).sum(), states.logits)
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)
    # Negative controls: no ratio at all, and a ratio that is differentiated too.
    unweighted = gradient((weights * losses.kl_loss(logprobs, ref_logprobs)).sum(), states.logits)
    assert (unweighted - expected).norm() / expected.norm() > 0.1
    live = (logprobs - old_logprobs).exp() * kl.k2(logprobs, ref_logprobs)
    assert (gradient((weights * live).sum(), states.logits) - expected).norm() / expected.norm() > 0.1


def test_kl_loss_on_policy_is_k2(states: States) -> None:
    logprobs, ref_logprobs = states.logprobs()
    expected = kl.k2(logprobs, ref_logprobs)
    assert torch.equal(losses.kl_loss(logprobs, ref_logprobs), expected)
    assert torch.equal(losses.kl_loss(logprobs, ref_logprobs, old_logprobs=logprobs), expected)


def test_exact_with_actions_excluded_under_both_laws(states: States) -> None:
    """A constraint renormalises both: equal to the divergence over the remaining actions, with a finite gradient."""
    excluded = torch.zeros(S, V, dtype=torch.bool)
    excluded[:, 1] = True
    found = kl.exact(*(x.masked_fill(excluded, -torch.inf) for x in states))
    rest = [i for i in range(V) if i != 1]
    torch.testing.assert_close(found, kl.exact(states.logits[:, rest], states.ref_logits[:, rest]))
    assert gradient(found.sum(), states.logits).isfinite().all()
    assert kl.exact(states.logits, states.ref_logits.masked_fill(excluded, -torch.inf)).isposinf().all()


def test_exact_of_half_precision_is_normalised_in_float32() -> None:
    logits = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = kl.exact(logits[:1], logits[1:])
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(oracles.kl(logits[0].tolist(), logits[1].tolist()), rel=1e-5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("estimator", [kl.k1, kl.k2, kl.k3, losses.kl_loss, kl.exact])
def test_nan_under_the_mask_changes_no_estimate_and_no_gradient(
    estimator: Callable[..., Tensor], poison: float
) -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    shape = (2, 3, V) if estimator is kl.exact else (2, 3)
    hidden = ~mask.view(2, 3, *[1] * (len(shape) - 2)).expand(shape)
    logprobs, ref_logprobs = -torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    results = []
    for hole in (0.0, poison):
        leaf = logprobs.masked_fill(hidden, hole).requires_grad_()
        found = estimator(leaf, ref_logprobs.masked_fill(hidden, hole), mask=mask)
        assert torch.equal(found[~mask], torch.zeros(3))
        results.append((found.detach(), gradient(found.sum(), leaf)))
    for clean, poisoned in zip(*results, strict=True):
        assert clean.isfinite().all() and torch.equal(clean, poisoned)


def test_errors_name_the_argument() -> None:
    for estimator in (kl.k1, kl.k2, kl.k3):
        with pytest.raises(ValueError, match=r"ref_logprobs: expected shape \(1, 3\) like logprobs, got \(1, 2\)"):
            estimator(torch.zeros(1, 3), torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"ref_logits: expected shape"):
        kl.exact(torch.zeros(1, 3), torch.zeros(1, 4))
