"""Tianshou's losses and ours on the same minibatch, one by one; and what sharing and caching must not change."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from tianshou.utils.torch_utils import policy_within_training_step

from agents.adapters.tianshou_bridge import EpisodeBatch, StateReader, TextActor, TextPolicy, TokenLaw
from agents.adapters.tianshou_bridge.episodes import whole_episodes
from agents.losses import aggregate, clipped_surrogate, clipped_value, policy_gradient
from agents.masked import whiten
from agents.returns import masked_gae
from tests.agent_fixtures import IdsReward, distinct_tokens
from tests.tianshou_fixtures import WARNINGS, collect, episodes_in, make_setup, move
from textenv.packing import Packing, packed_hidden

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]
VARIANTS = {"shared": "shared+", "separate": "separate+"}


def grid(rows: list[Any]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.as_tensor(row, dtype=torch.float32) for row in rows], True)


def native(setup: Any, found: list[dict[str, Any]]) -> Any:
    """Our own evaluation of the buffer's episodes, as padded rows."""
    reader = setup.algorithm.policy.actor.reader
    policy = reader.network.policy
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(e["prompt"] + e["response"]) for e in found], True)
    starts, counts = (torch.tensor([len(e[key]) for e in found]) for key in ("prompt", "response"))
    with torch.no_grad():
        now = policy.evaluate(ids, starts, counts, temperature=reader.network.temperature, with_entropy=True)
    return now, torch.arange(int(counts.max())) < counts[:, None]


@pytest.mark.parametrize("critic", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("name", ["ppo", "a2c"])
def test_losses_and_advantages_are_tianshous(name: str, critic: str) -> None:
    """An epoch of one minibatch, at a learning rate of 0, after the weights have moved: ratios are not 1."""
    setup = make_setup(
        name,
        critic=critic,
        by_episode=False,
        epochs=1,
        gae_lambda=0.8,
        gamma=0.9,
        entropy_coef=0.03,
        learning_rate=0.0,
        env={"temperature": 0.7},
        normalize_advantages=name == "ppo",
    )
    algorithm, buffer = setup.algorithm, setup.collector.buffer
    collect(setup)
    found = episodes_in(setup)
    with policy_within_training_step(algorithm.policy):
        batch, indices = buffer.sample(0)
        batch = algorithm._preprocess_batch(batch, buffer, indices)
        old, mask = native(setup, found)
        estimates = masked_gae(grid([e["rew"] for e in found]), old.values, mask, gamma=0.9, gae_lambda=0.8)
        # Advantages and returns, slot by slot; the buffer's order is that of the episodes found.
        places = torch.as_tensor(np.concatenate([np.flatnonzero(batch.obs[:, 0] == e["number"]) for e in found]))
        torch.testing.assert_close(
            batch.adv[places], estimates.advantages[mask].double(), atol=1e-5, rtol=1e-5, check_dtype=False
        )
        torch.testing.assert_close(
            batch.returns[places], estimates.returns[mask], atol=1e-5, rtol=1e-5, check_dtype=False
        )
        if name == "ppo":
            torch.testing.assert_close(batch.logp_old[places], old.logprobs[mask], atol=1e-5, rtol=1e-5)
        move(algorithm.policy.actor.lm, 0.05)
        stats = algorithm._update_with_batch(batch, batch_size=None, repeat=1)
    now, _ = native(setup, found)
    advantages = estimates.advantages
    if name == "ppo":
        loss = clipped_surrogate(now.logprobs, old.logprobs, whiten(advantages, mask), 0.2, mask=mask)
        assert float(((now.logprobs - old.logprobs).exp() - 1).abs()[mask].max()) > 0.2, "some ratios are clipped"
    else:
        loss = policy_gradient(now.logprobs, advantages, mask=mask)
    assert stats.actor_loss.mean == pytest.approx(float(aggregate(loss, mask)), abs=1e-5)
    value_loss = clipped_value(now.values, old.values, estimates.returns, None, mask=mask)
    assert stats.vf_loss.mean / 2 == pytest.approx(float(aggregate(value_loss, mask)), abs=1e-5)
    assert stats.ent_loss.mean == pytest.approx(float(now.entropy[mask].mean()), abs=1e-5)
    total = stats.actor_loss.mean + 0.5 * stats.vf_loss.mean - 0.03 * stats.ent_loss.mean
    assert stats.loss.mean == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize("critic", VARIANTS.values(), ids=VARIANTS)
def test_the_value_gradient_is_that_of_the_native_loss(critic: str) -> None:
    """Tianshou's 0.5·(R − V)² in reward units against ours in units of the returns' deviation, whatever that is."""
    setup = make_setup("a2c", critic=critic, env={"reward": IdsReward(lambda p, r: 100 * sum(r) / len(r))})
    collect(setup)
    algorithm, policy = setup.algorithm, setup.algorithm.policy.actor.reader.network.policy
    with policy_within_training_step(algorithm.policy):
        batch, indices = setup.collector.buffer.sample(0)
        batch = algorithm._preprocess_batch(batch, setup.collector.buffer, indices)
    algorithm.zero_grad()
    (0.5 * (batch.returns - algorithm.critic(batch.obs).flatten()).pow(2).mean()).backward()
    theirs = gradients(setup)
    assert 100 < float(policy.value_head.value_std) < 10_000
    found = episodes_in(setup)
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(e["prompt"] + e["response"]) for e in found], True)
    starts, counts = (torch.tensor([len(e[key]) for e in found]) for key in ("prompt", "response"))
    mask = torch.arange(int(counts.max())) < counts[:, None]
    algorithm.zero_grad()
    now = policy.evaluate(ids, starts, counts, temperature=1.0)
    old = grid([e["rew"] for e in found])
    estimates = masked_gae(old, now.values.detach(), mask, gamma=1.0, gae_lambda=0.98)
    returns = policy.value_head.normalize(estimates.returns)
    aggregate(clipped_value(now.normalized_values, returns, returns, None, mask=mask), mask).backward()
    ours = gradients(setup)
    assert theirs.keys() == ours.keys()
    for key, gradient in ours.items():
        torch.testing.assert_close(theirs[key], gradient, atol=1e-5, rtol=2e-3)


