"""Constraints belong to the MDP: both laws are renormalised, on every path, and a float64 oracle agrees."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
import random
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import env_fixtures as fixtures
import gymnasium as gym
import numpy as np
import pytest
import torch
from env_fixtures import EOS, VOCAB, options
from env_oracle import Oracle, Row, Step

from textenv import Shared, TextEnv, TextVectorEnv, check_vector_env
from textenv.constraints import (
    AllOf,
    BadTokens,
    BoundConstraint,
    ForcedPrefix,
    JSONSchema,
    KnownTokens,
    MinLength,
    Regex,
    Vocabulary,
    as_constraint,
)
from textenv.wrappers import ActionMask, VectorActionMask

CASES = 20
MODES = ("SameStep", "NextStep", "Disabled")
TOLERANCE = 1e-4  # float32 forwards of two layers against float64
Sets = Callable[[Sequence[int], Sequence[int]], set[int]]


# ------------------------------------------------------------------------------------------------- the oracle


class ConstrainedOracle(Oracle):
    """The MDP in plain Python and float64 with allowed sets: `allowed(prompt, response)`."""

    allowed: Sets
    prompt: Sequence[int] = ()

    def logprob(self, logits: Any, prefix: Sequence[int], token: int) -> float:
        kept = self.allowed(self.prompt, prefix[len(self.prompt) :])
        scaled = {i: x / self.temperature for i, x in enumerate(logits(tuple(prefix))) if i in kept}
        top = max(scaled.values())
        return scaled[token] - top - math.log(sum(math.exp(x - top) for x in scaled.values()))

    def begin(self, prompt: Sequence[int], index: int) -> Step:
        step = super().begin(prompt, index)
        step.info["action_mask"] = self.mask(prompt, [], False)
        return step

    def episode(self, prompt: Sequence[int], index: int, actions: Sequence[int]) -> list[Step]:
        self.prompt = prompt
        steps = super().episode(prompt, index, actions)
        for t, step in enumerate(steps):
            step.info["action_mask"] = self.mask(prompt, actions[: t + 1], step.terminated)
        return steps

    def mask(self, prompt: Sequence[int], response: Sequence[int], terminated: bool) -> list[int]:
        kept = set(range(VOCAB)) if terminated else self.allowed(prompt, response)
        return [int(i in kept) for i in range(VOCAB)]


class PromptRule:
    """A constraint of one's own, on the prompt: its last token forbids ids of its own remainder."""

    def bind(self, vocabulary: Vocabulary) -> PromptRule:
        return self

    def start(self, prompt: tuple[int, ...]) -> tuple[int, int]:
        return prompt[-1] % 4, 0

    def advance(self, state: tuple[int, int], token: int) -> tuple[int, int]:
        return state[0], (state[1] + token) % 5

    def allowed(self, state: tuple[int, int]) -> torch.Tensor:
        ids = torch.arange(VOCAB)
        return (ids % 4 != state[0]) & (ids % 5 != state[1]) | (ids == EOS)


def hashed(response: Sequence[int]) -> list[int]:
    return [i for i in range(VOCAB) if (7 * i + 3 * sum(response) + len(response)) % 3 or i == EOS]


def hashed_mask(response: Sequence[int]) -> np.ndarray:
    mask = np.zeros(VOCAB, dtype=bool)
    mask[hashed(response)] = True
    return mask


# For each: the library's object, and the same set in plain Python.
KINDS: dict[str, tuple[Any, Sets]] = {
    "bad": (BadTokens([5, 6, 30]), lambda p, r: set(range(VOCAB)) - {5, 6, 30}),
    "prefix": (ForcedPrefix([10]), lambda p, r: {10} if not r else set(range(VOCAB))),
    "length": (MinLength(1), lambda p, r: set(range(VOCAB)) - ({EOS} if not r else set())),
    "ids": (hashed, lambda p, r: set(hashed(r))),
    "mask": (hashed_mask, lambda p, r: set(hashed(r))),
    "prompt": (
        PromptRule(),
        lambda p, r: {i for i in range(VOCAB) if (i % 4 != p[-1] % 4 and i % 5 != sum(r) % 5) or i == EOS},
    ),
}


