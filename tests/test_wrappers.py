"""Top-k actions: the candidates are the reference's, and everything else is the environment's own."""

from __future__ import annotations

import copy
import math
import pickle
import random
from pathlib import Path
from typing import Any

import env_fixtures as fixtures
import gymnasium as gym
import numpy as np
import pytest
import torch
from env_fixtures import EOS, PROMPTS, VOCAB, options
from gymnasium.utils.env_checker import check_env

from textenv import Shared, TextEnv, TextVectorEnv, check_vector_env
from textenv.candidates import LOWEST, TopK
from textenv.constraints import BadTokens, ForcedPrefix
from textenv.wrappers import ActionMask, TopKActions, VectorActionMask, VectorTopKActions

ID = "RLHF-Text-v0"
MODES = ("SameStep", "NextStep", "Disabled")
TOLERANCE = 1e-4  # float32 forwards of two layers against float64

# A wrapper is what is checked here; Gymnasium would rather see what is inside.
IS_A_WRAPPER = "ignore:.*is different from the unwrapped version:UserWarning"


def law(case: dict[str, Any], text: list[int]) -> dict[int, float]:
    """log π_ref of every token after a text, from a float64 copy of the model."""
    logits = [x / case["temperature"] for x in fixtures.float64_logits(case["model"])(tuple(text))]
    top = max(logits)
    norm = top + math.log(math.fsum(math.exp(x - top) for x in logits))
    return {i: x - norm for i, x in enumerate(logits)}


def offer(case: dict[str, Any], text: list[int]) -> tuple[list[int], list[float]]:
    """The k candidates after a text, by sorting."""
    logprobs = law(case, text)
    order = sorted(logprobs, key=lambda i: (-logprobs[i], i))
    rest = [i for i in order if i not in case["always"]]
    kept = set(case["always"]) | set(rest[: case["k"] - len(case["always"])])
    ids = [i for i in order if i in kept]
    return ids, [logprobs[i] for i in ids]


