"""The whole chain, reward to loss, against the gradient of the objective, by enumerating a tiny text MDP.

V = 4 tokens, one of them the stop token, at most T = 3 of them: 13 states, 40 responses of lengths 1 to 3. The policy
is a table of float64 logits per prefix. Every response is a row, weighted by its detached probability, so expectations
are sums and nothing is left to chance. The objective is J = Σ_y π(y) (score(y) - β Σₜ log π/π_ref).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from torch import Tensor

from agents import kl, losses, masked, returns
from tests import oracles

V, T, STOP, BETA = 4, 3, 3, 0.7
RESPONSES = oracles.all_responses(V, T, STOP)
PREFIXES = sorted({response[:t] for response in RESPONSES for t in range(len(response))})
EXACT = 1e-10  # float64 sums of 40 rows: 1 - cosine comes out near 1e-16


@dataclass(frozen=True)
class World:
    """Policy, reference and scores, with what is derived from them; N rows, one per response."""

    logits: Tensor
    ref_logits: Tensor
    scores: Tensor

    @staticmethod
    def seeded(seed: int) -> World:
        generator = torch.Generator().manual_seed(seed)
        logits, ref_logits = torch.randn(2, len(PREFIXES), V, generator=generator, dtype=torch.float64)
        scores = torch.randn(len(RESPONSES), generator=generator, dtype=torch.float64)
        return World(logits.requires_grad_(), ref_logits, scores)

    @property
    def mask(self) -> Tensor:
        return torch.tensor([[t < len(y) for t in range(T)] for y in RESPONSES])

    @property
    def states(self) -> Tensor:
        """Row of the tables for each slot; 0 in padding."""
        return torch.tensor([[PREFIXES.index(y[:t]) if t < len(y) else 0 for t in range(T)] for y in RESPONSES])

    def selected(self, logits: Tensor) -> Tensor:
        """Log-probs of the tokens, NaN in padding: none of it may be read."""
        actions = torch.tensor([[*y, *[0] * (T - len(y))] for y in RESPONSES])
        logprobs = torch.log_softmax(logits, -1)[self.states, actions]
        return torch.where(self.mask, logprobs, torch.nan)

    @property
    def probabilities(self) -> Tensor:
        """π(y), detached, `[N, T]`."""
        total = torch.where(self.mask, self.selected(self.logits.detach()), 0.0).sum(1)
        return total.exp().unsqueeze(1).expand(-1, T)

    @property
    def last(self) -> Tensor:
        """Bool `[N, T]`, the last token of each response."""
        return torch.tensor([[t == len(y) - 1 for t in range(T)] for y in RESPONSES])

    def rewards(self, divergence: Tensor, beta: float = BETA) -> Tensor:
        """Score on the last token, minus β times a divergence per slot."""
        return torch.where(self.last, self.scores.unsqueeze(1), 0.0) - beta * divergence.detach()

    def k1(self) -> Tensor:
        return kl.k1(self.selected(self.logits), self.selected(self.ref_logits), mask=self.mask)

    def exact_values(self) -> Tensor:
        """V(s) = E[sum of rewards from s on], by conditional expectation over the responses through s, `[N, T]`."""
        weights = self.probabilities * self.mask
        to_go = (self.rewards(self.k1()) * self.mask).flip(1).cumsum(1).flip(1)
        table = torch.zeros(2, len(PREFIXES), dtype=torch.float64)
        for row, cells in zip(table, (weights * to_go, weights), strict=True):
            row.index_add_(0, self.states[self.mask], cells[self.mask])
        return (table[0] / table[1])[self.states]

    def wrong_values(self) -> Tensor:
        """A function of the state and of nothing else."""
        table = 3 * torch.randn(len(PREFIXES), generator=torch.Generator().manual_seed(99), dtype=torch.float64)
        return table[self.states]

    def policy_gradient(
        self,
        rewards: Tensor,
        values: Tensor,
        lam: float = 1.0,
        whiten: bool = False,
        how: Literal["token", "sequence"] = "token",
        shift: int = 0,
        extra_loss: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The *ascent* direction that our chain finds; `shift` moves advantages by slots, as a negative control."""
        mask, weights = self.mask, self.probabilities if weights is None else weights
        advantages = returns.masked_gae(rewards, values, mask, gamma=1.0, gae_lambda=lam).advantages.roll(shift, 1)
        if whiten:
            advantages = masked.whiten(advantages, mask, weights=weights)
        logprobs = self.selected(self.logits)
        loss = losses.clipped_surrogate(logprobs, logprobs.detach(), advantages, 0.2, mask=mask)
        loss = loss if extra_loss is None else loss + extra_loss
        total = losses.aggregate(weights * loss, mask, how, 1.0)
        return -torch.autograd.grad(total, self.logits)[0]

    def true_gradient(self, beta: float = BETA, score_coef: float = 1.0) -> Tensor:
        """∇J by autograd through the plain definition; `test_true_gradient_...` ties it to the loop."""
        logprobs, ref_logprobs = (torch.where(self.mask, self.selected(x), 0.0) for x in (self.logits, self.ref_logits))
        payoff = score_coef * self.scores - beta * (logprobs - ref_logprobs).sum(1)
        return torch.autograd.grad((logprobs.sum(1).exp() * payoff).sum(), self.logits)[0]