# ------------------------------------------------------------------------------------------------- sharing, caching


def gradients(setup: Any) -> dict[str, torch.Tensor]:
    policy = setup.algorithm.policy.actor.reader.network.policy
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("gpt2", [False, True], ids=["llama", "gpt2"])
@pytest.mark.parametrize("critic", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("name", ["ppo", "a2c", "reinforce"])
def test_nothing_is_changed_by_sharing_and_caching(name: str, critic: str, gpt2: bool) -> None:
    """The same rollout, losses and gradients from rows read one by one; the weights move between the epochs."""
    results = []
    for fast in (True, False):
        setup = make_setup(
            name,
            critic=critic,
            gpt2=gpt2,
            by_episode=False,
            cache=fast,
            share=fast,
            epochs=2,
            minibatches=2,
            max_batchsize=9,
            learning_rate=1e-3,
        )
        collect(setup)
        found = episodes_in(setup)
        with policy_within_training_step(setup.algorithm.policy):
            stats = setup.algorithm.update(setup.collector.buffer, batch_size=12, repeat=2)
        results.append((found, stats, gradients(setup)))
    (found, stats, grads), (plain_found, plain_stats, plain_grads) = results
    assert [e["response"] for e in found] == [e["response"] for e in plain_found]
    for one, other in zip(found, plain_found, strict=True):
        np.testing.assert_allclose(one["rew"], other["rew"], atol=1e-5)
    for key, value in plain_stats.get_loss_stats_dict().items():
        assert stats.get_loss_stats_dict()[key] == pytest.approx(value, abs=2e-5), key
    assert grads.keys() == plain_grads.keys() and len(grads) > 10
    for key, gradient in plain_grads.items():
        # After several Adam steps: relative to the largest entry.
        assert float((grads[key] - gradient).abs().max()) < 1e-3 * float(gradient.abs().max()) + 1e-6, key


class Counter:
    """Counts the tokens that a trunk reads."""

    def __init__(self, setup: Any) -> None:
        self.tokens: list[int] = []
        lm = setup.algorithm.policy.actor.lm
        # The first ragged batch makes sure that the model can leave padding out.
        packed_hidden(lm.base_model, torch.ones(2, 3, dtype=torch.int64), Packing.of(torch.tensor([1, 3])))
        lm.base_model.register_forward_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        self.tokens.append(output.last_hidden_state.shape[:2].numel())


def test_one_forward_of_each_episode_serves_actor_and_critic() -> None:
    """A shared trunk: before the update once, then once a minibatch, of its own episodes only; what those begin with
    alike once."""
    setup = make_setup(epochs=3, minibatches=2)
    collect(setup)
    counter = Counter(setup)
    with policy_within_training_step(setup.algorithm.policy):
        setup.algorithm.update(setup.collector.buffer, batch_size=len(setup.collector.buffer) // 2, repeat=3)
    rows = [episode["prompt"] + episode["response"] for episode in episodes_in(setup)]
    before, *during = counter.tokens
    assert before == distinct_tokens(rows) < sum(map(len, rows)) and len(during) == 3 * 2
    # While learning, the last token of each episode is predicted and not read.
    rows = [row[:-1] for row in rows]
    assert 3 * distinct_tokens(rows) <= sum(during) < 3 * sum(map(len, rows))


def test_naive_reading_costs_a_row_for_each_state() -> None:
    """The control of the test above: the counter counts."""
    setup = make_setup(epochs=1, minibatches=1, cache=False, share=False)
    collect(setup)
    counter = Counter(setup)
    with policy_within_training_step(setup.algorithm.policy):
        setup.algorithm.update(setup.collector.buffer, batch_size=None, repeat=1)
    # v(s), v(s') and log π before, logits and value together after.
    episodes = episodes_in(setup)
    states = sum(n for episode in episodes for n in episode["lengths"])
    following = sum(n for episode in episodes for n in episode["next_lengths"])
    assert sorted(counter.tokens) == sorted([states, following, states, states])


@pytest.mark.parametrize("critic", VARIANTS.values(), ids=VARIANTS)
def test_weights_written_behind_autograds_back_are_noticed(critic: str) -> None:
    """As NPG and TRPO write them, between two readings of the same batch."""
    setup = make_setup(critic=critic)
    collect(setup)
    policy, reader = setup.algorithm.policy, setup.algorithm.policy.actor.reader
    batch, _ = setup.collector.buffer.sample(0)
    with torch.no_grad():
        before = policy(batch).logits, setup.algorithm.critic(batch.obs)
        for p in reader.network.policy.parameters():
            p.data.mul_(1.1)
        after = policy(batch).logits, setup.algorithm.critic(batch.obs)
    fresh = StateReader(copy.deepcopy(reader.network), reader.store)
    torch.testing.assert_close(after[0], fresh.logits(batch.obs, acting=False).detach())
    torch.testing.assert_close(after[1][:, 0], fresh.values(batch.obs, acting=False).detach())
    assert float((after[0] - before[0]).abs().max()) > 0.1 and float((after[1] - before[1]).abs().max()) > 1e-3


def test_acting_after_learning_reads_the_new_weights() -> None:
    setup = make_setup()
    collect(setup)
    policy, store = setup.algorithm.policy, setup.venv.store
    handles, _ = setup.venv.reset()
    batch, _ = setup.collector.buffer.sample(0)

    def act() -> torch.Tensor:
        policy.eval()
        logits = policy.actor(handles.copy())[0]
        policy.train()
        return logits

    with torch.no_grad():
        policy(batch)
        before = act()
        policy(batch)
        for p in policy.parameters():
            p.data.mul_(1.1)
    after = act()
    fresh = StateReader(copy.deepcopy(policy.actor.reader.network), store)
    torch.testing.assert_close(after, fresh.logits(handles, acting=True))
    assert float((after - before).abs().max()) > 0.1


# ------------------------------------------------------------------------------------------------- the law


def test_a_law_is_pytorchs_categorical() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    ours, theirs = TokenLaw(logits), torch.distributions.Categorical(logits=logits)
    chosen = torch.tensor([0, 6, 3, 3, 1])
    for a, b in (
        (ours.log_prob(chosen), theirs.log_prob(chosen)),
        (ours.entropy(), theirs.entropy()),
        (ours.probs, theirs.probs),
        (ours.logits, theirs.logits),
        (
            torch.distributions.kl_divergence(ours, TokenLaw(2 * logits)),
            torch.distributions.kl_divergence(theirs, torch.distributions.Categorical(logits=2 * logits)),
        ),
    ):
        torch.testing.assert_close(a, b)
        grads = [
            torch.autograd.grad(x.sum() if x.ndim == 1 else (x * x).sum(), logits, retain_graph=True) for x in (a, b)
        ]
        torch.testing.assert_close(*grads)
    assert torch.equal(ours.mode, theirs.mode)
    silent = TokenLaw(logits, entropy_gradient=False)
    entropy = silent.entropy()  # asked first: what it shares with the log-probs must still have a gradient
    assert not entropy.requires_grad
    torch.testing.assert_close(entropy, theirs.entropy().detach())
    torch.testing.assert_close(
        *(torch.autograd.grad(law.log_prob(chosen).sum(), logits, retain_graph=True) for law in (silent, theirs))
    )


def test_draws_follow_the_law() -> None:
    torch.manual_seed(0)
    probs = torch.tensor([0.5, 0.0, 0.2, 0.3])
    draws = TokenLaw(probs.log().expand(20_000, 4)).sample()
    shares = torch.bincount(draws, minlength=4) / 20_000
    assert shares[1] == 0
    assert float((shares - probs).abs().max()) < 4 * 0.5 / 20_000**0.5


def test_an_update_does_not_draw() -> None:
    setup = make_setup()
    collect(setup)
    batch, _ = setup.collector.buffer.sample(0)
    state = torch.get_rng_state()
    result = setup.algorithm.policy(batch)
    assert torch.equal(torch.get_rng_state(), state) and result.act.tolist() == batch.act.tolist()
    assert isinstance(setup.algorithm.policy, TextPolicy) and not setup.algorithm.policy.entropy_gradient
    assert isinstance(setup.algorithm.policy.actor, TextActor)


# ------------------------------------------------------------------------------------------------- minibatches


def test_minibatches_are_whole_episodes_and_an_epoch_is_all_of_them() -> None:
    np.random.seed(0)
    lengths = [5, 1, 7, 2, 2, 9, 3, 3, 1, 6]
    episodes = np.repeat(np.arange(10) + 50, lengths)
    shuffled = np.random.permutation(len(episodes))
    batch = EpisodeBatch(obs=np.stack([episodes, np.arange(len(episodes))], 1)[shuffled], act=np.arange(39)[shuffled])
    orders = set()
    for _ in range(5):
        parts = list(batch.split(10, merge_last=True))
        assert len(parts) == 3
        groups = [set(part.obs[:, 0].tolist()) for part in parts]
        assert sum(len(group) for group in groups) == 10 and set.union(*groups) == set(range(50, 60))
        assert sorted(np.concatenate([part.act for part in parts]).tolist()) == list(range(39))
        assert max(abs(len(part) - 13) for part in parts) <= 9
        orders.add(tuple(sorted(groups[0])))
    assert len(orders) > 1, "reshuffled each time"
    assert len(list(batch.split(10))) == 4
    in_order = list(batch.split(10, shuffle=False))
    assert np.concatenate([part.act for part in in_order]).tolist() == batch.act.tolist()
    assert [len(part) for part in batch.split(-1)] == [39]
    assert [sorted(part) for part in whole_episodes(np.array([3, 3, 4, 4]), 5)] in ([[0, 1], [2, 3]], [[2, 3], [0, 1]])
