"""The batched environment, and the checker that Gymnasium lacks: it passes ours and fails broken ones."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import env_fixtures as fixtures
import gymnasium as gym
import numpy as np
import pytest
import torch
from env_fixtures import options
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from textenv import TextEnv, TextVectorEnv, check_vector_env

ID = "RLHF-Text-v0"
MODES = [mode.value for mode in AutoresetMode]


def draw(rng: np.random.Generator) -> np.ndarray:
    """Stop tokens now and then, so that rows part."""
    return np.where(rng.random(3) < 0.25, 2, rng.integers(3, fixtures.VOCAB, size=3))


def walk(envs: Any, steps: int = 12) -> list[Any]:
    rng = np.random.default_rng(0)
    said = [envs.reset(seed=5)]
    for _ in range(steps):
        said.append(copy.deepcopy(envs.step(draw(rng))))  # Gymnasium's wrappers write to what they gave
        ended = np.asarray(said[-1][2]) | np.asarray(said[-1][3])
        if envs.metadata["autoreset_mode"] is AutoresetMode.DISABLED and ended.any():
            said.append(envs.reset(options={"reset_mask": ended}))
    return said


def assert_same(one: Any, two: Any) -> None:
    if isinstance(one, dict):
        assert set(one) == set(two)
        for key in one:
            assert_same(one[key], two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_same(a, b)
    elif isinstance(one, np.ndarray) and one.dtype == object:
        assert_same(list(one), list(two))
    else:
        assert np.array_equal(np.asarray(one), np.asarray(two))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("changes", [{}, {"kl_source": "policy", "kl_credit": "sequence"}, {"info_text": True}])
def test_checker_passes(mode: str, changes: dict[str, Any]) -> None:
    envs = TextVectorEnv(3, autoreset_mode=mode, **options(**changes))
    check_vector_env(envs, lambda: TextEnv(**options(**changes)), steps=12, sample=draw)


class ShiftedRewards(TextVectorEnv):
    def step(self, actions: Any) -> Any:
        observation, rewards, *rest = super().step(actions)
        return observation, np.roll(rewards, 1), *rest


class ReusedArrays(TextVectorEnv):
    buffer: Any = None

    def _observation(self) -> dict[str, Any]:
        new = super()._observation()
        if self.buffer is None:
            self.buffer = new
        for key, value in new.items():
            self.buffer[key][...] = value
        return self.buffer


class FourBuffers(TextVectorEnv):
    """Takes turns, so that one call shares nothing with the one before."""

    turn, buffers = 0, None

    def _observation(self) -> dict[str, Any]:
        new = super()._observation()
        self.buffers = self.buffers or [copy.deepcopy(new) for _ in range(4)]
        self.turn = (self.turn + 1) % 4
        for key, value in new.items():
            self.buffers[self.turn][key][...] = value
        return self.buffers[self.turn]


class WrongMetadata(TextVectorEnv):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.metadata = self.metadata | {"autoreset_mode": AutoresetMode.NEXT_STEP}


class NoMetadata(TextVectorEnv):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        del self.metadata["autoreset_mode"]


class OneSeedForAll(TextVectorEnv):
    def _row_seeds(self, seed: Any) -> Any:
        return [seed] * self.num_envs


class NoFinalInfo(TextVectorEnv):
    def _finals(self, ended: np.ndarray) -> dict[str, Any]:
        return {key: value for key, value in super()._finals(ended).items() if "info" not in key}


class ForgottenMask(TextVectorEnv):
    def _pack(self, info: dict[str, Any], rows: np.ndarray) -> dict[str, Any]:
        return super()._pack(info, np.ones_like(rows))


class OutOfSpace(TextVectorEnv):
    def _observation(self) -> dict[str, Any]:
        return {key: value.astype(np.float64) for key, value in super()._observation().items()}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (ShiftedRewards, "must say what SyncVectorEnv .* says.*step"),
        (ReusedArrays, "must not share memory"),
        (FourBuffers, "must not share memory.*has changed since"),
        (WrongMetadata, "autoreset_mode"),
        (NoMetadata, "autoreset_mode"),
        (OneSeedForAll, "must say what SyncVectorEnv .* says.*reset"),
        (NoFinalInfo, "must say what SyncVectorEnv .* says.*final_info"),
        (ForgottenMask, "must say what SyncVectorEnv .* says.*final_info"),
        (OutOfSpace, "(elements of observation_space|must say)"),
    ],
)
def test_checker_fails(broken: type[TextVectorEnv], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_vector_env(broken(3, **options()), lambda: TextEnv(**options()), steps=12, sample=draw)


def test_checker_fails_where_spaces_differ() -> None:
    with pytest.raises(AssertionError, match="spaces must be those of N single environments"):
        check_vector_env(TextVectorEnv(3, **options()), lambda: TextEnv(**options(max_new_tokens=5)), sample=draw)


@pytest.mark.parametrize("mode", MODES)
def test_torch_is_numpy(mode: str) -> None:
    ours = walk(TextVectorEnv(3, autoreset_mode=mode, obs_type="torch", **options(kl_source="policy")))
    theirs = walk(TextVectorEnv(3, autoreset_mode=mode, **options(kl_source="policy")))
    finals = 0
    for tensors, arrays in zip(ours, theirs, strict=True):
        assert all(isinstance(value, torch.Tensor) for value in tensors[0].values())
        infos, expected = dict(tensors[-1]), dict(arrays[-1])
        rows = expected.pop("final_obs", None)
        if rows is not None:
            batch = infos.pop("final_obs")
            for i in np.flatnonzero(infos["_final_obs"].numpy()):
                assert_same({key: value[i] for key, value in batch.items()}, rows[i])
                finals += 1
        assert_same((*tensors[:-1], infos), (*arrays[:-1], expected))
    assert (finals > 0) == (mode == "SameStep")


def test_torch_tensors_handed_out_do_not_change() -> None:
    envs = TextVectorEnv(3, obs_type="torch", **options())
    rng, given = np.random.default_rng(0), [envs.reset(seed=0)]
    kept = [copy.deepcopy(given[0])]
    for _ in range(8):
        given.append(envs.step(torch.from_numpy(draw(rng))))
        kept.append(copy.deepcopy(given[-1]))
    assert_same(given, kept)


@pytest.mark.parametrize("mode", MODES)
def test_gymnasium_episode_statistics_run(mode: str) -> None:
    envs = RecordEpisodeStatistics(TextVectorEnv(3, autoreset_mode=mode, **options(kl_source="policy")))
    seen, total, lengths = 0, np.zeros(3), np.zeros(3, dtype=int)
    for _, rewards, terminated, _, infos in (said for said in walk(envs, steps=16) if len(said) == 5):
        # `NEXT_STEP`: the step that begins a row anew is no step of an episode.
        total, lengths = total + rewards, lengths + (infos["response_length"] > 0 if mode == "NextStep" else 1)
        assert ("episode" in infos) == terminated.any()
        if terminated.any():
            assert np.array_equal(infos["_episode"], terminated)
            assert np.allclose(infos["episode"]["r"][terminated], total[terminated], atol=1e-5)
            assert np.array_equal(infos["episode"]["l"][terminated], lengths[terminated])
            seen += int(terminated.sum())
            total[terminated], lengths[terminated] = 0, 0
    assert seen > 5


@pytest.mark.parametrize("mode", MODES)
def test_one_row_can_rest(mode: str) -> None:
    """With one row, `NEXT_STEP` has a step in which nobody acts."""
    envs = TextVectorEnv(1, autoreset_mode=mode, **options(kl_source="policy"))
    envs.reset(seed=0)
    assert envs.step(np.array([2]))[2].tolist() == [True]
    if mode == "NextStep":
        _, rewards, terminated, _, infos = envs.step(np.array([5]))
        assert (rewards.tolist(), terminated.tolist(), infos["response_length"].tolist()) == ([0.0], [False], [0])


def test_make_vec() -> None:
    envs = gym.make_vec(ID, num_envs=3, autoreset_mode="NextStep", **options(kl_source="policy"))
    assert isinstance(envs.unwrapped, TextVectorEnv)
    assert envs.metadata["autoreset_mode"] is envs.unwrapped.autoreset_mode is AutoresetMode.NEXT_STEP
    again = gym.make_vec(envs.spec)
    assert again.num_envs == 3 and again.metadata == envs.metadata
    assert_same(walk(envs), walk(again))
    assert TextVectorEnv(2, **options()).metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert TextVectorEnv.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP  # the class is not written to


def test_make_vec_spec_round_trips_as_json(tmp_path: Any) -> None:
    fixtures.tiny_llama().save_pretrained(tmp_path)
    fixtures.tiny_tokenizer().save_pretrained(tmp_path)
    plain = options(reference=str(tmp_path), tokenizer=None) | {"reward": "unused"}
    spec = copy.deepcopy(gym.spec(ID))
    spec.kwargs = {**plain, "num_envs": 3, "autoreset_mode": "Disabled", "obs_type": "numpy"}
    again = EnvSpec.from_json(spec.to_json())
    assert again.kwargs == spec.kwargs
    envs = gym.make_vec(again, reward=fixtures.IdReward())
    assert envs.num_envs == 3 and envs.metadata["autoreset_mode"] is AutoresetMode.DISABLED


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_copies_go_on_alone(way: str) -> None:
    envs = TextVectorEnv(3, **options(kl_source="policy"))
    walk(envs, steps=5)
    twin = pickle.loads(pickle.dumps(envs)) if way == "pickle" else copy.deepcopy(envs)
    steps = [np.array(row) for row in ([5, 6, 2], [7, 8, 9], [2, 2, 2])]
    later = [envs.step(actions) for actions in steps]
    assert_same([twin.step(actions) for actions in steps], later)


def test_close_frees_the_models(tmp_path: Any) -> None:
    fixtures.tiny_llama().save_pretrained(tmp_path)
    envs = TextVectorEnv(2, **options(reference=tmp_path))
    envs.reset(seed=0)
    model = weakref.ref(envs.task.reference.model.module)
    envs.close()
    gc.collect()
    assert model() is None
    envs.close()
    for call in (envs.reset, lambda: envs.step(np.zeros(2, int)), lambda: envs.replay([[1]], [[2]])):
        with pytest.raises(gym.error.ClosedEnvironmentError, match="was closed"):
            call()


def test_seeds() -> None:
    envs = TextVectorEnv(3, **options())
    envs.reset(seed=11)
    assert envs.np_random_seed == (11, 12, 13)
    assert envs.reset(seed=np.int64(4)) and envs.np_random_seed == (4, 5, 6)
    assert envs.reset(seed=np.array([7, 1, 2])) and envs.np_random_seed == (7, 1, 2)
    assert envs.reset(seed=[None, 8, None]) and envs.np_random_seed == (7, 8, 2)


def test_render(capsys: pytest.CaptureFixture[str]) -> None:
    envs = TextVectorEnv(2, **options(), render_mode="ansi")
    envs.reset(options={"prompt_index": [0, 1]})
    pictures = envs.render()
    assert len(pictures) == 2 and pictures[0].startswith("azf ▸")
    human = TextVectorEnv(2, **options(), render_mode="human")
    human.reset(options={"prompt_index": 0})
    human.step(np.array([2, 20]))  # row 0 ends and begins anew; what it ended with is shown
    printed = capsys.readouterr().out
    assert "[0] azf ▸" in printed and "1 tokens · STOP" in printed and "1 tokens · running" in printed