@pytest.fixture(params=range(3))
def world(request: pytest.FixtureRequest) -> World:
    return World.seeded(request.param)


def cosine(a: Tensor, b: Tensor) -> float:
    return (a.flatten() @ b.flatten() / a.norm() / b.norm()).item()


def relative_error(found: Tensor, truth: Tensor) -> float:
    return ((found - truth).norm() / truth.norm()).item()


# The ground that the rest stands on.


def test_the_enumeration_is_the_whole_mdp(world: World) -> None:
    assert len(RESPONSES) == 40 and len(PREFIXES) == 13
    assert sorted({len(y) for y in RESPONSES}) == [1, 2, 3]
    assert world.probabilities[:, 0].sum().item() == pytest.approx(1, abs=1e-14)


def test_true_gradient_equals_central_differences_of_the_loop(world: World) -> None:
    """Ties the expectation of this file to a float64 loop that knows neither torch nor our code."""

    def objective(flat: list[float]) -> float:
        rows = {prefix: flat[V * i : V * i + V] for i, prefix in enumerate(PREFIXES)}
        refs = dict(zip(PREFIXES, world.ref_logits.tolist(), strict=True))
        return oracles.regularised_return(rows, refs, dict(zip(RESPONSES, world.scores.tolist(), strict=True)), BETA)

    expected = oracles.numerical_gradient(objective, world.logits.flatten().tolist())
    assert world.true_gradient().flatten().tolist() == pytest.approx(expected, abs=1e-9)


# What is exact.


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize(
    ("values", "lam"),
    [("none", 1.0), ("wrong", 1.0), ("exact", 1.0), ("exact", 0.95), ("exact", 0.5), ("exact", 0.0)],
)
def test_gradient_is_exact(world: World, values: str, lam: float, whiten: bool) -> None:
    """λ = 1 with any V, any λ with the exact V, whitened or not: ∇J up to one positive factor."""
    table = {"none": torch.zeros(40, T).double(), "wrong": world.wrong_values(), "exact": world.exact_values()}[values]
    found, truth = world.policy_gradient(world.rewards(world.k1()), table, lam, whiten), world.true_gradient()
    assert cosine(found, truth) >= 1 - EXACT
    if not whiten:  # then even the factor is known
        assert relative_error(found, truth) < EXACT


def test_gradient_is_exact_whatever_the_microbatches(world: World) -> None:
    """Rows in parts, each reduced by the global count, summed."""
    rewards, logprobs, mask = world.rewards(world.k1()), world.selected(world.logits), world.mask
    advantages = returns.masked_gae(rewards, world.wrong_values(), mask, gamma=1.0, gae_lambda=1.0).advantages
    total = torch.zeros((), dtype=torch.float64)
    for part in torch.arange(40).split([1, 2, 17, 20]):
        loss = losses.clipped_surrogate(logprobs[part], logprobs[part].detach(), advantages[part], 0.2, mask=mask[part])
        total = total + losses.aggregate(world.probabilities[part] * loss, mask[part], "token", mask.sum())
    found = -torch.autograd.grad(total, world.logits)[0]
    assert cosine(found, world.true_gradient()) >= 1 - EXACT


def later_kl(world: World) -> Tensor:
    """KL of the *next* state of each slot, `[N, T]`; 0 after the last."""
    per_state = kl.exact(world.logits, world.ref_logits)[world.states] * world.mask
    return torch.cat([per_state[:, 1:], torch.zeros(40, 1).double()], dim=1)


def test_exact_kl_of_later_states_as_reward_plus_kl_of_this_state_as_loss_is_exact(world: World) -> None:
    here = kl.exact(world.logits, world.ref_logits)[world.states]
    found = world.policy_gradient(world.rewards(later_kl(world)), world.wrong_values(), extra_loss=BETA * here)
    assert relative_error(found, world.true_gradient()) < EXACT
    # Either half alone is not.
    half = world.policy_gradient(world.rewards(later_kl(world)), world.wrong_values())
    assert relative_error(half, world.true_gradient()) > 0.1


