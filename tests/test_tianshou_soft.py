"""Soft Q and SAC: the law of Q, returns that hold entropies, target networks, replay by episode."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from tianshou.algorithm.algorithm_base import Algorithm
from tianshou.data import Batch, VectorReplayBuffer
from tianshou.utils.torch_utils import policy_within_training_step

from agents.adapters.tianshou_bridge import EpisodeReplayBuffer, charge_of
from tests.tianshou_fixtures import WARNINGS, collect, episodes_in, make_setup, move, plain_laws, plain_logprobs

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]
BETA = 0.1


def lagged(module: Any) -> Any:
    """The value-headed model inside of a target network."""
    return module.module.actor.reader.network.policy


def plain_q(policy: Any, episode: dict[str, Any]) -> torch.Tensor:
    """Q = V + β·log π of every state that was acted in, `[T, n]`, by plain forwards of one episode."""
    start = len(episode["prompt"])
    with torch.no_grad():
        values = policy(torch.tensor([episode["prompt"] + episode["response"]])).values[0, start - 1 : -1]
    laws = plain_laws(policy.lm, episode["prompt"], episode["response"], episode["candidates"])
    if episode["candidates"] is not None:
        laws = laws.gather(1, torch.as_tensor(episode["candidates"].astype(np.int64)))
    return values[:, None] + BETA * laws


@pytest.mark.parametrize("k", [0, 8])
def test_the_boltzmann_law_of_q_is_the_models_own(k: int) -> None:
    setup = make_setup("dqn", k=k)
    collect(setup)
    model = setup.algorithm.policy.model
    batch, _ = setup.collector.buffer.sample(0)
    with torch.no_grad():
        q, values = model(batch.obs)[0], model.critic(batch.obs)[:, 0]
        law = setup.algorithm.policy(batch).dist
        logits = model.actor(batch.obs)[0]
    assert q.shape[1] == (k or 64)
    torch.testing.assert_close(BETA * (q / BETA).logsumexp(-1), values)
    torch.testing.assert_close(law.probs, logits.softmax(-1))


def test_learning_starts_at_the_references_law_among_the_candidates() -> None:
    setup = make_setup("dqn", k=8, moved=0.0)
    stats = collect(setup)
    # π is π_ref renormalised over k: its KL is −log of their mass, and positive.
    for episode, kl in zip(sorted(episodes_in(setup), key=lambda e: e["number"]), stats.kls, strict=False):
        assert kl > 0 and len(episode["candidates"]) == len(episode["response"])
    masses = []
    model = setup.algorithm.policy.model.actor.lm
    for episode in episodes_in(setup):
        offered = plain_logprobs(model, episode["prompt"], episode["response"], episode["candidates"])
        masses.append(sum(offered) - sum(plain_logprobs(model, episode["prompt"], episode["response"])))
    np.testing.assert_allclose(sorted(masses), sorted(stats.kls), atol=1e-4)


def expected_returns(episode: dict[str, Any], horizon: int, values: list[float], costs: list[float]) -> list[float]:
    """G_t by the formula, with V of each state that was acted in and β·log π of each action."""
    rewards, found = episode["rew"], []
    for t in range(len(rewards)):
        total = rewards[t]
        for i in range(1, horizon):
            if t + i < len(rewards):
                total += rewards[t + i] - costs[t + i]
        found.append(total + (values[t + horizon] if t + horizon < len(rewards) else 0.0))
    return found


@pytest.mark.parametrize("k", [0, 8])
@pytest.mark.parametrize("horizon", [1, 2, 100])
@pytest.mark.parametrize("name", ["dqn", "sac"])
def test_returns_are_those_of_the_formula_under_the_present_targets(name: str, horizon: int, k: int) -> None:
    """Targets are read, moved behind autograd's back as Tianshou moves them, and read again."""
    setup = make_setup(name, k=k, n_step=horizon, critic="shared+", rows=2)
    collect(setup, episodes=3)
    algorithm, buffer = setup.algorithm, setup.collector.buffer
    with policy_within_training_step(algorithm.policy):
        batch, indices = buffer.sample(0)
        first = algorithm._preprocess_batch(batch, buffer, indices).returns.clone()
        targets = [algorithm.model_old] if name == "dqn" else [algorithm.critic_old, algorithm.critic2_old]
        for target in targets:
            for p in target.parameters():
                p.data.mul_(1.05)
        if name == "sac":
            move(algorithm.policy.actor.lm, 0.05)
        batch = algorithm._preprocess_batch(batch, buffer, indices)
    if horizon == 1 or name == "dqn":
        assert float((batch.returns - first).abs().max()) > 1e-4
    for episode in episodes_in(setup):
        qs = [plain_q(lagged(target), episode) for target in targets]
        acted = torch.tensor(episode["act"])[:, None]
        if name == "dqn":
            values = BETA * (qs[0] / BETA).logsumexp(-1)
            costs = qs[0].gather(1, acted)[:, 0] - values
        else:
            zero = copy.deepcopy(algorithm.critic.actor.reader.network.policy)
            zero.lm = algorithm.policy.actor.lm
            law = (plain_q(zero, episode) / BETA).log_softmax(-1)
            values = (law.exp() * (torch.min(*qs) - BETA * law)).sum(-1)
            costs = BETA * law.gather(1, acted)[:, 0]
        expected = expected_returns(episode, horizon, values.tolist(), costs.tolist())
        places = batch.obs[:, 0] == episode["number"]
        np.testing.assert_allclose(batch.returns.flatten()[torch.as_tensor(places)], expected, atol=2e-4)


