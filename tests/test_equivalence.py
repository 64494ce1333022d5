"""The law of equivalence: one MDP, three ways through it, one answer; on generated cases, against a float64 oracle."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path
from typing import Any

import env_fixtures as fixtures
import env_oracle
import numpy as np
import pytest
from env_oracle import Oracle, Row, Step, generate, legal, texts

from textenv import Shared, TextEnv, TextVectorEnv, check_vector_env
from textenv.kl import AdaptiveKL

CASES = 216
MODES = ("SameStep", "NextStep", "Disabled")
TOLERANCE = 1e-4  # float32 forwards of two layers against float64


def named_terms(letters: Any, ids: Any, dense: Any) -> dict[str, list[Any]]:
    """What the sums of the fixtures are made of: name, weight of what is paid (0: only told), dense, and value."""
    return {
        "sum": [
            ("letters", 0.5, False, letters),
            ("ids", -2.0, False, lambda p, r: min(max(ids(p, r), -1.0), 0.5)),
            ("ids/raw", 0.0, False, ids),
        ],
        "mixed": [
            ("both", 0.0, True, lambda p, r: [0.0]),  # replaced by what is below it, `Mixed`
            ("both/tokens", 0.5, True, dense),
            ("both/letters", 0.5, False, letters),
            ("ids", 1.5, False, ids),
            ("dense", -1.0, True, dense),
        ],
    }


class Mixed(Oracle):
    """`both` is the sum of the two that are below it."""

    def episode(self, prompt: Any, index: int, actions: Any) -> list[Step]:
        steps = super().episode(prompt, index, actions)
        for info in (step.info for step in steps if self.terms and self.terms[0][0] == "both"):
            info["reward_parts/both"] = info["reward_parts/both/tokens"] + info["reward_parts/both/letters"]
        return steps


class Setting:
    """A generated case: the library's arguments, and the oracle that knows nothing of them."""

    def __init__(self, seed: int) -> None:
        self.case = generate(seed, fixtures.VOCAB)
        self.columns = max(map(len, self.case["prompts"])) + self.case["max_new_tokens"]
        case = self.case
        stops = case["stop_token_ids"]

        def letters(prompt: list[int], response: list[int]) -> float:
            return fixtures.LetterReward.one(*texts(fixtures.PIECES, (0, 1, 2), stops, prompt, response))

        ids, dense = fixtures.IdReward.one, fixtures.DenseReward.one
        adaptive = case["kl_coef"] == "controller"
        same = ("max_new_tokens", "kl_source", "kl_credit", "length_end", "missing_eos_penalty", "temperature")
        self.oracle = Mixed(
            ref_logits=fixtures.float64_logits(case["model"]),
            policy_logits=fixtures.float64_logits(case["model"], seed=7),
            score={"text": letters, "ids": ids, "dense": dense}.get(case["reward"], letters),
            dense=case["reward"] == "dense",
            terms=named_terms(letters, ids, dense).get(case["reward"], ()),
            stops=stops,
            columns=self.columns,
            pad=fixtures.PAD,
            # Ziegler's controller after one rollout of 9 nats over 50 episodes: the error is clipped at 0.2.
            kl_coef=0.3 * (1 + 0.2 * 50 / 100) if adaptive else case["kl_coef"],
            has_reference=adaptive or case["kl_coef"] != 0,
            **{name: case[name] for name in same},
        )

    def arguments(self) -> dict[str, Any]:
        case = self.case
        arguments = {
            name: value for name, value in case.items() if name not in ("model", "num_envs", "seed", "actions")
        }
        arguments |= {
            "reference": Shared(fixtures.MODELS[case["model"]]()),
            "tokenizer": fixtures.tiny_tokenizer(),
            "reward": fixtures.REWARDS[case["reward"]](),
        }
        if case["kl_source"] == "policy":
            arguments["policy"] = Shared(fixtures.tiny_policy(case["model"]))
        if case["kl_coef"] == "controller":
            arguments["kl_coef"] = AdaptiveKL(0.3, target=6.0, horizon=100)
            arguments["kl_coef"].update(9.0, 50)
        return arguments

    def rows(self, mode: str) -> list[Row]:
        """Row i draws its prompts from a generator of its own, seeded `seed + i`."""
        rows = []
        for i in range(self.case["num_envs"]):
            rng = np.random.default_rng(self.case["seed"] + i)
            draws = iter(lambda rng=rng: int(rng.integers(len(self.case["prompts"]))), -1)
            rows.append(Row(self.oracle, self.case["prompts"], draws.__next__, mode))
        return rows


