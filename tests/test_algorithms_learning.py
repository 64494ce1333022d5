"""Every algorithm learns: the toy task of `tests/test_learning.py`, and with its sign turned round it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agents import Agent, algorithms
from agents.algorithms import RECIPES, Algorithm
from tests.agent_fixtures import even_share, make_algorithm_agent, small_algorithm


def trained(algorithm: Algorithm, sign: float = 1.0, iterations: int = 20) -> list[dict]:
    agent: Agent = make_algorithm_agent(algorithm, score=lambda p, r: sign * even_share(p, r), kl_coef=0.01)
    return agent.learn(iterations)


def small(name: str) -> Algorithm:
    """Sixteen episodes; those that take one step on each take a larger one."""
    algorithm = small_algorithm(name, batch_episodes=16)
    steps = algorithm.defaults.epochs * algorithm.defaults.minibatches
    return replace(algorithm, defaults=replace(algorithm.defaults, learning_rate=1e-3 if steps > 1 else 3e-3))


def ends(history: list[dict], name: str = "score/mean") -> tuple[float, float]:
    """That of the untrained policy, and the mean of the last three updates."""
    return history[0][name], sum(row[name] for row in history[-3:]) / 3


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_each_recipe_raises_the_share_of_even_ids(name: str) -> None:
    before, after = ends(trained(small(name)))
    assert before < 0.65
    assert after > 0.73


@pytest.mark.parametrize("name", ["rloo", "reinforce"])
def test_a_negated_reward_lowers_it(name: str) -> None:
    before, after = ends(trained(small(name), sign=-1.0))  # of the negated score
    assert -before > 0.35
    assert -after < 0.3


def test_a_kl_in_the_loss_learns_too() -> None:
    before, after = ends(trained(replace(small("grpo"), kl_loss=algorithms.ReferenceKL())))
    assert before < 0.65
    assert after > 0.73
