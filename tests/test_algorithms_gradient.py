"""Estimators, objectives and aggregations against the gradient of the objective, by enumerating the tiny text MDP.

The world is that of `tests/test_exact_gradient.py`: every response, or every pair of responses to one prompt, is a row
that is weighted by its detached probability. What is unbiased has the direction of ∇J; what is biased by design has the
size of its bias asserted, in bands measured over the three worlds and widened a little.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from agents import Rollout, algorithms, kl
from agents.algorithms import RECIPES, Algorithm, Estimator
from tests.test_exact_gradient import BETA, EXACT, T, World, cosine, relative_error


@pytest.fixture(params=range(3))
def world(request: pytest.FixtureRequest) -> World:
    return World.seeded(request.param)


@dataclass(frozen=True)
class Enumeration:
    """Rows of the world, one each or in pairs, as a rollout, and what each weighs."""

    rollout: Rollout
    rows: Tensor
    weights: Tensor

    @staticmethod
    def of(world: World, group_size: int = 1, charge: bool = True) -> Enumeration:
        n = len(world.mask)
        single = torch.arange(n)
        pairs = torch.cartesian_prod(single, single) if group_size == 2 else single[:, None]
        rows, mask = pairs.flatten(), world.mask
        weights = world.probabilities[:, 0][pairs].prod(1, keepdim=True).expand_as(pairs).flatten()
        logprobs = world.selected(world.logits.detach())
        flags = torch.zeros(len(rows), dtype=torch.bool)
        rewards = world.rewards(world.k1(), BETA if charge else 0.0)
        rollout = Rollout(
            ids=torch.zeros(len(rows), T + 1, dtype=torch.long),
            prompt_lengths=torch.ones(len(rows), dtype=torch.long),
            response_lengths=mask.sum(1)[rows],
            mask=mask[rows],
            rewards=rewards[rows],
            old_logprobs=logprobs[rows],
            behavior_logprobs=logprobs[rows],
            ref_logprobs=world.selected(world.ref_logits)[rows],
            entropy=torch.zeros(len(rows), T),
            values=world.wrong_values()[rows],
            bootstrap_values=torch.zeros(len(rows)).double(),
            scores=world.scores[rows],
            scored=~flags,
            truncated=flags,
            finish_reasons=flags.to(torch.int8),
            groups=torch.arange(len(pairs)).repeat_interleave(pairs.shape[1]),
            greedy=torch.full((len(rows),), 1.3).double(),  # a number of the prompt, which is one
            memory={"baseline": -0.8},
        )
        return Enumeration(rollout, rows, weights[:, None])

    def ascent(self, world: World, algorithm: Algorithm, beta: float = BETA) -> Tensor:
        """The direction in which the algorithm goes, on policy."""
        rollout = self.rollout
        logprobs = world.selected(world.logits)[self.rows]
        targets = algorithm.estimator(rollout, 1.0)
        loss = algorithm.objective(logprobs, rollout, targets.advantages)
        if algorithm.kl_loss is not None:
            loss = loss + beta * algorithm.kl_loss(logprobs, rollout)
        total = algorithm.aggregation(self.weights * loss, rollout.mask, 1.0)
        return -torch.autograd.grad(total, world.logits)[0]


def direction(world: World, algorithm: Algorithm) -> Tensor:
    return Enumeration.of(world, min(2, algorithm.group_size)).ascent(world, algorithm)


# What is unbiased: ∇J up to one positive factor, whatever the values, with the weights of the recipes.


def test_the_pairs_are_a_distribution(world: World) -> None:
    pairs = Enumeration.of(world, 2)
    assert float(pairs.weights.sum()) == pytest.approx(2.0)  # two rows a pair
    assert len(pairs.rollout.mask) == 3200


UNBIASED = ["reinforce", "reinforce_baseline", "reinforce++", "remax", "rloo", "dr_grpo"]


@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased_recipes_have_the_gradient_of_the_objective(world: World, name: str) -> None:
    assert cosine(direction(world, RECIPES[name]()), world.true_gradient()) >= 1 - EXACT


def plain(estimator: Estimator, objective: Any = None, aggregation: Any = None, **more: Any) -> Algorithm:
    objective = algorithms.PolicyGradient() if objective is None else objective
    aggregation = algorithms.TokenMean() if aggregation is None else aggregation
    return Algorithm(estimator, objective, aggregation, **more)


FACTORS: dict[str, tuple[Algorithm, float]] = {
    "running baseline": (plain(algorithms.RunningBaseline()), 1.0),
    "greedy baseline": (plain(algorithms.GreedyBaseline(), greedy=True), 1.0),
    "no baseline": (plain(algorithms.ReturnToGo()), 1.0),
    "a wrong value, λ = 1": (plain(algorithms.GAE(1.0), critic=algorithms.ValueLoss()), 1.0),
    "leave one out": (plain(algorithms.LeaveOneOut(), group_size=2), 2.0),  # two responses a pair
    "group mean": (plain(algorithms.GroupNormalized(std=False), group_size=2), 1.0),  # (n−1)/n of that
    "clipped surrogate": (plain(algorithms.ReturnToGo(), algorithms.Clipped(0.1, 0.3)), 1.0),
    "sequence ratio, token mean": (plain(algorithms.LeaveOneOut(), algorithms.SequenceClipped(), group_size=2), 2.0),
    "its token form": (
        plain(algorithms.ReturnToGo(), algorithms.SequenceClipped(per_token=True)),
        1.0,
    ),
    "fixed length": (plain(algorithms.ReturnToGo(), aggregation=algorithms.FixedLength()), 1.0),
}


@pytest.mark.parametrize("name", FACTORS)
def test_unbiased_components_even_in_size(world: World, name: str) -> None:
    algorithm, factor = FACTORS[name]
    assert relative_error(direction(world, algorithm), factor * world.true_gradient()) < EXACT


def test_decoupled_gae_is_exact_with_lambda_one_or_the_exact_values(world: World) -> None:
    rows = Enumeration.of(world)
    exact = Enumeration(Rollout(**{**vars(rows.rollout), "values": world.exact_values()}), rows.rows, rows.weights)
    for enumeration, lam in ((rows, 1.0), (exact, 0.5)):
        algorithm = plain(algorithms.DecoupledGAE(lam, 0.3), critic=algorithms.ValueLoss())
        assert relative_error(enumeration.ascent(world, algorithm), world.true_gradient()) < EXACT
    adaptive = plain(algorithms.LengthAdaptiveGAE(0.4), critic=algorithms.ValueLoss())
    assert (
        relative_error(exact.ascent(world, adaptive), world.true_gradient()) > 0.001
    )  # λ knows the future: the length


def test_the_kl_as_a_loss_is_the_gradient_at_fixed_states_beside_that_of_the_score(world: World) -> None:
    """Not ∇J: earlier tokens get no credit for the divergence of later states."""
    algorithm = plain(algorithms.ReturnToGo(), kl_loss=algorithms.ReferenceKL())
    found = Enumeration.of(world, charge=False).ascent(world, algorithm)
    per_state = kl.exact(world.logits, world.ref_logits)[world.states]
    cost = (world.probabilities * torch.where(world.mask, per_state, 0.0)).sum()
    expected = world.true_gradient(beta=0.0) - BETA * torch.autograd.grad(cost, world.logits)[0]
    assert relative_error(found, expected) < EXACT
    assert 0.05 < relative_error(found, world.true_gradient()) < 3.0
    twice = Enumeration.of(world, charge=True).ascent(world, algorithm)  # charged in the reward as well
    assert relative_error(twice, expected) > 0.1


# What is biased by design, and by how much.

BIASED: dict[str, tuple[Callable[[], Algorithm], float, float]] = {
    # Pairs: Â is ±√½, whatever the distance, so all that is left is who won.
    "grpo": (algorithms.grpo, 0.6, 0.82),
    "grpo, token mean": (lambda: plain(algorithms.GroupNormalized(), group_size=2), 0.8, 0.96),
    "gspo": (algorithms.gspo, 0.6, 0.82),
    "rloo, sequence mean": (
        lambda: plain(algorithms.LeaveOneOut(), aggregation=algorithms.SequenceMean(), group_size=2),
        0.9,
        0.998,
    ),
    # α = 1 and three tokens: λ is 0, ½ or ⅔, and the values are wrong by three scores.
    "vapo, wrong values": (algorithms.vapo, 0.3, 0.6),
}


@pytest.mark.parametrize("name", BIASED)
def test_biased_by_design(world: World, name: str) -> None:
    make, low, high = BIASED[name]
    found = cosine(direction(world, make()), world.true_gradient())
    assert low < found < high, found


# Negative controls.

BREAKS: dict[str, Callable[[World], Tensor]] = {
    "a baseline of the response itself": lambda w: _with(w, lambda r: _less(r, 2.0 * r.response_lengths)),
    "KL not at all": lambda w: Enumeration.of(w, charge=False).ascent(w, plain(algorithms.ReturnToGo())),
    "returns one slot late": lambda w: _with(w, lambda r: algorithms.ReturnToGo()(r, 1.0).advantages.roll(1, 1)),
    "the reward of each token alone": lambda w: _with(w, lambda r: r.rewards),
}


def _less(rollout: Rollout, baseline: Tensor) -> Tensor:
    return algorithms.ReturnToGo()(rollout, 1.0).advantages - baseline[:, None]


def _with(world: World, advantages: Callable[[Rollout], Tensor]) -> Tensor:
    return direction(world, plain(lambda rollout, gamma: algorithms.Targets(advantages(rollout))))


@pytest.mark.parametrize("name", BREAKS)
def test_broken_chains_are_caught(world: World, name: str) -> None:
    assert cosine(BREAKS[name](world), world.true_gradient()) < 0.98
