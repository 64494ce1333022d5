"""The single environment as a citizen of Gymnasium."""

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
from gymnasium.utils.env_checker import check_env

from textenv import FinishReason, Shared, TextEnv
from textenv.kl import AdaptiveKL

ID = "RLHF-Text-v0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A reference, its tokenizer and a reward model on disk: what names stand for."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    path = tmp_path_factory.mktemp("models")
    fixtures.tiny_llama().save_pretrained(path / "lm")
    fixtures.tiny_tokenizer().save_pretrained(path / "lm")
    config = LlamaConfig.from_pretrained(path / "lm", num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(path / "rm")
    fixtures.tiny_tokenizer().save_pretrained(path / "rm")
    (path / "prompts.txt").write_text("ax by\ncz\n", encoding="utf8")
    return str(path)


def by_name(folder: str, **changes: Any) -> dict[str, Any]:
    return {
        "reference": f"{folder}/lm",
        "reward": f"{folder}/rm",
        "prompts": f"{folder}/prompts.txt",
        "max_new_tokens": 3,
        **changes,
    }


def play(env: gym.Env, actions: list[int], seed: int | None = None) -> list[Any]:
    said: list[Any] = [env.reset(seed=seed)] if seed is not None else []
    return said + [env.step(action) for action in actions]


def same(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return set(one) == set(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return np.array_equal(one, two)


@pytest.mark.parametrize("kl_source", ["agent", "policy", "reference"])
@pytest.mark.parametrize("kl_credit", ["token", "sequence"])
def test_check_env_is_clean(kl_source: str, kl_credit: str) -> None:
    env = gym.make(ID, **options(kl_source=kl_source, kl_credit=kl_credit))
    check_env(env.unwrapped)  # warnings are errors here


@pytest.mark.parametrize(
    "changes",
    [{"length_end": "truncate"}, {"kl_coef": 0}, {"info_text": True}, {"reward": fixtures.DenseReward()}],
    ids=lambda changes: next(iter(changes)),
)
def test_check_env_is_clean_with(changes: dict[str, Any]) -> None:
    check_env(gym.make(ID, **options(**changes)).unwrapped)


def test_same_seed_same_episode() -> None:
    one, two = (TextEnv(**options()) for _ in range(2))
    assert same(play(one, [5, 6, 7], seed=3), play(two, [5, 6, 7], seed=3))
    drawn = {int(one.reset(seed=seed)[1]["prompt_index"]) for seed in range(20)}
    assert drawn == {0, 1, 2}
    # Without a seed it goes on with the generator that it has.
    one.reset(seed=3), two.reset(seed=3)
    assert [int(one.reset()[1]["prompt_index"]) for _ in range(9)] == [
        int(two.reset()[1]["prompt_index"]) for _ in range(9)
    ]


def test_reset_options_choose_the_prompt() -> None:
    env = TextEnv(**options())
    assert env.reset(options={"prompt_index": 1})[1]["prompt_index"] == 1
    observation, info = env.reset(options={"prompt": [1, 9]})
    assert info["prompt_index"] == -1 and observation["input_ids"][:3].tolist() == [1, 9, 0]
    observation, _ = env.reset(options={"prompt": "ax by"})
    assert observation["input_ids"][:2].tolist() == [3, 7]


def test_made_again_from_its_spec() -> None:
    env = gym.make(ID, **options(kl_source="policy"))
    again = gym.make(env.spec)
    # A handle stays what it handles: the live policy is not copied.
    assert again.unwrapped.task.policy.module is env.unwrapped.task.policy.module
    assert same(play(env, [5, 6], seed=1), play(again, [5, 6], seed=1))


def test_spec_round_trips_as_json(folder: str) -> None:
    env = gym.make(ID, **by_name(folder, stop_token_ids=[2], kl_source="reference", missing_eos_penalty=0.5))
    spec = EnvSpec.from_json(env.spec.to_json())
    assert spec == env.spec
    assert same(play(gym.make(spec), [5, 6, 7], seed=0), play(env, [5, 6, 7], seed=0))


@pytest.mark.parametrize("kl_credit", ["token", "sequence"])
@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_copies_go_on_alone(way: str, kl_credit: str) -> None:
    env = TextEnv(**options(kl_source="policy", kl_credit=kl_credit, reward=fixtures.LetterReward()))
    play(env, [5, 6], seed=4)
    twin = pickle.loads(pickle.dumps(env)) if way == "pickle" else copy.deepcopy(env)
    assert twin.kl_source == "policy"
    later = play(env, [8, 9])  # the original runs ahead; the copy must not have moved
    assert same(play(twin, [8, 9]), later)
    assert same(env.reset(), twin.reset())  # and its generator with it


def test_close_frees_the_models(folder: str) -> None:
    env = TextEnv(**by_name(folder))
    play(env, [5], seed=0)
    models = [weakref.ref(env.task.reference.model.module), weakref.ref(env.task.reward.function.model)]
    env.close()
    gc.collect()
    assert [model() for model in models] == [None, None]
    env.close()
    for call in (env.reset, lambda: env.step(3), lambda: env.replay([[1]], [[2]]), lambda: env.kl_source):
        with pytest.raises(gym.error.ClosedEnvironmentError, match="was closed"):
            call()


def test_beta_zero_loads_no_reference(folder: str) -> None:
    assert TextEnv(**by_name(folder, kl_coef=0)).task.reference is None
    assert TextEnv(**by_name(folder, kl_coef=AdaptiveKL())).task.reference is not None


def test_attach_makes_the_environment_charge() -> None:
    env, given = TextEnv(**options()), TextEnv(**options(kl_source="policy"))
    assert env.kl_source == "agent"
    env.attach(fixtures.tiny_policy())
    assert env.kl_source == "policy"
    assert same(play(env, [5, 6, 7], seed=0), play(given, [5, 6, 7], seed=0))


def test_attach_is_refused_in_the_middle_of_a_response() -> None:
    env = TextEnv(**options())
    play(env, [5], seed=0)
    with pytest.raises(ValueError, match="attach: expected no response under way"):
        env.attach(fixtures.tiny_policy())
    assert env.kl_source == "agent"
    env.reset()
    env.attach(fixtures.tiny_policy())
    env.step(5)
    env.attach(Shared(fixtures.tiny_policy()))  # another policy may take over


@pytest.mark.parametrize("source", ["agent", "reference"])
def test_attach_is_refused_under_another_source(source: str) -> None:
    with pytest.raises(ValueError, match=f"attach: expected kl_source None or 'policy', got '{source}'"):
        TextEnv(**options(kl_source=source)).attach(fixtures.tiny_policy())


def test_the_policy_is_asked_once_a_step() -> None:
    policy = fixtures.LastLogits(fixtures.tiny_llama(seed=7))
    env = TextEnv(**options(kl_source="policy", policy=Shared(policy)))
    play(env, [5, 6, 7], seed=0)
    assert policy.asked == 3


def test_info_has_the_same_keys_always_and_no_nan() -> None:
    for changes in ({}, {"kl_credit": "sequence"}, {"info_text": True}):
        env = TextEnv(**options(**changes))
        _, first = env.reset(seed=0)
        infos = [env.step(action)[-1] for action in (5, 6, 2)]
        assert all(info.keys() == first.keys() for info in infos)
        assert not {"episode", "TimeLimit.truncated"} & first.keys()
        assert all(np.isfinite(v).all() for info in infos for v in info.values() if not isinstance(v, str))
        assert infos[-1]["finish_reason"] == FinishReason.STOP


def test_info_text_is_what_the_reward_reads() -> None:
    env = TextEnv(**options(info_text=True))
    env.reset(options={"prompt_index": 0})
    for action in (3, 20, 2):
        info = env.step(action)[-1]
    assert (info["prompt_text"], info["response_text"]) == ("azf", " axf")


@pytest.mark.parametrize("kl_credit", ["token", "sequence"])
def test_ansi(kl_credit: str) -> None:
    env = TextEnv(**options(kl_source="policy", kl_credit=kl_credit), render_mode="ansi")
    assert env.render() == "(not started)"
    env.reset(options={"prompt_index": 0})
    steps = [env.step(3), env.step(20)]
    picture = env.render()
    assert picture.startswith("azf ▸ axf\n")
    assert "2 tokens · running" in picture and "log π_ref" in picture
    assert picture.splitlines()[3].split()[:3] == ["0", "3", "ax"]
    assert ("?" in picture) == (kl_credit == "sequence")  # the reference has not spoken yet
    steps.append(env.step(2))
    rows = [line.split() for line in env.render().splitlines()[3:6]]
    rewards = [step[1] for step in steps]
    assert [float(row[-1]) for row in rows] == pytest.approx(rewards, abs=6e-4)
    # Columns: the reward of the KL alone is −β·KL of its token, wherever it is paid.
    kls = [float(row[-2]) for row in rows]
    charged = sum(float(step[-1]["reward_parts/kl"]) for step in steps)
    assert -0.3 * sum(kls) == pytest.approx(charged, abs=2e-3)
    assert f"3 tokens · STOP · score {steps[-1][-1]['score']:+.3f} · return {sum(rewards):+.3f}" in env.render()


def test_unknown_numbers_are_shown_as_unknown() -> None:
    env = TextEnv(**options(kl_coef=0, tokenizer=None), render_mode="ansi")
    play(env, [5], seed=0)
    assert env.render().splitlines()[3].split()[:4] == ["0", "5", "?", "?"]
    assert "▸ [5]" in env.render()


def test_human_prints_at_reset_and_step(capsys: pytest.CaptureFixture[str]) -> None:
    env = TextEnv(**options(), render_mode="human")
    env.reset(options={"prompt_index": 0})
    env.step(20)
    printed = capsys.readouterr().out
    assert "azf ▸" in printed and "1 tokens · running" in printed
    assert env.render() is None


def test_stepping_holds_no_graph_and_leaves_the_global_generators_alone() -> None:
    env = TextEnv(**options(kl_source="policy"))
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    play(env, [5, 6, 7, 8], seed=0)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
