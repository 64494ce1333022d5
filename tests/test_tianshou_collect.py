"""What Tianshou's Collector puts into the buffer: the KL exactly once, against plain float64 forwards."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.utils.torch_utils import policy_within_training_step

from agents.adapters.tianshou_bridge import (
    DEFAULTS,
    StateReader,
    TextActor,
    TextPolicy,
    charge_of,
    make_algorithm,
    make_collector,
    train,
)
from agents.prefix import PrefixNetwork
from tests.agent_fixtures import even_share, make_policy
from tests.conftest import make_llama
from tests.tianshou_fixtures import WARNINGS, collect, episodes_in, make_setup, make_venv, plain_logprobs
from textenv import Shared
from textenv.kl import AdaptiveKL
from textenv.models import unwrap

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]
BETA = 0.1


def parts(setup: Any, episode: dict[str, Any]) -> tuple[list[float], np.ndarray, np.ndarray]:
    """Score part of each token, log π of the law that acted, log π_ref of the law over all tokens."""
    policy, task = setup.algorithm.policy, setup.venv.task
    lm = (policy.actor if setup.name != "dqn" else policy.model.actor).lm
    at = task.options.temperature
    logprobs = plain_logprobs(lm, episode["prompt"], episode["response"], episode["candidates"], at)
    refs = plain_logprobs(unwrap(task.reference.model), episode["prompt"], episode["response"], None, at)
    scores = [0.0] * (len(refs) - 1) + [even_share(episode["prompt"], episode["response"])]
    return scores, np.array(logprobs), np.array(refs)


@pytest.mark.parametrize("k", [0, 8])
@pytest.mark.parametrize("credit", ["token", "sequence"])
@pytest.mark.parametrize("source", ["agent", "policy", "reference"])
def test_rewards_in_the_buffer_hold_the_kl_once(source: str, credit: str, k: int) -> None:
    if source == "policy" and k:
        pytest.skip("refused by the wrapper: the environment would ask for a law over all tokens")
    env: dict[str, Any] = {"kl_credit": credit, "temperature": 0.7}
    if source == "reference":
        env["kl_source"] = "reference"
    setup = make_setup("dqn" if source == "reference" else "ppo", k=k, env=env)
    if source == "policy":
        network = PrefixNetwork(setup.algorithm.policy.actor.reader.network.policy)
        setup.venv.envs.attach(Shared(network.next_logits))
    collect(setup)
    figures = charge_of(setup.collector).latest
    found = episodes_in(setup)
    assert len(found) == 8 and len({len(e["response"]) for e in found}) > 1
    objectives = []
    for episode in found:
        scores, logprobs, refs = parts(setup, episode)
        charges = BETA * refs if source == "reference" else -BETA * (logprobs - refs)
        if credit == "sequence":
            charges = np.append(np.zeros(len(refs) - 1), charges.sum())
        np.testing.assert_allclose(episode["rew"], scores + charges, atol=1e-4)
        objectives.append(sum(scores) - BETA * (logprobs - refs).sum())
    # The books are kept alike whoever charges, and score, KL and objective stand apart.
    np.testing.assert_allclose(sorted(figures.objectives), sorted(objectives), atol=1e-4)
    assert abs(figures.kls).min() > 0.01
    np.testing.assert_allclose(figures.scores - BETA * figures.kls, figures.objectives, atol=1e-5)
    if source != "reference":
        np.testing.assert_allclose(sorted(figures.returns), sorted(objectives), atol=1e-4)


def test_without_a_reference_nothing_is_charged() -> None:
    setup = make_setup(env={"kl_coef": 0})
    collect(setup)
    for episode in episodes_in(setup):
        assert episode["rew"] == pytest.approx(parts_without_reference(episode))


def parts_without_reference(episode: dict[str, Any]) -> list[float]:
    return [0.0] * (len(episode["response"]) - 1) + [even_share([], episode["response"])]


def test_random_collection_is_charged_for_the_uniform_law_that_acts() -> None:
    setup = make_setup()
    setup.collector.reset()
    setup.collector.collect(n_episode=4, random=True)
    for episode in episodes_in(setup):
        scores, _, refs = parts(setup, episode)
        expected = np.array(scores) - BETA * (-np.log(64) - refs)
        np.testing.assert_allclose(episode["rew"], expected, atol=1e-4)


@pytest.mark.parametrize("name", ["ppo", "a2c", "reinforce", "npg", "trpo"])
def test_what_has_no_entropy_at_temperature_beta_refuses_the_reference(name: str) -> None:
    with pytest.raises(ValueError, match="kl_source: expected 'agent' or 'policy' for TextPolicy, got 'reference'"):
        make_setup(name, env={"kl_source": "reference"})


@pytest.mark.parametrize("name", ["dqn", "sac"])
def test_maximum_entropy_wants_the_reference_a_fixed_beta_and_no_discount(name: str) -> None:
    with pytest.raises(ValueError, match="kl_source: expected 'reference'"):
        make_setup(name, env={"kl_source": "agent"})
    with pytest.raises(ValueError, match="kl_coef: expected a fixed β > 0"):
        make_setup(name, env={"kl_coef": AdaptiveKL(0.1)})
    with pytest.raises(ValueError, match="kl_coef: expected a fixed β > 0"):
        make_setup(name, env={"kl_coef": 0})
    with pytest.raises(ValueError, match="gamma: expected 1"):
        make_setup(name, gamma=0.99)


def test_a_hand_made_collector_refuses_as_well() -> None:
    venv = make_venv(kl_source="reference")
    reader = StateReader(PrefixNetwork(make_policy()), venv.store)
    with pytest.raises(ValueError, match="kl_source"):
        make_collector(TextPolicy(TextActor(reader), venv.envs.single_action_space), venv)


def test_an_adaptive_beta_moves_once_a_collection_and_not_for_tests() -> None:
    seen: list[tuple[float, int]] = []

    class Counting(AdaptiveKL):
        def update(self, mean_sequence_kl: float, episodes: int) -> None:
            seen.append((mean_sequence_kl, episodes))
            super().update(mean_sequence_kl, episodes)

    beta = Counting(0.1, target=0.01, horizon=100)
    setup = make_setup(env={"kl_coef": beta})
    stats = collect(setup)
    assert seen == [(pytest.approx(float(stats.kls.mean())), 8)]
    assert stats.kl_coef == 0.1 and beta.value > 0.1
    judge = make_collector(setup.algorithm, setup.venv, training=False)
    judge.reset()
    judge.collect(n_episode=4)
    assert len(seen) == 1
    assert len(train(setup)) == 2 and len(seen) == 3


def test_figures_are_what_loggers_can_take_and_cost_no_distribution() -> None:
    stats = collect(make_setup())
    flat = asdict(stats)
    assert flat["score_stat"]["mean"] == pytest.approx(float(stats.scores.mean()))
    assert flat["pred_dist_std_array"] is None and "_close" not in flat
    assert stats.n_collected_episodes == 8 and stats.n_collected_steps == int(stats.lens.sum())


def test_acting_builds_no_graph_and_leaves_the_mode_alone() -> None:
    setup = make_setup()
    seen: list[Any] = []
    forward = setup.algorithm.policy.forward

    def spy(batch: Any, state: Any = None) -> Any:
        result = forward(batch, state)
        seen.append((torch.is_grad_enabled(), result.logits.requires_grad))
        return result

    setup.algorithm.policy.forward = spy
    collect(setup)
    assert set(seen) == {(True, False)}, "the Collector leaves autograd on; the actor does not"
    assert setup.algorithm.policy.training


def test_bad_arguments_are_named() -> None:
    venv = make_venv()
    with pytest.raises(ValueError, match="name: expected one of ppo, a2c"):
        make_algorithm("ddpg", make_policy(), venv)
    with pytest.raises(ValueError, match="policy: expected the reference's vocabulary of 64, got 65"):
        make_algorithm("ppo", make_policy(make_llama(vocab_size=65)), venv)
    with pytest.raises(ValueError, match="policy: expected eager attention for npg"):
        make_algorithm("npg", make_policy(), venv)
    with pytest.raises(ValueError, match="episodes: expected an integer >= 1, got 0"):
        type(DEFAULTS["ppo"])(episodes=0)


def test_a_collector_that_charges_no_kl_cannot_train() -> None:
    torch.manual_seed(0)
    setup = make_setup()
    collector = Collector(setup.algorithm, setup.venv, VectorReplayBuffer(100, len(setup.venv)))
    collector.collect(n_step=32, reset_before_collect=True)  # to look at responses needs no KL
    with policy_within_training_step(setup.algorithm.policy), pytest.raises(ValueError, match="one of make_collector"):
        collector.collect(n_step=32, reset_before_collect=True)
    collect(setup)  # the same environment, by one that charges
    free = make_setup(env={"kl_coef": 0.0})
    with policy_within_training_step(free.algorithm.policy):
        Collector(free.algorithm, free.venv, VectorReplayBuffer(100, len(free.venv))).collect(
            n_step=32, reset_before_collect=True
        )