@pytest.mark.parametrize("horizon", [1, 3, 100])
def test_at_the_optimum_every_horizon_gives_q_whatever_was_done(horizon: int) -> None:
    """Rewards r = Q(s, a) − V(s') make the network's Q the optimum of its MDP; the actions are those of another law."""
    setup = make_setup("dqn", k=8, n_step=horizon, target_update_freq=0)
    setup.collector.reset()
    setup.collector.collect(n_episode=8, random=True)
    algorithm, buffer = setup.algorithm, setup.collector.buffer
    with policy_within_training_step(algorithm.policy), torch.no_grad():
        batch, indices = buffer.sample(0)
        q = algorithm.policy.model(batch.obs)[0]
        acted = q.gather(1, torch.as_tensor(batch.act)[:, None])[:, 0]
        values = BETA * (q / BETA).logsumexp(-1)
        nexts = torch.where(torch.as_tensor(batch.terminated), 0.0, values.roll(-1))
        buffer._meta.rew[indices] = (acted - nexts).double().numpy()
        batch, _ = buffer.sample(0)
        returns = algorithm._preprocess_batch(batch, buffer, indices).returns.flatten()
        torch.testing.assert_close(returns.float(), acted, atol=1e-4, rtol=1e-4)
        if horizon > 1:  # the control: Tianshou's own returns leave the entropies out
            own = Algorithm.compute_nstep_return(batch, buffer, indices, algorithm._target_q, 1.0, horizon).returns
            assert float((own.flatten() - acted).abs().max()) > 0.1


def test_target_networks_follow() -> None:
    setup = make_setup("dqn", k=8, critic="shared", target_update_freq=2, learning_rate=1e-2)
    collect(setup)
    algorithm, buffer = setup.algorithm, setup.collector.buffer

    def weights(module: Any) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    with policy_within_training_step(algorithm.policy):
        for step in range(4):
            online, target = weights(algorithm.policy.model), weights(algorithm.model_old)
            algorithm.update(buffer, sample_size=16)
            # Copied before steps 0 and 2.
            assert torch.equal(weights(algorithm.model_old), online if step % 2 == 0 else target)
            assert not torch.equal(weights(algorithm.policy.model), online)
    collected, _ = buffer.sample(0)
    with torch.no_grad():
        fresh = copy.deepcopy(algorithm.policy.model)
        fresh.load_state_dict(algorithm.model_old.module.state_dict())
        torch.testing.assert_close(algorithm.model_old(collected.obs)[0], fresh(collected.obs)[0])