class Setting:
    """A generated case: the library's arguments, and an oracle that knows nothing of them."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        model, reward = rng.choice(["llama", "gpt2"]), rng.choice(["ids", "dense"])
        kinds = rng.choice([*([kind] for kind in KINDS), ["bad", "length"], ["prefix", "mask"], ["prompt", "bad"]])
        cut = rng.random() < 0.3
        common = {
            "kl_source": ("agent", "policy", "reference")[seed % 3],
            "kl_credit": "token" if cut else rng.choice(["token", "sequence"]),
            "length_end": "truncate" if cut else "terminate",
            "temperature": rng.choice([1.0, 0.7]),
            "max_new_tokens": rng.choice([1, 2, 4]),
            "missing_eos_penalty": 0.0 if cut else rng.choice([0.0, 0.7]),
        }
        self.seed, self.num_envs = seed, rng.choice([1, 2, 3])
        self.prompts = [[1, rng.randrange(3, VOCAB)], [1, 5, rng.randrange(3, VOCAB)], [1, 8]]
        self.arguments = {
            **common,
            "reference": Shared(fixtures.MODELS[model]()),
            "tokenizer": fixtures.tiny_tokenizer(),
            "reward": fixtures.REWARDS[reward](),
            "prompts": self.prompts,
            "kl_coef": rng.choice([0.3, 1.7, 0.0]),
            "constraint": [KINDS[kind][0] for kind in kinds],
        }
        if common["kl_source"] == "policy":
            self.arguments["policy"] = Shared(fixtures.tiny_policy(model))
        self.oracle = ConstrainedOracle(
            **common,
            ref_logits=fixtures.float64_logits(model),
            policy_logits=fixtures.float64_logits(model, seed=7),
            score=fixtures.REWARDS[reward].one,
            dense=reward == "dense",
            stops=(EOS,),
            columns=3 + common["max_new_tokens"],
            pad=fixtures.PAD,
            kl_coef=self.arguments["kl_coef"],
            has_reference=self.arguments["kl_coef"] != 0,
        )
        self.oracle.allowed = lambda p, r: set.intersection(*(KINDS[kind][1](p, r) for kind in kinds))

    def rows(self, mode: str) -> list[Row]:
        rows = []
        for i in range(self.num_envs):
            draw = np.random.default_rng(self.seed + i)
            draws = iter(lambda draw=draw: int(draw.integers(len(self.prompts))), -1)
            rows.append(Row(self.oracle, self.prompts, draws.__next__, mode))
        return rows

    def action(self, row: Row, rng: random.Random) -> int:
        """An allowed token, a stop now and then; anything where the row rests."""
        if row.resting:
            return rng.randrange(VOCAB)
        kept = self.oracle.allowed(self.prompts[row.index], row.taken)
        return EOS if EOS in kept and rng.random() < 0.2 else rng.choice(sorted(kept))


def compare(what: str, observation: Any, info: Any, expected: Step, row: int | None = None) -> None:
    def pick(value: Any) -> Any:
        return value if row is None else value[row]

    for key, value in expected.observation.items():
        assert pick(observation[key]).tolist() == value, (what, key)
    assert {key for key in info if not key.startswith(("_", "final"))} == set(expected.info), what
    for key, value in expected.info.items():
        assert np.allclose(pick(info[key]), value, rtol=0, atol=TOLERANCE), (what, key, pick(info[key]), value)


def check_single(setting: Setting) -> list[tuple[list[int], list[int], list[Step]]]:
    """Plays on row 0, and gives the episodes that were completed."""
    env, [row, *_], rng = TextEnv(**setting.arguments), setting.rows("Disabled"), random.Random(setting.seed)
    compare("reset", *env.reset(seed=setting.seed), row.reset())
    episodes, steps = [], []
    for number in range(9):
        prompt, action = setting.prompts[row.index], setting.action(row, rng)
        taken = [*row.taken, action]
        expected = row.step(action)
        observation, reward, terminated, truncated, info = env.step(action)
        steps.append(expected)
        compare(f"step {number}", observation, info, expected)
        assert info["action_mask"].dtype == np.int8 and env.action_masks().tolist() == info["action_mask"].tolist()
        assert reward == pytest.approx(expected.reward, abs=TOLERANCE)
        assert (terminated, truncated) == (expected.terminated, expected.truncated)
        if expected.after:
            episodes.append((prompt, taken, steps))
            steps = []
            compare(f"reset after step {number}", *env.reset(), expected.after)
    return episodes


def check_vector(setting: Setting, mode: str) -> None:
    envs, rows = TextVectorEnv(setting.num_envs, autoreset_mode=mode, **setting.arguments), setting.rows(mode)
    rng = random.Random(setting.seed)
    observation, infos = envs.reset(seed=setting.seed)
    for i, row in enumerate(rows):
        compare("reset", observation, infos, row.reset(), i)
    for number in range(7):
        actions = [setting.action(row, rng) for row in rows]
        expected = [row.step(action) for row, action in zip(rows, actions, strict=True)]
        observation, rewards, terminated, truncated, infos = envs.step(np.array(actions))
        for i, one in enumerate(expected):
            compare(f"step {number}", observation, infos, one, i)
            if one.final is not None:
                compare(f"final of step {number}", infos["final_obs"][i], {}, Step(one.final.observation, {}))
                compare(f"final of step {number}", {}, infos["final_info"], Step({}, one.final.info), i)
        assert np.allclose(rewards, [one.reward for one in expected], rtol=0, atol=TOLERANCE), number
        assert terminated.tolist() == [one.terminated for one in expected]
        assert truncated.tolist() == [one.truncated for one in expected]
        begun = np.array([one.after is not None for one in expected])
        if begun.any():
            observation, infos = envs.reset(options={"reset_mask": begun})
            for i, one in enumerate(expected):
                if one.after:
                    compare(f"reset after step {number}", observation, infos, one.after, i)


def check_replay(setting: Setting, episodes: list[tuple[list[int], list[int], list[Step]]]) -> None:
    if not episodes:
        return
    prompts, responses, steps = zip(*episodes, strict=True)
    record = TextVectorEnv(1, **setting.arguments).replay(prompts, responses)
    for row, said in enumerate(steps):
        rest = [0.0] * (record.mask.shape[1] - len(said))
        assert np.allclose(record.rewards[row], [s.reward for s in said] + rest, rtol=0, atol=TOLERANCE)
        refs = said[-1].info.get("ref_logprobs", [s.info["ref_logprob"] for s in said])[: len(said)]
        assert np.allclose(record.ref_logprobs[row], refs + rest, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("seed", range(CASES))
def test_three_ways_and_the_oracle_agree(seed: int) -> None:
    setting = Setting(seed)
    episodes = check_single(setting)
    for mode in MODES:
        check_vector(setting, mode)
    check_replay(setting, episodes)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask_in_obs", [False, True])
def test_checker_passes(mode: str, mask_in_obs: bool) -> None:
    given = [hashed, BadTokens([5])]
    envs = VectorActionMask(TextVectorEnv(3, autoreset_mode=mode, **options()), given, mask_in_obs)

    def draw(rng: np.random.Generator) -> np.ndarray:
        return np.array([rng.choice(np.flatnonzero(mask)) for mask in envs.action_masks()])

    check_vector_env(envs, lambda: ActionMask(TextEnv(**options()), given, mask_in_obs), steps=10, sample=draw)


def test_the_cases_cover_what_they_should() -> None:
    settings = [Setting(seed) for seed in range(CASES)]
    pairs = {(s.arguments["kl_source"], s.arguments["kl_credit"]) for s in settings}
    assert pairs == set(itertools.product(("agent", "policy", "reference"), ("token", "sequence")))
    assert {s.arguments["length_end"] for s in settings} == {"terminate", "truncate"}
    assert any(any(part is PromptRule for part in map(type, s.arguments["constraint"])) for s in settings)


# ------------------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("kl_credit", ["token", "sequence"])
def test_the_reference_sums_to_one_over_the_allowed_set(kl_credit: str) -> None:
    env = TextEnv(**options(constraint=hashed, kl_credit=kl_credit, max_new_tokens=2, stop_token_ids=[]))
    first, kept = hashed([])[3], hashed([hashed([])[3]])
    record = env.replay([[1, 5]] * len(kept), [[first, last] for last in kept])
    assert float(record.ref_logprobs[:, 1].double().exp().sum()) == pytest.approx(1.0, abs=1e-5)
    free = TextEnv(**options(kl_credit=kl_credit, max_new_tokens=2, stop_token_ids=[]))
    whole = free.replay([[1, 5]] * len(kept), [[first, last] for last in kept])
    assert float(whole.ref_logprobs[:, 1].double().exp().sum()) < 0.9


def test_allowing_everything_changes_no_number() -> None:
    free, all_allowed = (TextEnv(**options(constraint=given)) for given in (None, BadTokens([])))
    for env in (free, all_allowed):
        env.reset(seed=1)
    for action in (5, 6, 7, 8):
        one, two = free.step(action), all_allowed.step(action)
        assert one[1:4] == two[1:4]
        assert float(one[-1]["ref_logprob"]) == pytest.approx(float(two[-1]["ref_logprob"]), abs=1e-6)


def test_large_chunks_do_not_matter() -> None:
    from textenv.reference import allowed_logprobs

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(12, 5, generator=generator)
    head = torch.nn.Linear(5, 7)
    sets = torch.rand(12, 7, generator=generator) < 0.6
    targets = torch.randint(7, (12,), generator=generator)
    sets.scatter_(1, targets[:, None], True)
    for chunk in (1, 8, 15, 2**22):
        told = allowed_logprobs(
            hidden, head, targets, lambda some: sets[some], temperature=0.7, max_chunk_elements=chunk
        )
        logits = (head(hidden).double() / 0.7).masked_fill(~sets, -torch.inf)
        wanted = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        assert torch.allclose(told.double(), wanted, atol=1e-5)


# ------------------------------------------------------------------------------------------------- refusals


def test_a_token_that_is_not_allowed_is_an_invalid_action_and_nothing_happens() -> None:
    env = TextEnv(**options(constraint=BadTokens([5])))
    before = env.reset(seed=0)
    with pytest.raises(gym.error.InvalidAction, match=r"that the constraint allows .*, got 5 in row 0"):
        env.step(5)
    twin = TextEnv(**options(constraint=BadTokens([5])))
    twin.reset(seed=0)
    assert before[0]["attention_mask"].sum() == env.step(6)[0]["attention_mask"].sum() - 1
    assert env.step(7)[-1]["ref_logprob"] == (twin.step(6), twin.step(7))[1][-1]["ref_logprob"]


def test_a_row_that_rests_may_be_given_anything() -> None:
    envs = TextVectorEnv(2, autoreset_mode="NextStep", **options(constraint=BadTokens([5]), length_end="truncate"))
    envs.reset(seed=0)
    envs.step(np.array([EOS, 6]))
    envs.step(np.array([5, 7]))  # row 0 rests
    with pytest.raises(gym.error.InvalidAction, match="got 5 in row 1"):
        envs.step(np.array([6, 5]))


def test_replay_names_row_and_position_of_what_is_not_allowed() -> None:
    env = TextEnv(**options(constraint=BadTokens([5]), kl_coef=0))
    with pytest.raises(ValueError, match="got 5 at position 1 in row 1"):
        env.replay([[1], [1]], [[6, EOS], [6, 5, EOS]])


def narrow(response: list[int]) -> list[int]:
    return [] if response == [6] else [6, 7]


@pytest.mark.parametrize("kl_source", ["agent", "policy"])
def test_a_dead_end_is_told_when_it_arises_and_the_step_has_not_happened(kl_source: str) -> None:
    envs = TextVectorEnv(2, autoreset_mode="Disabled", **options(constraint=narrow, kl_source=kl_source))
    twin = TextVectorEnv(2, autoreset_mode="Disabled", **options(constraint=narrow, kl_source=kl_source))
    for each in (envs, twin):
        each.reset(seed=0)
    with pytest.raises(ValueError, match=r"none in row 1 after the response \[6\]"):
        envs.step(np.array([7, 6]))
    for mine, theirs in ((envs.step(np.array([7, 7])), twin.step(np.array([7, 7]))) for _ in range(3)):
        assert np.array_equal(mine[0]["input_ids"], theirs[0]["input_ids"])
        assert np.allclose(mine[1], theirs[1]) and np.allclose(mine[-1]["ref_logprob"], theirs[-1]["ref_logprob"])


def test_a_dead_end_at_the_beginning_is_told_by_reset() -> None:
    env = TextEnv(**options(constraint=lambda response: []))
    with pytest.raises(ValueError, match=r"none at the beginning of row 0, prompt \[1, 30\]"):
        env.reset(options={"prompt_index": 1})
    with pytest.raises(gym.error.ResetNeeded):
        env.step(5)


def test_where_an_episode_ends_there_is_no_dead_end() -> None:
    env = TextEnv(**options(constraint=narrow, max_new_tokens=1))
    env.reset(seed=0)
    assert env.step(6)[-1]["action_mask"].all()
    cut = TextEnv(**options(constraint=narrow, max_new_tokens=2, length_end="truncate"))
    cut.reset(seed=0)
    cut.step(7)
    # A learner bootstraps from the state after the cut, whose actions are these.
    assert np.flatnonzero(cut.step(7)[-1]["action_mask"]).tolist() == [6, 7]
    runs_out = [[7], [8], []]
    dead = TextEnv(**options(constraint=lambda r: runs_out[len(r)], max_new_tokens=2, length_end="truncate"))
    dead.reset(seed=0)
    dead.step(7)
    assert dead.step(8)[-1]["action_mask"].all()  # nothing is chosen there either


class FailsOnce(fixtures.IdReward):
    failed = False

    def __call__(self, prompts: Any, responses: Any) -> list[float]:
        if not self.failed:
            self.failed = True
            raise RuntimeError("not now")
        return super().__call__(prompts, responses)


def test_a_step_that_fails_leaves_the_allowed_sets_alone() -> None:
    envs = TextVectorEnv(2, autoreset_mode="Disabled", **options(constraint=hashed, reward=FailsOnce()))
    envs.reset(seed=0)
    before = envs.action_masks()
    with pytest.raises(ValueError, match="not now"):
        envs.step(np.array([EOS, 5]))
    assert np.array_equal(envs.action_masks(), before)
    assert np.flatnonzero(envs.step(np.array([EOS, 5]))[-1]["action_mask"][1]).tolist() == hashed([5])


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (5, "constraint: expected a constraint, a function of the response, or a list, got 5"),
        ([], "constraint: expected a constraint, .* got \\[\\]"),
        ([BadTokens([1]), None], "constraint: expected a constraint"),
        (torch.nn.Linear(2, 2), "constraint: expected live modules to be wrapped"),
        (BadTokens([VOCAB]), r"BadTokens.ids: expected token ids in \[0, 40\), got \[40\]"),
        (BadTokens(5), "BadTokens.ids: expected token ids"),  # type: ignore[arg-type]
        (ForcedPrefix([5] * 5), r"len\(ForcedPrefix.ids\): expected an integer in \[0, max_new_tokens=4\], got 5"),
        (ForcedPrefix([EOS, 5]), "ForcedPrefix.ids: expected no stop token before the last"),
        (MinLength(5), r"MinLength.tokens: expected an integer in \[0, max_new_tokens=4\], got 5"),
        (MinLength(True), "MinLength.tokens: expected an integer"),
        (Regex("(a"), r"Regex.pattern: expected what these tokens can spell and end, got '\(a'"),
        (JSONSchema("no"), "JSONSchema.schema: expected one that can be compiled, got no"),
    ],
)
def test_bad_constraints(constraint: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextEnv(**options(constraint=constraint))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([VOCAB], "expected a boolean mask of 40 entries or ids below that"),
        ([-1], "expected a boolean mask"),
        ([0.5], "expected a boolean mask"),
        ([True] * 3, "expected a boolean mask of 40 entries"),
    ],
)
def test_bad_answers_of_a_function(answer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextEnv(**options(constraint=lambda response: answer)).reset(seed=0)


def test_a_rule_must_give_a_mask() -> None:
    class Counts(PromptRule):
        def allowed(self, state: Any) -> Any:
            return np.ones(VOCAB)

    with pytest.raises(ValueError, match=r"boolean mask of shape \(40,\), got torch.float64"):
        TextEnv(**options(constraint=Counts())).reset(seed=0)


def test_what_a_constraint_needs() -> None:
    for constraint in (Regex("a"), KnownTokens()):
        with pytest.raises(ValueError, match="tokenizer: expected one"):
            TextEnv(**options(constraint=constraint, tokenizer=None))
    with pytest.raises(ValueError, match="stop_token_ids: expected at least one"):
        TextEnv(**options(constraint=Regex("a"), stop_token_ids=[]))


# ------------------------------------------------------------------------------------------------- the tools


def bound(constraint: Any, **changes: Any) -> BoundConstraint:
    given = {"size": VOCAB, "stop_token_ids": (EOS,), "max_new_tokens": 8, "tokenizer": fixtures.tiny_tokenizer()}
    return BoundConstraint(as_constraint(constraint), Vocabulary(**(given | changes)), torch.device("cpu"))


def sets(constraint: BoundConstraint, response: Sequence[int]) -> set[int]:
    state = constraint.start([1])
    for token in response:
        state = constraint.advance(state, token)
    return set(constraint.mask(state).nonzero()[:, 0].tolist())


def test_prefix_and_length_by_hand() -> None:
    everything = set(range(VOCAB))
    prefix = bound(ForcedPrefix([7, 8]))
    assert [sets(prefix, r) for r in ([], [7], [7, 8], [7, 8, 9])] == [{7}, {8}, everything, everything]
    length = bound(MinLength(2))
    assert [sets(length, r) for r in ([], [5], [5, 5])] == [everything - {EOS}, everything - {EOS}, everything]
    both = bound(AllOf((ForcedPrefix([7]), BadTokens([9]), MinLength(1))))
    assert [sets(both, r) for r in ([], [7])] == [{7}, everything - {9}]


def test_known_tokens() -> None:
    words = set(range(3, VOCAB))
    assert sets(bound(KnownTokens(), size=VOCAB + 5), []) == words | {EOS}
    assert sets(bound(KnownTokens(special=True), size=VOCAB + 5), []) == words | {0, 1, EOS}
    assert sets(bound(KnownTokens(), stop_token_ids=(1,)), []) == words | {1}


def test_the_memory_of_masks_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("textenv.constraints.base.CACHE_BYTES", 20 * VOCAB)
    asked: list[tuple[int, ...]] = []

    def ask(response: list[int]) -> list[int]:
        asked.append(tuple(response))
        return [len(response) + 3]

    constraint = bound(ask)
    states = [tuple(range(n)) for n in range(30)]
    for _ in range(2):
        assert [constraint.mask(state).nonzero().item() for state in states] == [n + 3 for n in range(30)]
    assert len(constraint._masks) == 20
    assert constraint.mask(states[-1]) is constraint.mask(states[-1])


def test_a_batch_shares_the_masks_of_a_state() -> None:
    constraint = bound(hashed)
    masks = constraint.masks([(), (4,), (), (5,)])
    wanted = [[i in hashed(state) for i in range(VOCAB)] for state in ((), (4,), (), (5,))]
    assert masks.tolist() == wanted
    assert constraint.masks([(), ()]).tolist() == [wanted[0]] * 2


# ------------------------------------------------------------------------------------------------- text


def language(constraint: BoundConstraint, limit: int) -> set[str]:
    """Every text that ends with a stop within `limit` tokens; each token's text is asked of the tokenizer."""
    found, open_ends = set(), [((), constraint.start([1]))]
    anchor = fixtures.tiny_tokenizer().decode([20])
    while open_ends:
        response, state = open_ends.pop()
        kept = constraint.mask(state).nonzero()[:, 0].tolist()
        if EOS in kept:
            found.add(fixtures.tiny_tokenizer().decode([20, *response])[len(anchor) :])
        if len(response) < limit:
            open_ends += [((*response, t), constraint.advance(state, t)) for t in kept if t != EOS]
    return found