def test_k2_as_a_loss_is_the_gradient_of_the_kl_at_fixed_states(world: World) -> None:
    """Over whole sequences: states visited as they are, and no credit to earlier tokens."""
    logprobs, mask = world.selected(world.logits), world.mask
    loss = losses.kl_loss(logprobs, world.selected(world.ref_logits), mask=mask)
    found = torch.autograd.grad((world.probabilities * loss).sum(), world.logits)[0]
    per_state = kl.exact(world.logits, world.ref_logits)[world.states]
    fixed = torch.autograd.grad((world.probabilities * masked.clean(per_state, mask)).sum(), world.logits)[0]
    assert relative_error(found, fixed) < EXACT
    assert relative_error(found, -world.true_gradient(1.0, score_coef=0.0)) > 0.1


# What is not, and by how much. Bands were measured over these three worlds and widened a little.


def divergences(world: World) -> dict[str, Tensor]:
    pair = world.selected(world.logits), world.selected(world.ref_logits)
    per_state = kl.exact(world.logits, world.ref_logits)[world.states]
    return {
        "k2": kl.k2(*pair, mask=world.mask),
        "k3": kl.k3(*pair, mask=world.mask),
        "exact": masked.clean(per_state, world.mask),
    }


@pytest.mark.parametrize(("name", "low", "high"), [("k2", 0.7, 1.5), ("k3", 1.0, 2.2), ("exact", 1.1, 1.75)])
def test_other_divergences_in_the_reward_are_biased(world: World, name: str, low: float, high: float) -> None:
    """Relative error of the gradient of the divergence term alone: as long as the truth itself."""
    zero = torch.zeros_like(world.scores)
    alone = World(world.logits, world.ref_logits, zero)
    truth = alone.true_gradient()
    right = alone.policy_gradient(alone.rewards(alone.k1()), alone.wrong_values())
    assert relative_error(right, truth) < EXACT
    found = alone.policy_gradient(alone.rewards(divergences(alone)[name]), alone.wrong_values())
    assert low < relative_error(found, truth) < high


@pytest.mark.parametrize(("lam", "low", "high"), [(0.95, 0.15, 0.45), (0.5, 1.5, 4.0)])
def test_lambda_below_one_with_a_wrong_value_is_biased(world: World, lam: float, low: float, high: float) -> None:
    """Little at 0.95 (cosine above 0.93), hopelessly at 0.5, for values that are wrong by three scores."""
    found, truth = world.policy_gradient(world.rewards(world.k1()), world.wrong_values(), lam), world.true_gradient()
    assert low < relative_error(found, truth) < high
    assert (cosine(found, truth) > 0.93) == (lam == 0.95)


@pytest.mark.parametrize(("values", "low", "high"), [("exact", 0.9, 0.995), ("none", 0.7, 0.82)])
def test_sequence_mean_aggregation_is_biased(world: World, values: str, low: float, high: float) -> None:
    """A token's weight of 1 / length turns the direction; good values soften it, because A is then small."""
    table = world.exact_values() if values == "exact" else torch.zeros(40, T).double()
    found = world.policy_gradient(world.rewards(world.k1()), table, how="sequence")
    assert low < cosine(found, world.true_gradient()) < high


# Negative controls: the errors that these tests exist for.

BREAKS: dict[str, Callable[[World], Tensor]] = {
    "KL with the wrong sign": lambda w: w.policy_gradient(w.rewards(-w.k1()), w.exact_values()),
    "KL twice": lambda w: w.policy_gradient(w.rewards(2 * w.k1()), w.exact_values()),
    "KL not at all": lambda w: w.policy_gradient(w.rewards(0 * w.k1()), w.exact_values()),
    "KL one slot late": lambda w: w.policy_gradient(w.rewards(w.k1().roll(1, 1)), w.exact_values()),
    "advantages one slot late": lambda w: w.policy_gradient(w.rewards(w.k1()), w.exact_values(), shift=1),
    "values one slot late": lambda w: w.policy_gradient(w.rewards(w.k1()), w.exact_values().roll(1, 1), 0.5),
    "values of the next state": lambda w: w.policy_gradient(w.rewards(w.k1()), w.exact_values().roll(-1, 1)),
    "score one slot early": lambda w: w.policy_gradient(
        w.rewards(w.k1()) - w.last * w.scores.unsqueeze(1) + w.last.roll(-1, 1) * w.scores.unsqueeze(1),
        w.exact_values(),
    ),
    "responses not weighted": lambda w: w.policy_gradient(
        w.rewards(w.k1()), w.exact_values(), weights=torch.ones(40, T).double()
    ),
    "descent": lambda w: -w.policy_gradient(w.rewards(w.k1()), w.exact_values()),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_chains_are_caught(world: World, name: str) -> None:
    assert cosine(BREAKS[name](world), world.true_gradient()) < 0.98