def compare(what: str, observation: Any, info: Any, expected: Step, row: int | None = None) -> None:
    """One row of what a batch said (or what the single environment said) against the oracle."""

    def pick(value: Any) -> Any:
        return value if row is None else value[row]

    for key, value in expected.observation.items():
        assert pick(observation[key]).tolist() == value, (what, key)
    keys = {key for key in info if not key.startswith(("_", "final"))}
    assert keys == set(expected.info), what
    for key, value in expected.info.items():
        assert np.allclose(pick(info[key]), value, rtol=0, atol=TOLERANCE), (what, key, pick(info[key]), value)
        if row is not None:
            assert info[f"_{key}"][row], (what, key)


def check_single(setting: Setting) -> None:
    env, [row, *_] = TextEnv(**setting.arguments()), setting.rows("Disabled")
    compare("reset", *env.reset(seed=setting.case["seed"]), row.reset())
    for step, (action, *_) in enumerate(setting.case["actions"]):
        expected = row.step(action)
        observation, reward, terminated, truncated, info = env.step(action)
        compare(f"step {step}", observation, info, expected)
        assert reward == pytest.approx(expected.reward, abs=TOLERANCE)
        assert (terminated, truncated) == (expected.terminated, expected.truncated)
        if expected.after:
            compare(f"reset after step {step}", *env.reset(), expected.after)


def check_vector(setting: Setting, mode: str) -> None:
    case, rows = setting.case, setting.rows(mode)
    envs = TextVectorEnv(case["num_envs"], autoreset_mode=mode, **setting.arguments())
    observation, infos = envs.reset(seed=case["seed"])
    for i, row in enumerate(rows):
        compare("reset", observation, infos, row.reset(), i)
    for step, actions in enumerate(case["actions"]):
        expected = [row.step(action) for row, action in zip(rows, actions, strict=True)]
        observation, rewards, terminated, truncated, infos = envs.step(np.array(actions))
        ended = [one.final is not None for one in expected]
        assert ("final_obs" in infos) == any(ended)
        for i, one in enumerate(expected):
            compare(f"step {step}", observation, infos, one, i)
            if one.final is not None:
                compare(f"final of step {step}", infos["final_obs"][i], {}, Step(one.final.observation, {}))
                compare(f"final of step {step}", {}, infos["final_info"], Step({}, one.final.info), i)
        if any(ended):
            assert infos["_final_obs"].tolist() == infos["_final_info"].tolist() == ended
        assert np.allclose(rewards, [one.reward for one in expected], rtol=0, atol=TOLERANCE), step
        assert terminated.tolist() == [one.terminated for one in expected]
        assert truncated.tolist() == [one.truncated for one in expected]
        begun = np.array([one.after is not None for one in expected])
        if begun.any():
            observation, infos = envs.reset(options={"reset_mask": begun})
            for i, one in enumerate(expected):
                if one.after:
                    compare(f"reset after step {step}", observation, infos, one.after, i)


def check_sync(setting: Setting, mode: str) -> None:
    case, actions = setting.case, iter(setting.case["actions"])
    check_vector_env(
        TextVectorEnv(case["num_envs"], autoreset_mode=mode, **setting.arguments()),
        lambda: TextEnv(**setting.arguments()),
        steps=len(case["actions"]),
        seed=case["seed"],
        sample=lambda _: np.array(next(actions)),
        atol=TOLERANCE,
    )


