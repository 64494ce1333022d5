"""Tianshou's view of the environment: handles into a token store, rows that rest, memory in proportion to tokens."""

from __future__ import annotations

import gc
import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from tianshou.data import VectorReplayBuffer

from agents.adapters.tianshou_bridge import TextBatchEnv, TokenStore, make_collector
from tests.agent_fixtures import even_share, make_env
from tests.tianshou_fixtures import WARNINGS, collect, episodes_in, make_setup, make_venv

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]


def play(venv: TextBatchEnv, steps: int, seed: int) -> list[list[int]]:
    """Random tokens in all rows; the ids that the handles point to, after each step."""
    rng = np.random.default_rng(seed)
    handles, _ = venv.reset(seed=seed)
    seen = []
    for _ in range(steps):
        handles, _, terminated, truncated, _ = venv.step(rng.integers(0, 64, len(venv)))
        states = venv.store.states(handles)
        seen += [states.ids[u, :n].tolist() for u, n in zip(states.owner.tolist(), states.at.tolist(), strict=True)]
        ended = np.flatnonzero(terminated | truncated)
        if len(ended):
            venv.reset(ended)
    return seen


@pytest.mark.parametrize("obs_type", ["numpy", "torch"])
def test_handles_point_to_what_the_environment_shows(obs_type: str) -> None:
    envs: Any = make_env(num_envs=3, autoreset_mode="Disabled")
    rng = np.random.default_rng(5)
    observation, _ = envs.reset(seed=5)
    shown = []
    for _ in range(20):
        observation, _, terminated, truncated, _ = envs.step(rng.integers(0, 64, 3))
        shown += [observation["input_ids"][i][observation["attention_mask"][i] > 0].tolist() for i in range(3)]
        if (terminated | truncated).any():
            envs.reset(options={"reset_mask": terminated | truncated})
    venv = TextBatchEnv(make_env(num_envs=3, autoreset_mode="Disabled", obs_type=obs_type))
    assert play(venv, 20, 5) == shown


def test_an_environment_that_resets_by_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="autoreset_mode='Disabled'"):
        TextBatchEnv(make_env(num_envs=2))
    with pytest.raises(ValueError, match="store: expected one for 64 tokens"):
        TextBatchEnv(make_env(num_envs=2, autoreset_mode="Disabled"), store=TokenStore(65))
    with pytest.raises(ValueError, match="seed and options"):
        make_venv().reset(speed=3)


class Passing(gym.vector.VectorWrapper):
    """A wrapper of somebody else's, behind which rows cannot rest."""


@pytest.mark.parametrize("kind", ["plain", "wrapped", "top-k"])
def test_rows_that_rest_disturb_nobody(kind: str) -> None:
    """7 episodes in 4 rows of ragged length: towards the end the Collector steps fewer and fewer of them."""
    setup = make_setup(k=8 if kind == "top-k" else 0)
    if kind == "wrapped":
        setup.venv.envs = Passing(setup.venv.envs)
    widths = []
    acted: list[int] = []
    core, step = setup.venv.envs.unwrapped.core, setup.venv.step
    core_step = core.step
    core.step = lambda actions, rows: (acted.append(len(rows)), core_step(actions, rows))[1]
    setup.venv.step = lambda action, id=None: (widths.append(len(id)), step(action, id))[1]  # type: ignore
    stats = collect(setup, episodes=7)
    found = episodes_in(setup)
    assert stats.n_collected_episodes == len(found) == 7
    assert min(widths) < 4
    assert acted == ([4] * len(widths) if kind == "wrapped" else widths)
    for episode in found:
        start = len(episode["prompt"])
        assert episode["lengths"] == list(range(start, start + len(episode["response"])))
        assert episode["next_lengths"] == [n + 1 for n in episode["lengths"]]
        assert episode["terminated"] == [False] * (len(episode["response"]) - 1) + [True]
        if kind == "top-k":
            picked = [int(row[a]) for row, a in zip(episode["candidates"], episode["act"], strict=True)]
            assert picked == episode["response"]
        else:
            assert episode["act"] == episode["response"]


