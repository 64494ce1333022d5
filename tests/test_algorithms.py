"""Estimators, objectives and aggregations against float64 loops and hand numbers; what does not fit is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from agents import Rollout, TrainConfig
from agents import algorithms as alg
from agents.algorithms import RECIPES, Algorithm, Targets, description
from tests import oracles

B, T = 9, 5
GROUPS = [2, 0, 1, 0, 2, 1, 0, 1, 2]  # of three, not side by side
GAMMA = 0.9


def made(
    rewards: Any = None, *, groups: Any = GROUPS, seed: int = 0, lengths: list[int] | None = None, **more: Any
) -> Rollout:
    """A rollout of float64 numbers, NaN wherever nothing counts."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [1 + (3 * row) % T for row in range(B)] if lengths is None else lengths
    rows = len(lengths)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]

    def table(scale: float = 1.0) -> Tensor:
        numbers = scale * torch.randn(rows, T, generator=generator, dtype=torch.float64)
        return torch.where(mask, numbers, torch.nan)

    names = ("rewards", "old_logprobs", "behavior_logprobs", "ref_logprobs", "entropy", "values")
    tables = {name: table() for name in names}
    if rewards is not None:
        tables["rewards"] = torch.where(mask, torch.as_tensor(rewards, dtype=torch.float64), torch.nan)
    flags = torch.zeros(rows, dtype=torch.bool)
    per_row = {
        "bootstrap_values": torch.randn(rows, generator=generator, dtype=torch.float64),
        "scores": torch.zeros(rows),
        "scored": ~flags,
        "truncated": flags,
        "finish_reasons": torch.ones(rows, dtype=torch.int8),
        "groups": torch.tensor(groups) if groups is not None else None,
    }
    return Rollout(
        ids=torch.ones(rows, T + 1, dtype=torch.long),
        prompt_lengths=torch.ones(rows, dtype=torch.long),
        response_lengths=torch.tensor(lengths),
        mask=mask,
        **{**tables, **per_row, **more},
    )


def ragged(table: Tensor, rollout: Rollout) -> list[list[float]]:
    return [row[:n].tolist() for row, n in zip(table, rollout.response_lengths.tolist(), strict=True)]


def to_go(rollout: Rollout, gamma: float = GAMMA) -> list[list[float]]:
    """Σ_{s ≥ t} γ^(s−t) r_s, written out."""
    return [
        [math.fsum(gamma ** (s - t) * row[s] for s in range(t, len(row))) for t in range(len(row))]
        for row in ragged(rollout.rewards, rollout)
    ]