def test_the_value_scale_is_set_once_and_for_the_target_too() -> None:
    """From returns that hold the whole KL, whatever part of it the environment paid."""
    setup = make_setup("dqn", k=8, critic="shared")
    collect(setup)
    algorithm = setup.algorithm
    rewards = charge_of(setup.collector).rewards
    returns = np.concatenate([np.cumsum(r[::-1])[::-1] for r in rewards])
    with policy_within_training_step(algorithm.policy):
        algorithm.update(setup.collector.buffer, sample_size=16)
    online, target = algorithm.policy.model.critic.value_head, lagged(algorithm.model_old).value_head
    for head in (online, target):
        assert float(head.value_mean) == pytest.approx(returns.mean(), rel=1e-5)
        assert float(head.value_std) == pytest.approx(returns.std(), rel=1e-5)
    collect(setup, seed=1)
    with policy_within_training_step(algorithm.policy):
        algorithm.update(setup.collector.buffer, sample_size=16)
    assert float(online.value_mean) == pytest.approx(returns.mean(), rel=1e-5)


def test_sac_has_beta_as_its_temperature_and_critics_that_differ() -> None:
    setup = make_setup("sac", k=8, critic="shared")
    algorithm = setup.algorithm
    assert algorithm.alpha.value == BETA
    heads = [c.critic.value_head.linear.weight for c in (algorithm.critic, algorithm.critic2)]
    assert not torch.equal(*heads)
    collect(setup)
    algorithm.policy.eval()
    batch, _ = setup.collector.buffer.sample(0)
    draws = {tuple(algorithm.policy(batch).act.tolist()) for _ in range(5)}
    assert len(draws) > 1, "not the likeliest token, outside of training either"


# ------------------------------------------------------------------------------------------------- replay by episode


def filled(kind: Any, lengths: list[int], rows: int = 2, size: int = 40) -> Any:
    buffer = kind(size, rows)
    for number, length in enumerate(lengths):
        for t in range(1, length + 1):
            step = Batch(
                obs=np.array([[number, t]], dtype=np.int32),
                act=np.array([t]),
                rew=np.array([0.0]),
                terminated=np.array([t == length]),
                truncated=np.array([False]),
                obs_next=np.array([[number, t + 1]], dtype=np.int32),
            )
            buffer.add(step, buffer_ids=[number % rows])
    return buffer


def test_replay_draws_whole_episodes_and_each_transition_alike() -> None:
    lengths = [3, 5, 1, 4, 6, 2, 2, 5]
    buffer = filled(EpisodeReplayBuffer, lengths)
    buffer._random_state = np.random.RandomState(0)
    drawn = np.zeros(len(lengths))
    for _ in range(600):
        indices = buffer.sample_indices(6)
        numbers = buffer.obs[indices][:, 0]
        assert len(indices) >= 6 and len(set(indices.tolist())) == len(indices)
        for number in set(numbers.tolist()):
            assert (numbers == number).sum() == lengths[number]
            drawn[number] += 1
    long, short = drawn[[1, 4, 7]].mean(), drawn[[2, 5, 6]].mean()
    assert 2 < long / short < 6, "in proportion to their lengths"
    plain = filled(VectorReplayBuffer, lengths)
    assert sorted(buffer.sample_indices(0)) == sorted(plain.sample_indices(0))
    assert sorted(buffer.sample_indices(None)) == sorted(plain.sample_indices(0))


def test_replay_draws_what_is_left_of_an_episode() -> None:
    buffer = filled(EpisodeReplayBuffer, [7, 7, 7, 7], rows=1, size=10)
    indices = buffer.sample_indices(100)
    pairs = sorted(map(tuple, buffer.obs[indices].tolist()))
    assert pairs == [(2, t) for t in (5, 6, 7)] + [(3, t) for t in range(1, 8)]