def test_tianshou_may_carry_info_in_its_batches() -> None:
    setup = make_setup(rows=2)
    venv = TextBatchEnv(setup.venv.envs, store=setup.venv.store, info_keys=("score", "response_length"))
    collector = make_collector(setup.algorithm.policy, venv)
    collector.reset()
    collector.collect(n_episode=4)
    buffer = collector.buffer
    every = buffer.sample_indices(0)
    batch = buffer[every]
    starts = [venv.store.episode(number).prompt_length for number in batch.obs[:, 0].tolist()]
    assert batch.info.response_length.tolist() == (batch.obs[:, 1] - starts + 1).tolist()
    assert (batch.info.score[~batch.terminated] == 0).all()
    for number, score in zip(batch.obs[batch.terminated, 0].tolist(), batch.info.score[batch.terminated], strict=True):
        tokens, start, _ = venv.store.episode(number)
        assert score == pytest.approx(even_share([], tokens[start:].tolist()))


# ------------------------------------------------------------------------------------------------- memory


def test_episodes_go_when_the_ring_buffer_has_dropped_them() -> None:
    setup = make_setup(rows=2)
    store = setup.venv.store
    ring = VectorReplayBuffer(2 * 10, 2)
    collector = make_collector(setup.algorithm.policy, setup.venv, ring)
    store.slack = store._sweep_at = 8
    collector.reset()
    held = []
    for _ in range(15):
        collector.collect(n_episode=4)
        held.append(len(store))
        needed = set(np.asarray(ring.obs[ring.sample_indices(0)])[:, 0].tolist())
        assert all(number in store for number in needed)
    # 20 transitions are of 20 episodes at most; twice what was needed, and what runs.
    assert max(held) <= 2 * 20 + 2
    assert len(collector.buffer) == 20
    store.sweep(force=True)
    needed = set(np.asarray(ring.obs[ring.sample_indices(0)])[:, 0].tolist())
    assert set(store._ended) == needed
    with pytest.raises(ValueError, match="must be watched"):
        store.states(np.array([[0, 1]]))


def test_nothing_goes_while_no_buffer_is_watched() -> None:
    venv = make_venv(2)
    venv.store.slack = venv.store._sweep_at = 1
    play(venv, 30, 0)
    assert 0 in venv.store
    venv.store.watch(VectorReplayBuffer(20, 2))
    venv.store.sweep()
    assert 0 in venv.store, "the buffer is gone: nobody watches any more"


def test_a_store_comes_back_from_a_pickle_with_its_buffer() -> None:
    setup = make_setup()
    collect(setup)
    before = episodes_in(setup)
    store, buffer = pickle.loads(pickle.dumps((setup.venv.store, setup.collector.buffer)))
    handles = np.asarray(buffer.obs[buffer.sample_indices(0)])
    ours, theirs = store.states(handles), setup.venv.store.states(handles)
    assert all(bool((a == b).all()) for a, b in zip(ours, theirs, strict=True))
    assert len(before) == len(set(handles[:, 0].tolist()))


def padded_bytes(columns: int) -> int:
    """Of one transition whose obs and obs_next are padded rows: int64 ids, int8 mask, int64 prompt length."""
    return 2 * (columns * 8 + columns + 8) + 8 + 8 + 3


def bytes_per_transition(new_tokens: int) -> tuple[float, int]:
    """Of buffer and store together, measured, and of padded rows."""
    setup = make_setup(rows=4, env={"stop_token_ids": [], "max_new_tokens": new_tokens})
    collect(setup, episodes=16)
    buffer, store = setup.collector.buffer, setup.venv.store
    store.sweep(force=True)
    gc.collect()
    arrays = [buffer._meta[key] for key in buffer._meta.get_keys()]
    per_row = sum(a.nbytes / len(a) for a in arrays if isinstance(a, np.ndarray))
    return per_row + store.nbytes / (16 * new_tokens), padded_bytes(setup.venv.task.columns)


def test_memory_is_that_of_the_tokens_and_not_of_their_context() -> None:
    short, padded_short = bytes_per_transition(16)
    long, padded_long = bytes_per_transition(96)
    # 2 handles, action, reward, 3 flags; a token takes 2 bytes, an episode some 400 for its headers.
    assert 16 + 16 + 3 + 2 < long < short < 100
    assert padded_short > 3 * short and padded_long > 40 * long