def same(found: Tensor, expected: list[list[float]], rollout: Rollout) -> None:
    for row, wanted in zip(ragged(found, rollout), expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert not found[~rollout.mask].any(), "0 outside of the mask, and no NaN"


# Estimators, each against a loop of its own.


def loop_to_go(rollout: Rollout) -> list[list[float]]:
    return to_go(rollout)


def loop_running(rollout: Rollout) -> list[list[float]]:
    return [[g - 0.7 for g in row] for row in to_go(rollout)]


def loop_greedy(rollout: Rollout) -> list[list[float]]:
    return [[g - row / 10 for g in gains] for row, gains in enumerate(to_go(rollout))]


def loop_leave_one_out(rollout: Rollout) -> list[list[float]]:
    wholes = [row[0] for row in to_go(rollout)]
    found = []
    for row, whole in enumerate(wholes):
        others = [w for i, w in enumerate(wholes) if GROUPS[i] == GROUPS[row] and i != row]
        found.append([whole - oracles.mean(others)] * int(rollout.response_lengths[row]))
    return found


def loop_group(std: bool) -> Callable[[Rollout], list[list[float]]]:
    def loop(rollout: Rollout) -> list[list[float]]:
        wholes = [row[0] for row in to_go(rollout)]
        found = []
        for row, whole in enumerate(wholes):
            group = [w for i, w in enumerate(wholes) if GROUPS[i] == GROUPS[row]]
            size = math.sqrt(oracles.variance(group, unbiased=True)) if std else 1.0
            found.append([(whole - oracles.mean(group)) / size] * int(rollout.response_lengths[row]))
        return found

    return loop


def loop_gae(lam: Callable[[int], float]) -> Callable[[Rollout], list[list[float]]]:
    def loop(rollout: Rollout) -> list[list[float]]:
        rows = zip(ragged(rollout.rewards, rollout), ragged(rollout.values, rollout), strict=True)
        return [oracles.advantages_of_episode(r, v, GAMMA, lam(len(r))) for r, v in rows]

    return loop


ESTIMATORS: dict[str, tuple[Any, Callable[[Rollout], list[list[float]]]]] = {
    "GAE": (alg.GAE(0.8), loop_gae(lambda n: 0.8)),
    "DecoupledGAE": (alg.DecoupledGAE(0.6, 0.95), loop_gae(lambda n: 0.6)),
    "LengthAdaptiveGAE": (alg.LengthAdaptiveGAE(0.5), loop_gae(lambda n: max(0.0, 1 - 1 / (0.5 * n)))),
    "ReturnToGo": (alg.ReturnToGo(), loop_to_go),
    "RunningBaseline": (alg.RunningBaseline(0.9), loop_running),
    "GreedyBaseline": (alg.GreedyBaseline(), loop_greedy),
    "LeaveOneOut": (alg.LeaveOneOut(), loop_leave_one_out),
    "GroupNormalized": (alg.GroupNormalized(), loop_group(std=True)),
    "GroupNormalized without std": (alg.GroupNormalized(std=False), loop_group(std=False)),
}


def rich(**changes: Any) -> Rollout:
    return made(**{"greedy": torch.arange(B).double() / 10, "memory": {"baseline": 0.7}, **changes})


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_equal_their_loops(name: str) -> None:
    estimator, loop = ESTIMATORS[name]
    rollout = rich()
    same(estimator(rollout, GAMMA).advantages, loop(rollout), rollout)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_whitened_and_scaled_equal_loops(name: str) -> None:
    estimator, loop = ESTIMATORS[name]
    rollout = rich()
    rows = loop(rollout)
    flags = [[True] * len(row) for row in rows]
    white = alg.Whitened(estimator)(rollout, GAMMA)
    same(white.advantages, oracles.whiten(rows, flags, shift_mean=True, unbiased=True), rollout)
    size = math.sqrt(oracles.mean([x * x for row in rows for x in row]))
    scaled = alg.Scaled(estimator)(rollout, GAMMA)
    same(scaled.advantages, [[x / size for x in row] for row in rows], rollout)
    plain = estimator(rollout, GAMMA)
    for wrapped in (white, scaled):
        assert wrapped.memory == plain.memory
        assert (wrapped.returns is None) == (plain.returns is None)
        if plain.returns is not None and wrapped.returns is not None:
            assert torch.equal(wrapped.returns, plain.returns)  # before whitening


@pytest.mark.parametrize(
    ("estimator", "lam"),
    [(alg.GAE(0.8), 0.8), (alg.DecoupledGAE(0.6, 0.95), 0.95), (alg.LengthAdaptiveGAE(0.5), 1.0)],
)
def test_returns_have_a_lambda_of_their_own(estimator: Any, lam: float) -> None:
    rollout = made()
    advantages = loop_gae(lambda n: lam)(rollout)
    values = ragged(rollout.values, rollout)
    expected = [[a + v for a, v in zip(*pair, strict=True)] for pair in zip(advantages, values, strict=True)]
    same(estimator(rollout, GAMMA).returns, expected, rollout)


def test_length_adaptive_lambda_by_hand() -> None:
    """Returns of 0 and values of 1, 2, 4, …: with λ = 0 the first advantage is V₂ − V₁ = 1."""
    values = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]]).double().expand(2, -1)
    rollout = made(torch.zeros(2, T), lengths=[1, 4], groups=None, values=values)
    # At length 4 and α = 0.5, λ = 1 − 1/2: δ = 1, 2, 4, −8; the first is 1 + 1 + 1 − 1.
    found = alg.LengthAdaptiveGAE(0.5)(rollout, 1.0).advantages
    assert found[1].tolist() == [2.0, 2.0, 0.0, -8.0, 0.0]
    assert found[0, 0].item() == -1.0  # 1 − 1/(0.5·1) is negative, so λ = 0