def test_a_pattern_allows_its_language_and_no_other_text() -> None:
    # Pieces are " ax", " ay", ... (▁ax) and single letters: a text has several spellings.
    assert language(bound(Regex(" ax( ?b)?y?")), 6) == {" ax", " axb", " ax b", " axy", " axby", " ax by"} - {
        " ax b",  # no piece is " b" alone; " by" is one
    }


@pytest.mark.parametrize("pattern", [" ax(by)*", " ax(byb)*y", "a(xyb)?", "a*(bbc)*", "x|xyb|xybax"])
def test_a_pattern_may_go_on_after_a_match(pattern: str) -> None:
    """Every spelling of every text: outlines-core by itself drops those that go on letter by letter."""
    constraint, found = bound(Regex(pattern, finish=False)), 0
    letters = {fixtures.PIECES.index(piece): piece.replace("▁", " ") for piece in [*"abcxy", "▁ax"]}
    for length in range(6):
        for response in itertools.product(letters, repeat=length):
            text, state, spelled = "".join(letters[i] for i in response), constraint.start([1]), True
            for token in response:
                spelled = bool(constraint.mask(state)[token])
                if not spelled:
                    break
                state = constraint.advance(state, token)
            ends = spelled and bool(constraint.mask(state)[EOS])
            assert ends == bool(re.fullmatch(pattern, text)), text
            found += ends
    assert found >= 2