def generate(seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    cut = rng.random() < 0.3
    k = rng.choice([1, 2, 5, VOCAB])
    return {
        "seed": seed,
        "model": rng.choice(["llama", "gpt2"]),
        "k": k,
        "always": tuple(rng.sample([EOS, 7, 30], rng.randrange(min(k, 3) + 1))),
        "temperature": rng.choice([1.0, 0.6]),
        "kl_source": rng.choice(["agent", "reference"]),
        "kl_credit": "token" if cut else rng.choice(["token", "sequence"]),
        "length_end": "truncate" if cut else "terminate",
        "max_new_tokens": rng.choice([1, 2, 4]),
        "mode": MODES[seed % 3],
        "num_envs": rng.choice([1, 2, 3]),
    }


def arguments(case: dict[str, Any]) -> dict[str, Any]:
    names = ("temperature", "kl_source", "kl_credit", "length_end", "max_new_tokens")
    model = Shared(fixtures.MODELS[case["model"]]())
    return options(reference=model, reward=fixtures.DenseReward(), **{name: case[name] for name in names})


def text_of(observation: dict[str, Any], row: int) -> list[int]:
    return observation["input_ids"][row][observation["attention_mask"][row].astype(bool)].tolist()


def check_offers(case: dict[str, Any], observation: dict[str, Any], rows: Any) -> None:
    for row in rows:
        ids, logprobs = offer(case, text_of(observation, row))
        assert observation["candidates"][row].tolist() == ids
        assert np.allclose(observation["candidate_logprobs"][row], logprobs, rtol=0, atol=TOLERANCE)


def same(one: Any, two: Any, tolerance: float = 1e-5) -> None:
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            same(one[key], two[key], tolerance)
    elif isinstance(one, list | tuple):
        for a, b in zip(one, two, strict=True):
            same(a, b, tolerance)
    elif isinstance(one, np.ndarray) and one.dtype == object:
        same(list(one), list(two), tolerance)
    elif one is None:
        assert two is None
    else:
        assert np.allclose(np.asarray(one), np.asarray(two), rtol=0, atol=tolerance)


def without_candidates(said: Any) -> Any:
    said = copy.deepcopy(said)
    finals = [row for row in said[-1].get("final_obs", ()) if row is not None]
    for observation in (said[0], *finals):
        del observation["candidates"], observation["candidate_logprobs"]
    return said


@pytest.mark.parametrize("seed", range(18))
def test_an_index_is_its_token_and_candidates_are_those_of_the_reference(seed: int) -> None:
    """Beside the environment without the wrapper, whose reference lags one token behind and sees the token itself."""
    case = generate(seed)
    envs = VectorTopKActions(
        TextVectorEnv(case["num_envs"], autoreset_mode=case["mode"], **arguments(case)), case["k"], case["always"]
    )
    plain = TextVectorEnv(case["num_envs"], autoreset_mode=case["mode"], **arguments(case))
    rng, everyone = np.random.default_rng(seed), range(case["num_envs"])
    said = envs.reset(seed=seed)
    same(without_candidates(said), plain.reset(seed=seed))
    for _ in range(2 * case["max_new_tokens"] + 1):
        check_offers(case, said[0], everyone)
        indices = rng.integers(case["k"], size=case["num_envs"])
        tokens = said[0]["candidates"][np.arange(case["num_envs"]), indices]
        said = envs.step(indices)
        same(without_candidates(said), plain.step(tokens))
        ended = said[2] | said[3]
        if "final_obs" in said[-1]:
            for row in np.flatnonzero(ended):
                final = {key: value[None] for key, value in said[-1]["final_obs"][row].items()}
                check_offers(case, final, [0])
        elif case["mode"] == "Disabled" and ended.any():
            mask = {"reset_mask": ended}
            said = envs.reset(options=dict(mask))
            same(without_candidates(said), plain.reset(options=dict(mask)))


@pytest.mark.parametrize("seed", range(100, 106))
def test_vector_is_sync_vector_of_single(seed: int) -> None:
    case = generate(seed)
    check_vector_env(
        VectorTopKActions(TextVectorEnv(3, autoreset_mode=case["mode"], **arguments(case)), case["k"], case["always"]),
        lambda: TopKActions(TextEnv(**arguments(case)), case["k"], case["always"]),
        steps=10,
        seed=seed,
    )


def test_the_cases_cover_what_they_should() -> None:
    cases = [generate(seed) for seed in range(18)]
    wanted = {"k": 4, "kl_source": 2, "kl_credit": 2, "length_end": 2, "mode": 3, "model": 2, "always": 4}
    assert {name: len({case[name] for case in cases}) >= count for name, count in wanted.items()} == dict.fromkeys(
        wanted, True
    )


# ------------------------------------------------------------------------------------------------- cost


class Counted(torch.nn.Module):
    """Counts what a model is asked: `(rows, tokens)` of each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, int]] = []

    def watch(self, model: Any) -> Any:
        model = copy.deepcopy(model)
        model.model.register_forward_pre_hook(
            lambda _, args, kwargs: self.asked.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
        return model


@pytest.mark.parametrize("kl_credit", ["token", "sequence"])
def test_one_forward_of_one_token_a_step(kl_credit: str) -> None:
    counted = Counted()
    model = Shared(counted.watch(fixtures.tiny_llama()))
    given = options(reference=model, kl_credit=kl_credit, stop_token_ids=[], prompts=[[1, 5, 20]])
    envs = VectorTopKActions(TextVectorEnv(3, autoreset_mode="Disabled", **given), 4)
    envs.reset(seed=0)
    assert counted.asked == [(3, 3)]
    for _ in range(4):
        envs.step(np.zeros(3, int))
    assert counted.asked == [(3, 3)] + [(3, 1)] * 4


# ------------------------------------------------------------------------------------------------- which candidates


def test_ties_go_to_the_smaller_id() -> None:
    model = copy.deepcopy(fixtures.tiny_llama())
    with torch.no_grad():
        model.lm_head.weight.zero_()
    env = TopKActions(TextEnv(**options(reference=Shared(model))), 3, always=(30,))
    observation, _ = env.reset(seed=0)
    assert observation["candidates"].tolist() == [0, 1, 30]
    assert observation["candidate_logprobs"] == pytest.approx(-math.log(VOCAB))


def test_top_k_against_sorting() -> None:
    generator = torch.Generator().manual_seed(0)
    for trial in range(60):
        # Few values, so that most are tied, also over the edge of the k; some are not allowed.
        values = torch.randint(5, (4, 9), generator=generator).float()
        logprobs = torch.where(values == 0, -torch.inf, values).log_softmax(1)
        logprobs[:, 0] = -0.5  # at least one is allowed
        k, always = 1 + trial % 9, ((), (8,), (8, 3))[trial % 3][: 1 + trial % 9]
        told = TopK(k, always)(logprobs)
        for row in range(4):
            kept = [i for i in range(9) if logprobs[row, i] > -torch.inf]
            order = sorted(kept, key=lambda i: (i not in always, -float(logprobs[row, i]), i))[:k]
            ids = sorted(order, key=lambda i: (-float(logprobs[row, i]), i))
            missing = k - len(ids)
            assert told.ids[row].tolist() == ids + ids[:1] * missing
            assert told.distinct[row].tolist() == [True] * len(ids) + [False] * missing
            wanted = logprobs[row, ids + ids[:1] * missing].clamp(min=LOWEST)
            assert torch.equal(told.logprobs[row], wanted)


def test_a_stop_token_among_the_candidates_ends_the_episode() -> None:
    env = TopKActions(TextEnv(**options()), 2, always=(EOS,))
    observation, _ = env.reset(seed=0)
    _, _, terminated, _, info = env.step(observation["candidates"].tolist().index(EOS))
    assert terminated and info["finish_reason"] == 1


@pytest.mark.parametrize("first", ["mask", "top_k"])
def test_candidates_are_of_the_allowed_set(first: str) -> None:
    env: Any = TextEnv(**options())
    constraint = [ForcedPrefix([9]), BadTokens([i for i in range(VOCAB) if i not in (9, 20, EOS)])]
    plain = TextEnv(**options(constraint=constraint))
    if first == "mask":
        env = TopKActions(ActionMask(env, constraint, mask_in_obs=True), 5)
    else:
        env = ActionMask(TopKActions(env, 5), constraint, mask_in_obs=True)
    observation, info = env.reset(seed=0)
    plain.reset(seed=0)
    # Only token 9 may begin: it stands in every slot, each slot is legal, and the mask tells that one is enough.
    assert observation["candidates"].tolist() == [9] * 5
    assert observation["candidate_logprobs"].tolist() == [0.0] * 5
    assert observation["action_mask"].tolist() == info["action_mask"].tolist() == [1, 0, 0, 0, 0]
    assert env.action_masks().tolist() == [True, False, False, False, False]
    assert observation in env.observation_space
    observation, _, _, _, info = env.step(3)
    plain.step(9)
    assert set(observation["candidates"].tolist()) == {9, 20, EOS}
    assert info["action_mask"].tolist() == [1, 1, 1, 0, 0]
    assert math.fsum(np.exp(observation["candidate_logprobs"][:3])) == pytest.approx(1.0, abs=1e-5)
    token = int(observation["candidates"][1])
    assert env.step(1)[-1]["ref_logprob"] == pytest.approx(plain.step(token)[-1]["ref_logprob"], abs=1e-5)


def test_a_sample_of_the_mask_is_an_action() -> None:
    envs = VectorTopKActions(VectorActionMask(TextVectorEnv(2, **options()), ForcedPrefix([9])), 3)
    _, infos = envs.reset(seed=0)
    assert envs.single_action_space.sample(infos["action_mask"][0]) == 0
    assert envs.action_masks().tolist() == [[True, False, False]] * 2


# ------------------------------------------------------------------------------------------------- refusals


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"kl_source: expected 'agent' or 'reference'.*got 'policy'"):
        TopKActions(TextEnv(**options(kl_source="policy")), 3)
    with pytest.raises(ValueError, match=r"kl_coef: expected > 0 or a controller.*got 0"):
        TopKActions(TextEnv(**options(kl_coef=0)), 3)
    with pytest.raises(ValueError, match=r"expected gym\.make\("):
        TopKActions(gym.make("CartPole-v1"), 2)
    with pytest.raises(ValueError, match=r"expected gym\.make_vec"):
        VectorTopKActions(gym.make_vec("CartPole-v1", num_envs=2), 2)
    env = TopKActions(TextEnv(**options()), 3)
    with pytest.raises(ValueError, match="attach: expected no TopKActions"):
        env.unwrapped.attach(fixtures.tiny_policy())
    with pytest.raises(ValueError, match="k: expected one TopKActions, got a second, with k=2"):
        TopKActions(env, 2)


@pytest.mark.parametrize(
    ("k", "always", "message"),
    [
        (0, (), r"k: expected an integer in \[1, 40\], got 0"),
        (VOCAB + 1, (), "k: expected an integer"),
        (True, (), "k: expected an integer"),
        (2, (1, 3, 4), "always: expected at most k=2 ids, got 3"),
        (2, (VOCAB,), r"always: expected token ids in \[0, 40\)"),
        (2, "ab", "always: expected token ids"),
        (2, 5, "always: expected token ids"),
    ],
)
def test_bad_arguments(k: Any, always: Any, message: str) -> None:
    env = TextEnv(**options())
    with pytest.raises(ValueError, match=message):
        TopKActions(env, k, always)
    env.reset(seed=0)
    env.step(5)  # it is as it was


@pytest.mark.parametrize("bad", [3, -1, 0.5, [0], None])
def test_bad_indices(bad: Any) -> None:
    env = TopKActions(TextEnv(**options()), 3)
    env.reset(seed=0)
    with pytest.raises(gym.error.InvalidAction):
        env.step(bad)


def test_indices_of_rows_that_rest_mean_nothing() -> None:
    envs = VectorTopKActions(TextVectorEnv(2, autoreset_mode="NextStep", **options(max_new_tokens=1)), 3)
    envs.reset(seed=0)
    envs.step(np.array([0, 1]))
    envs.step(np.array([99, -5]))
    with pytest.raises(gym.error.InvalidAction, match=r"2 indices in \[0, 3\), one a row, got \[0, 99\]"):
        envs.step(np.array([0, 99]))


def test_reset_is_needed() -> None:
    single, many = TextEnv(**options()), TextVectorEnv(2, autoreset_mode="Disabled", **options(max_new_tokens=1))
    single.reset(seed=0), many.reset(seed=0)
    env, envs = TopKActions(single, 3), VectorTopKActions(many, 3)
    for step in (lambda: env.step(0), lambda: envs.step(np.zeros(2, int))):
        with pytest.raises(gym.error.ResetNeeded):
            step()
    envs.reset()
    envs.step(np.zeros(2, int))
    with pytest.raises(gym.error.ResetNeeded, match="reset_mask"):
        envs.step(np.zeros(2, int))


# ------------------------------------------------------------------------------------------------- a Gymnasium citizen


@pytest.mark.filterwarnings(IS_A_WRAPPER)
@pytest.mark.parametrize("changes", [{}, {"kl_credit": "sequence"}, {"constraint": ForcedPrefix([9])}])
def test_check_env_is_clean(changes: dict[str, Any]) -> None:
    check_env(TopKActions(gym.make(ID, **options(**changes)), 3), skip_render_check=True)
    env = gym.make(ID, **options(**changes), render_mode="ansi")
    check_env(ActionMask(TopKActions(env, 3), None if changes.get("constraint") else BadTokens([5]), mask_in_obs=True))


def test_stable_baselines_check_env_is_clean() -> None:
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    checker.check_env(TopKActions(gym.make(ID, **options()), 3))


def test_torch_is_numpy() -> None:
    given = options(length_end="truncate")
    ours = VectorTopKActions(TextVectorEnv(3, obs_type="torch", **given), 4)
    theirs = VectorTopKActions(TextVectorEnv(3, **given), 4)
    assert ours.obs_type == "torch" and ours.autoreset_mode is theirs.autoreset_mode
    tensors, arrays = ours.reset(seed=0)[0], theirs.reset(seed=0)[0]
    finals = 0
    for step in range(9):
        assert all(isinstance(value, torch.Tensor) for value in tensors.values())
        same({key: value.numpy() for key, value in tensors.items()}, arrays)
        indices = np.array([step % 4, 1, 3])
        tensors, rewards, _, _, infos = ours.step(torch.from_numpy(indices))
        arrays, paid, _, _, expected = theirs.step(indices)
        same(rewards.numpy(), paid)
        for row in np.flatnonzero(expected.get("_final_obs", [])):
            same({key: value[row].numpy() for key, value in infos["final_obs"].items()}, expected["final_obs"][row])
            finals += 1
    assert finals >= 3


def test_reset_options() -> None:
    envs = VectorTopKActions(TextVectorEnv(2, autoreset_mode="Disabled", **options()), 4)
    whole, _ = envs.reset(options={"prompt_index": [0, 2]})
    after = envs.step(np.array([1, 2]))[0]
    again, _ = envs.reset(options={"prompt_index": 0, "reset_mask": np.array([True, False])})
    assert again["input_ids"][0, : len(PROMPTS[0])].tolist() == PROMPTS[0]
    for key in ("candidates", "candidate_logprobs"):
        same(again[key][0], whole[key][0])
        same(again[key][1], after[key][1])
    assert not np.array_equal(after["candidates"][1], whole["candidates"][1])


def test_what_is_handed_out_is_not_written_to() -> None:
    envs = VectorTopKActions(TextVectorEnv(2, obs_type="torch", **options()), 4)
    given = [envs.reset(seed=0)[0]]
    kept = [copy.deepcopy(given[0])]
    for _ in range(6):
        given.append(envs.step(torch.tensor([1, 0]))[0])
        kept.append(copy.deepcopy(given[-1]))
    for one, two in zip(given, kept, strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)
    meant = int(given[-1]["candidates"][0, 2])
    given[-1]["candidates"].zero_()  # nor does writing to it change what an index means
    step = int(given[-1]["attention_mask"][0].sum())
    observation, *_, infos = envs.step(torch.tensor([2, 2]))
    shown = infos["final_obs"] if infos.get("_final_obs", torch.zeros(1))[0] else observation
    assert int(shown["input_ids"][0, step]) == meant


def test_made_again_from_its_spec() -> None:
    env = TopKActions(gym.make(ID, **options()), 3, always=(EOS,))
    assert env.spec is not None
    again = gym.make(env.spec)
    assert isinstance(again, TopKActions) and again.action_space == env.action_space
    same(again.reset(seed=4), env.reset(seed=4))
    same(again.step(1), env.step(1))


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_copies_go_on_alone(way: str) -> None:
    envs = VectorTopKActions(TextVectorEnv(2, **options(kl_credit="sequence")), 3)
    envs.reset(seed=0)
    envs.step(np.array([1, 2]))
    twin = pickle.loads(pickle.dumps(envs)) if way == "pickle" else copy.deepcopy(envs)
    later = [envs.step(np.array([0, 1])) for _ in range(4)]
    same([twin.step(np.array([0, 1])) for _ in range(4)], later)


def test_replay_is_of_the_full_law() -> None:
    envs = VectorTopKActions(TextVectorEnv(1, **options(kl_source="reference")), 2)
    plain = TextVectorEnv(1, **options(kl_source="reference"))
    responses = [[5, 6, 7, 8], [30, EOS]]
    one, two = (each.unwrapped.replay([[1, 9], [1]], responses) for each in (envs, plain))
    assert torch.equal(one.rewards, two.rewards) and torch.equal(one.ref_logprobs, two.ref_logprobs)


@pytest.mark.slow
def test_the_page_runs() -> None:
    from test_docs import run_page

    import textenv

    pytest.importorskip("torchrl")
    if not textenv.embedded.STORYTELLER.exists():
        pytest.skip("the embedded models are not made yet")
    run_page(Path(__file__).parents[1] / "docs" / "wrappers.md")