HAND = [[1.0, 0, 0, 0, 0], [2.0, 0, 0, 0, 0], [6.0, 0, 0, 0, 0]]


def hand() -> Rollout:
    return made(HAND, groups=[7, 7, 7], lengths=[2, 1, 3])


def test_leave_one_out_by_hand() -> None:
    found = alg.LeaveOneOut()(hand(), 1.0).advantages
    assert found.tolist() == [[-3, -3, 0, 0, 0], [-1.5, 0, 0, 0, 0], [4.5, 4.5, 4.5, 0, 0]]


def test_group_normalised_by_hand() -> None:
    centred = [-2.0, -1.0, 3.0]  # 1, 2, 6 with mean 3 and variance 7
    assert alg.GroupNormalized(std=False)(hand(), 1.0).advantages[:, 0].tolist() == centred
    with_std = alg.GroupNormalized()(hand(), 1.0).advantages[:, 0].tolist()
    assert with_std == pytest.approx([x / math.sqrt(7) for x in centred], rel=1e-12)


def test_a_group_of_equal_returns_has_no_advantage() -> None:
    rewards = torch.zeros(6, T)
    rewards[:, 0] = torch.tensor([0.1, 0.1, 0.1, 1.0, 2.0, 3.0])
    rollout = made(rewards, groups=[0, 0, 0, 1, 1, 1], lengths=[1] * 6)
    rollout = replace(rollout, rewards=rollout.rewards.float())
    found = alg.GroupNormalized()(rollout, 1.0).advantages[:, 0]
    assert found.tolist() == [0, 0, 0, -1, 0, 1]


def test_dr_grpo_is_rloo_up_to_a_factor() -> None:
    rollout = made()
    one, other = (e(rollout, GAMMA).advantages for e in (alg.LeaveOneOut(), alg.GroupNormalized(std=False)))
    assert torch.allclose(other, one * 2 / 3, rtol=1e-12)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_charge_on_a_token_reaches_what_the_docstring_says(name: str) -> None:
    """The tokens up to it where what comes after is summed; all of the response where responses are compared."""
    estimator, _ = ESTIMATORS[name]
    rollout = rich()
    row, slot = 4, 1  # of three tokens, in the group of rows 0 and 8
    rewards = rollout.rewards.clone()
    rewards[row, slot] -= 5.0
    charged = replace(rollout, rewards=rewards)
    change = estimator(charged, GAMMA).advantages - estimator(rollout, GAMMA).advantages
    if name.startswith(("Leave", "Group")):
        assert bool((change[row, :3] < -0.1).all())
        assert len(set(change[row, :3].tolist())) == 1
        assert {r for r in range(B) if bool(change[r].any())} == {0, 4, 8}
    else:
        assert bool((change[row, : slot + 1] < -0.1).all())
        assert not change[row, slot + 1 :].any()
        assert {r for r in range(B) if bool(change[r].any())} == {4}


def test_a_running_baseline_starts_at_the_first_mean_and_moves() -> None:
    first = made(memory={})
    mean = oracles.mean([g for row in to_go(first) for g in row])
    found = alg.RunningBaseline(0.9)(first, GAMMA)
    same(found.advantages, [[g - mean for g in row] for row in to_go(first)], first)
    assert found.memory == {"baseline": pytest.approx(mean)}
    second = made(seed=1, memory=found.memory)
    later = oracles.mean([g for row in to_go(second) for g in row])
    again = alg.RunningBaseline(0.9)(second, GAMMA)
    same(again.advantages, [[g - mean for g in row] for row in to_go(second)], second)
    assert again.memory == {"baseline": pytest.approx(0.9 * mean + 0.1 * later)}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_order_of_the_rows_does_not_matter(name: str) -> None:
    estimator, _ = ESTIMATORS[name]
    order = torch.randperm(B, generator=torch.Generator().manual_seed(1))
    rollout = rich()
    turned = replace(rollout, **{k: v[order] for k, v in vars(rollout).items() if isinstance(v, Tensor)})
    assert torch.allclose(estimator(turned, GAMMA).advantages, estimator(rollout, GAMMA).advantages[order], rtol=1e-12)