def check_replay(setting: Setting) -> None:
    """Every episode that the actions complete, replayed in one batch."""
    prompts, episodes = [], []
    for column in range(setting.case["num_envs"]):
        actions = [row[column] for row in setting.case["actions"]]
        index = column % len(setting.case["prompts"])
        while actions:
            prompt = setting.case["prompts"][index]
            steps = setting.oracle.episode(prompt, index, actions)
            if not (steps[-1].terminated or steps[-1].truncated):
                break
            prompts.append(prompt)
            episodes.append((actions[: len(steps)], steps))
            actions = actions[len(steps) :]
    responses = [response for response, _ in episodes]
    envs = TextVectorEnv(1, **setting.arguments())
    record = envs.replay(prompts, responses)
    if setting.case["kl_source"] == "policy" and record.logprobs is not None:
        again = envs.replay(
            prompts, responses, [row[: len(r)] for row, r in zip(record.logprobs, responses, strict=True)]
        )
        assert np.allclose(again.rewards, record.rewards, rtol=0, atol=1e-6)
    for row, (response, steps) in enumerate(episodes):
        last, rest = steps[-1], record.mask.shape[1] - len(steps)
        assert record.mask[row].tolist() == [True] * len(steps) + [False] * rest
        assert record.ids[row, record.attention_mask[row]].tolist() == [*prompts[row], *response]
        refs = last.info.get("ref_logprobs", [step.info["ref_logprob"] for step in steps])
        expected = {"rewards": [step.reward for step in steps], "ref_logprobs": refs[: len(steps)]}
        for key, values in expected.items():
            assert np.allclose(getattr(record, key)[row], values + [0.0] * rest, rtol=0, atol=TOLERANCE), key
        for part, values in record.reward_parts.items():
            paid = [step.info[f"reward_parts/{part}"] for step in steps]
            assert np.allclose(values[row], paid + [0.0] * rest, rtol=0, atol=TOLERANCE), part
        assert record.scores[row] == pytest.approx(last.info["score"], abs=TOLERANCE)
        assert record.finish_reasons[row] == last.info["finish_reason"]
        assert (bool(record.terminated[row]), bool(record.truncated[row])) == (last.terminated, last.truncated)
        assert record.scored[row] == last.terminated


@pytest.mark.parametrize("seed", range(CASES))
def test_three_ways_and_the_oracle_agree(seed: int) -> None:
    setting = Setting(seed)
    check_single(setting)
    for mode in MODES:
        check_vector(setting, mode)
    check_sync(setting, MODES[seed % 3])
    check_replay(setting)


def test_the_cases_cover_every_pair_of_options() -> None:
    cases = [generate(seed, fixtures.VOCAB) for seed in range(CASES)]
    names = [name for name in cases[0] if name not in ("seed", "prompts", "actions")]
    for one, two in itertools.combinations(names, 2):
        wanted = set(itertools.product({case[one] for case in cases}, {case[two] for case in cases}))
        seen = {(case[one], case[two]) for case in cases}
        plain = {"length_end": "terminate", "kl_credit": "token", "missing_eos_penalty": 0.0}
        assert {pair for pair in wanted - seen if legal(plain | {one: pair[0], two: pair[1]})} == set(), (one, two)


def test_every_ending_is_met() -> None:
    reasons = set()
    for seed in range(40):
        setting = Setting(seed)
        for column in range(setting.case["num_envs"]):
            actions = [row[column] for row in setting.case["actions"]]
            steps = setting.oracle.episode(setting.case["prompts"][0], 0, actions)
            reasons.add(
                (steps[-1].info["finish_reason"], steps[-1].terminated, len(steps) == setting.oracle.max_new_tokens)
            )
    assert reasons >= {(1, True, False), (1, True, True), (2, True, True), (2, False, True)}


def test_the_oracle_is_plain_python() -> None:
    nodes = list(ast.walk(ast.parse(Path(env_oracle.__file__).read_text(encoding="utf8"))))
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert modules == {"__future__", "collections.abc", "dataclasses", "math", "random", "typing"}