def test_a_stop_is_allowed_exactly_where_the_text_matches() -> None:
    pattern = "( ?[ab][xy])+"
    constraint, tokenizer = bound(Regex(pattern)), fixtures.tiny_tokenizer()
    rng, ends, goes = random.Random(0), 0, 0
    for _ in range(60):
        state, response = constraint.start([1, 20]), []
        for _ in range(6):
            text = tokenizer.decode([20, *response])[1:]
            kept = constraint.mask(state).nonzero()[:, 0].tolist()
            assert (EOS in kept) == bool(re.fullmatch(pattern, text)), text
            ends, goes = ends + (EOS in kept), goes + (EOS not in kept)
            response.append(rng.choice([t for t in kept if t != EOS]))
            state = constraint.advance(state, response[-1])
            assert not {0, 1} & set(kept)
    assert ends > 20 and goes > 20


def test_responses_under_a_schema_are_json(material: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["Tim", "Sue"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["name", "age"],
    }
    env = TextEnv(
        reference=material / "models" / "stories260K",
        reward=lambda prompts, responses: [0.0] * len(responses),
        prompts=["Once upon a time"],
        stop_token_ids=[1],
        max_new_tokens=60,
        info_text=True,
        constraint=JSONSchema(schema, whitespace=" ?"),
    )
    rng = np.random.default_rng(0)
    for _ in range(3):
        env.reset(seed=0)
        ended = False
        while not ended:
            *_, ended, _, info = env.step(int(rng.choice(np.flatnonzero(env.action_masks()))))
        assert info["finish_reason"] == 1
        value = json.loads(info["response_text"])
        assert value["name"] in ("Tim", "Sue") and isinstance(value["age"], int)


def test_a_pattern_is_finished_in_time() -> None:
    tokens = {" ax": 3, "b": 16, "y": 39}
    tokens = {text: fixtures.PIECES.index(text.replace(" ", "▁")) for text in tokens}
    constraint = bound(Regex(" ax(by)*"), max_new_tokens=4)
    ax, b, y = tokens.values()
    assert sets(constraint, [ax]) == {b, EOS}
    assert sets(constraint, [ax, b]) == {y}
    assert sets(constraint, [ax, b, y]) == {EOS}  # "b", "y" and a stop would be two too many
    assert sets(bound(Regex(" ax(by)*"), max_new_tokens=3), [ax]) == {EOS}
    assert sets(bound(Regex(" ax(by)*", finish=False), max_new_tokens=4), [ax, b, y]) == {b, EOS}
    with pytest.raises(ValueError, match=r"spell and end, .* \(it needs 2 tokens, and max_new_tokens is 1\)"):
        bound(Regex(" ax(by)*"), max_new_tokens=1)


@pytest.mark.parametrize("limit", [2, 3, 5])
def test_every_response_matches(limit: int) -> None:
    pattern, rng = "( ?[ab][xy])+(cde)?", np.random.default_rng(0)
    env = TextEnv(**options(constraint=Regex(pattern), max_new_tokens=limit, info_text=True))
    for seed in range(20):
        _, info = env.reset(seed=seed)
        while not info["finish_reason"]:
            info = env.step(int(rng.choice(np.flatnonzero(info["action_mask"]))))[-1]
        assert info["finish_reason"] == 1 and re.fullmatch(pattern, info["response_text"])


def test_pieces_are_what_the_tokenizer_writes(material: Any) -> None:
    from transformers import AutoTokenizer

    from textenv.constraints.pieces import token_bytes

    tokenizer = AutoTokenizer.from_pretrained(material / "models" / "stories260K")
    pieces, rng, compared = token_bytes(tokenizer, len(tokenizer), [1]), random.Random(0), 0
    assert len(pieces) > 500 and pieces[13] == b"\n"
    prompt = tokenizer("Once upon a time")["input_ids"]
    for _ in range(400):
        response = [rng.choice(list(pieces)) for _ in range(5)]
        try:
            text = b"".join(pieces[i] for i in response).decode()
        except UnicodeDecodeError:
            continue  # half a letter: the tokenizer writes signs of its own for it
        written = tokenizer.decode(prompt + response, clean_up_tokenization_spaces=False)
        assert written == tokenizer.decode(prompt) + text
        compared += 1
    assert compared > 100


def test_byte_level_pieces() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from textenv.constraints.pieces import token_bytes

    spelled = ["<|end|>", "a", "b", "Ġa", "Ċ", "Ã", "©", "Ã©"]  # Ġ is a space, Ċ a line feed, Ã© the two bytes of é
    inner = Tokenizer(models.BPE({piece: i for i, piece in enumerate(spelled)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
    tokenizer.add_tokens(["<call é>"])
    assert token_bytes(tokenizer, 8, [0]) == {
        1: b"a",
        2: b"b",
        3: b" a",
        4: b"\n",
        5: "é".encode()[:1],
        6: "é".encode()[1:],
        7: "é".encode(),
    }
    assert token_bytes(tokenizer, 9, [1])[8] == "<call é>".encode()
    constraint = bound(Regex("aéb"), size=9, stop_token_ids=(0,), tokenizer=tokenizer)
    assert [sets(constraint, r) for r in ([], [1], [1, 5], [1, 5, 6], [1, 7, 2])] == [{1}, {5, 7}, {6}, {2}, {0}]


def test_without_outlines_core_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "outlines_core", None)
    with pytest.raises(ImportError, match=r"pip install 'textenv\[grammar\]'"):
        TextEnv(**options(constraint=Regex("a")))


# ------------------------------------------------------------------------------------------------- the wrapper


def test_the_wrapper_is_the_option() -> None:
    wrapped = ActionMask(gym.make("RLHF-Text-v0", **options()), hashed)
    given = TextEnv(**options(constraint=hashed))
    for seed in range(3):
        (_, one), (_, two) = wrapped.reset(seed=seed), given.reset(seed=seed)
        assert one.keys() == two.keys()
        for _ in range(4):
            action = int(np.flatnonzero(one["action_mask"])[4])
            (*mine, one), (*theirs, two) = wrapped.step(action), given.step(action)
            assert mine[1:] == theirs[1:] and one["ref_logprob"] == two["ref_logprob"]
            assert np.array_equal(one["action_mask"], two["action_mask"])
            assert np.array_equal(wrapped.action_masks(), given.action_masks())


def test_the_mask_in_the_observation_is_that_of_its_state() -> None:
    env = ActionMask(gym.make("RLHF-Text-v0", **options()), hashed, mask_in_obs=True)
    assert env.observation_space["action_mask"] == gym.spaces.Box(0, 1, (VOCAB,), np.int8)
    observation, info = env.reset(seed=0)
    for action in (5, 7, 6):
        assert np.array_equal(observation["action_mask"], info["action_mask"])
        assert observation["action_mask"].tolist() == env.action_masks().tolist()
        observation, _, _, _, info = env.step(action)
    envs = VectorActionMask(TextVectorEnv(2, **options(constraint=hashed)), mask_in_obs=True)
    envs.reset(seed=0)
    observation, *_, infos = envs.step(np.array([5, EOS]))
    assert infos["final_obs"][1]["action_mask"].all()
    assert np.array_equal(observation["action_mask"], envs.action_masks())
    assert np.flatnonzero(observation["action_mask"][0]).tolist() == hashed([5])


def test_torch_masks() -> None:
    envs = VectorActionMask(TextVectorEnv(2, obs_type="torch", **options()), hashed, mask_in_obs=True)
    observation, infos = envs.reset(seed=0)
    assert observation["action_mask"].dtype == infos["action_mask"].dtype == torch.int8
    assert torch.equal(envs.action_masks(), observation["action_mask"].bool())


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_copies_go_on_alone(way: str) -> None:
    env = TextEnv(**options(constraint=[hashed, Regex("( ?[a-d][xyz])*")], stop_token_ids=[EOS]))
    env.reset(seed=0)

    def go(each: TextEnv) -> list[Any]:
        said = []
        for _ in range(3):
            said.append(each.step(int(np.flatnonzero(each.action_masks())[-1])))
        return [(s[1], s[-1]["action_mask"].tolist(), float(s[-1]["ref_logprob"])) for s in said]

    twin = pickle.loads(pickle.dumps(env)) if way == "pickle" else copy.deepcopy(env)
    assert go(env) == go(twin)


def test_misuse_of_the_wrapper() -> None:
    with pytest.raises(ValueError, match="constraint: expected one, because the environment was made without"):
        ActionMask(TextEnv(**options()))
    with pytest.raises(ValueError, match="constraint: expected none yet, got one; give them together"):
        ActionMask(TextEnv(**options(constraint=hashed)), BadTokens([5]))
    with pytest.raises(ValueError, match=r"expected gym\.make\("):
        ActionMask(gym.make("CartPole-v1"), hashed)
    with pytest.raises(ValueError, match=r"expected gym\.make_vec"):
        VectorActionMask(gym.make_vec("CartPole-v1", num_envs=2), hashed)
    env = TextEnv(**options())
    env.reset(seed=0)
    ActionMask(env, hashed)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(5)


def test_made_again_from_its_spec() -> None:
    env = ActionMask(gym.make("RLHF-Text-v0", **options()), [BadTokens([5])], mask_in_obs=True)
    assert env.spec is not None
    again = gym.make(env.spec)
    assert again.reset(seed=0)[0]["action_mask"].tolist() == env.reset(seed=0)[0]["action_mask"].tolist()


# ------------------------------------------------------------------------------------------------- other libraries


def test_maskable_ppo_reads_the_masks() -> None:
    pytest.importorskip("sb3_contrib")
    from sb3_contrib import MaskablePPO
    from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
    from stable_baselines3.common.vec_env import DummyVecEnv

    def make() -> gym.Env:
        return ActionMask(gym.make("RLHF-Text-v0", **options()), hashed)

    env = make()
    env.reset(seed=0)
    assert is_masking_supported(env)
    assert np.flatnonzero(get_action_masks(env)).tolist() == hashed([])
    envs = DummyVecEnv([make, make])
    envs.reset()
    assert get_action_masks(envs).shape == (2, VOCAB)
    # A token outside the mask would be an error, and an untrained policy picks a third of them without it.
    MaskablePPO("MultiInputPolicy", envs, n_steps=16, batch_size=16, n_epochs=1, device="cpu").learn(64)