@pytest.mark.parametrize("power", [7, -7])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_powers_of_two(name: str, power: int) -> None:
    """Every estimator is linear, or free of the unit; scaled or whitened, no bit depends on it."""
    estimator, _ = ESTIMATORS[name]
    rollout, scale = rich(), 2.0**power
    units = {name: getattr(rollout, name) * scale for name in ("rewards", "values", "bootstrap_values", "greedy")}
    other = replace(rollout, **units, memory={"baseline": 0.7 * scale})
    one, two = estimator(rollout, GAMMA), estimator(other, GAMMA)
    assert torch.equal(two.advantages, one.advantages * (1 if name == "GroupNormalized" else scale))
    for wrapper in (alg.Whitened, alg.Scaled):
        assert torch.equal(wrapper(estimator)(other, GAMMA).advantages, wrapper(estimator)(rollout, GAMMA).advantages)


# Objectives.


def logprobs_near(rollout: Rollout, size: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(8)
    moved = rollout.old_logprobs + size * torch.randn(rollout.mask.shape, generator=generator, dtype=torch.float64)
    return moved.requires_grad_()


def advantages_of(rollout: Rollout) -> Tensor:
    return torch.where(rollout.mask, rollout.values, torch.nan)


def test_clipped_equals_its_loop() -> None:
    rollout = made()
    logprobs, advantages = logprobs_near(rollout), advantages_of(made(seed=2))
    objective = alg.Clipped(0.1, 0.3, 1.5)
    expected = [
        [oracles.clipped_surrogate(*cell, 0.1, 0.3, 1.5) for cell in zip(*rows, strict=True)]
        for rows in zip(*(ragged(t, rollout) for t in (logprobs, rollout.old_logprobs, advantages)), strict=True)
    ]
    same(objective(logprobs, rollout, advantages).detach(), expected, rollout)


def loop_sequence(rollout: Rollout, logprobs: Tensor, advantages: Tensor, low: float, high: float) -> list[list[float]]:
    """GSPO, eq. 5 and 7, a row at a time; each token of a row has the row's loss."""
    rows = []
    for new, old, adv in zip(*(ragged(t, rollout) for t in (logprobs, rollout.old_logprobs, advantages)), strict=True):
        ratio = math.exp(math.fsum(a - b for a, b in zip(new, old, strict=True)) / len(new))
        clipped = min(max(ratio, 1 - low), 1 + high)
        rows.append([-min(ratio * oracles.mean(adv), clipped * oracles.mean(adv))] * len(new))
    return rows


def test_sequence_clipped_equals_its_loop() -> None:
    rollout = made()
    logprobs, advantages = logprobs_near(rollout), advantages_of(made(seed=2))
    found = alg.SequenceClipped(0.1, 0.2)(logprobs, rollout, advantages).detach()
    expected = loop_sequence(rollout, logprobs, advantages, 0.1, 0.2)
    same(found, expected, rollout)
    free = loop_sequence(rollout, logprobs, advantages, 1.0, 1e9)
    pairs = zip([x for row in expected for x in row], [x for row in free for x in row], strict=True)
    share = oracles.mean([float(a > b + 1e-12) for a, b in pairs])
    assert 0.1 < share < 0.9
    assert alg.SequenceClipped(0.1, 0.2).clip_fraction(logprobs, rollout, advantages) == pytest.approx(share)


@pytest.mark.parametrize("per_token", [False, True])
def test_the_gradient_of_gspo_and_of_its_token_form(per_token: bool) -> None:
    """−s Â/|y| for each token of a response inside of the trust region, 0 where the clip removed it (eq. 10)."""
    rollout = made()
    per_row = torch.tensor([1.0, -1.0, 2.0, -2.0, 0.5, 1.5, -0.5, 3.0, -3.0]).double()
    advantages = per_row[:, None].expand(-1, T)
    logprobs = logprobs_near(rollout)
    objective = alg.SequenceClipped(0.2, 0.2, per_token)
    aggregation = alg.SequenceMean()
    total = aggregation(objective(logprobs, rollout, advantages), rollout.mask, 1.0)
    gradient = torch.autograd.grad(total, logprobs)[0]
    expected, clipped = [], 0
    for row, (new, old) in enumerate(zip(*(ragged(t, rollout) for t in (logprobs, rollout.old_logprobs)), strict=True)):
        ratio = math.exp(math.fsum(a - b for a, b in zip(new, old, strict=True)) / len(new))
        a = float(per_row[row])
        outside = (a > 0 and ratio > 1.2) or (a < 0 and ratio < 0.8)
        clipped += outside
        expected.append([0.0 if outside else -a * ratio / len(new)] * len(new))
    assert 0 < clipped < B
    same(gradient, expected, rollout)


def test_only_the_token_form_knows_advantages_of_tokens() -> None:
    rollout = made()
    logprobs, advantages = logprobs_near(rollout, 0.0), advantages_of(made(seed=2))
    gradients = [
        torch.autograd.grad(alg.SequenceClipped(9.0, 9.0, per)(logprobs, rollout, advantages).sum(), logprobs)[0]
        for per in (False, True)
    ]
    same(gradients[1], [[-a for a in row] for row in ragged(advantages, rollout)], rollout)
    same(gradients[0], [[-oracles.mean(row)] * len(row) for row in ragged(advantages, rollout)], rollout)


def test_the_kl_loss_has_the_gradient_of_k2() -> None:
    """ρ·(log π − log π_ref), ρ held constant."""
    rollout = made()
    logprobs = logprobs_near(rollout)
    gradient = torch.autograd.grad(alg.ReferenceKL()(logprobs, rollout).sum(), logprobs)[0]
    cells = (ragged(t, rollout) for t in (logprobs, rollout.old_logprobs, rollout.ref_logprobs))
    expected = [[math.exp(n - o) * (n - r) for n, o, r in zip(*rows, strict=True)] for rows in zip(*cells, strict=True)]
    same(gradient, expected, rollout)


# Aggregations.


AGGREGATIONS = {
    "token": (alg.TokenMean(), 10.0 / 4),
    "sequence": (alg.SequenceMean(), (6.0 / 3 + 4.0) / 2),
    "fixed": (alg.FixedLength(5), 10.0 / 10),
    "fixed by the environment": (alg.FixedLength(), 10.0 / 16),
}


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_aggregations_by_hand_and_in_parts(name: str) -> None:
    how, expected = AGGREGATIONS[name]
    mask = torch.tensor([[True, True, True], [True, False, False]])
    loss = torch.where(mask, torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]]), torch.nan)
    count = how.count(mask, 8)
    assert float(how(loss, mask, count)) == pytest.approx(expected)
    parts = [how(loss[row : row + 1], mask[row : row + 1], count) for row in (0, 1)]
    assert float(sum(parts)) == pytest.approx(expected)


# What fits together, and what does not.


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_name_themselves_and_come_back_from_json(name: str) -> None:
    import json

    algorithm = RECIPES[name]()
    assert algorithm.name == name
    again = description.make(json.loads(json.dumps(description.describe(algorithm))))
    assert replace(again, defaults=algorithm.defaults) == algorithm


def mine(rollout: Rollout, gamma: float) -> Targets:
    return Targets(rollout.rewards)


def algorithm(**changes: Any) -> Algorithm:
    return Algorithm(**{"estimator": mine, "objective": alg.Clipped(), "aggregation": alg.TokenMean(), **changes})


def test_a_description_says_which_part_differs() -> None:
    saved = description.describe(alg.grpo())
    with pytest.raises(ValueError, match=r"algorithm.objective.clip_eps: expected what was saved, 0.2, got 0.3"):
        description.check_same(alg.grpo(clip_eps=0.3), saved)
    with pytest.raises(
        ValueError, match=r"algorithm.estimator: expected what was saved, 'GroupNormalized', got 'Scaled'"
    ):
        description.check_same(replace(alg.grpo(), estimator=alg.Scaled(alg.GroupNormalized())), saved)
    with pytest.raises(ValueError, match=r"algorithm.estimator: .*test_algorithms.mine', got 'ReturnToGo'"):
        description.check_same(algorithm(estimator=alg.ReturnToGo()), description.describe(algorithm()))
    with pytest.raises(
        ValueError, match=r"algorithm: expected the one that was saved, because .*mine in it is not ours"
    ):
        description.make(description.describe(algorithm()))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "GAE without a critic": (
        lambda: algorithm(estimator=alg.Whitened(alg.GAE())),
        "critic: expected a ValueLoss, because Whitened(estimator=GAE(lam=0.98)) reads values, got None",
    ),
    "RLOO without groups": (
        lambda: alg.rloo(group_size=1),
        "group_size: expected at least 2, because Scaled(estimator=LeaveOneOut()) compares responses to one prompt",
    ),
    "ReMax without greedy": (
        lambda: algorithm(estimator=alg.GreedyBaseline()),
        "greedy: expected True, because GreedyBaseline() reads the greedy response's return, got False",
    ),
    "a group of 0": (lambda: algorithm(group_size=0), "group_size: expected an integer >= 1, got 0"),
    "no estimator": (
        lambda: algorithm(estimator="gae"),
        "estimator: expected a function or an object to call, got 'gae'",
    ),
    "no objective": (lambda: algorithm(objective=None), "objective: expected a function"),
    "no aggregation": (lambda: algorithm(aggregation="token"), "aggregation: expected a function"),
    "a critic that is none": (lambda: algorithm(critic=True), "critic: expected a ValueLoss or None, got True"),
    "a KL loss that is none": (lambda: algorithm(kl_loss=0.1), "kl_loss: expected a function or None, got 0.1"),
    "λ": (lambda: alg.GAE(1.5), "lam: expected a finite number >= 0 and <= 1.0, got 1.5"),
    "λ of the values": (lambda: alg.DecoupledGAE(0.9, -1), "value_lam: expected a finite number"),
    "α": (lambda: alg.LengthAdaptiveGAE(0.0), "alpha: expected a number > 0, got 0.0"),
    "decay": (lambda: alg.RunningBaseline(2), "decay: expected a finite number >= 0 and <= 1.0, got 2"),
    "std": (lambda: alg.GroupNormalized(std=1), "std: expected True or False, got 1"),  # type: ignore[arg-type]
    "clip": (lambda: alg.Clipped(-0.1), "clip_eps: expected a finite number >= 0, got -0.1"),
    "clip higher": (lambda: alg.Clipped(0.1, float("nan")), "clip_eps_high: expected a finite number >= 0, got nan"),
    "dual clip": (lambda: alg.Clipped(dual_clip=1.0), "dual_clip: expected a number > 1, got 1.0"),
    "sequence clip": (lambda: alg.SequenceClipped(-1), "clip_eps: expected a finite number"),
    "per token": (lambda: alg.SequenceClipped(per_token=1), "per_token: expected True or False, got 1"),  # type: ignore[arg-type]
    "length": (lambda: alg.FixedLength(0), "length: expected an integer >= 1, got 0"),
    "value coef": (lambda: alg.ValueLoss(coef=-1), "coef: expected a finite number >= 0, got -1"),
    "value clip": (lambda: alg.ValueLoss(clip_eps=-1), "clip_eps: expected a finite number >= 0, got -1"),
    "value decay": (
        lambda: alg.ValueLoss(stats_decay=3),
        "stats_decay: expected a finite number >= 0 and <= 1.0, got 3",
    ),
    "a prompt alone": (
        lambda: alg.LeaveOneOut()(made(groups=None), 1.0),
        "rollout: expected at least 2 responses to each prompt",
    ),
    "no greedy returns": (lambda: alg.GreedyBaseline()(made(), 1.0), "rollout: expected one with `greedy` returns"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    act, message = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        act()


def test_defaults_are_settings_of_the_loop() -> None:
    for name, recipe in RECIPES.items():
        made_ = recipe()
        assert isinstance(made_.defaults, TrainConfig), name
        assert made_.defaults.batch_episodes % made_.group_size == 0, name
        assert made_.defaults.entropy_coef == 0, name
