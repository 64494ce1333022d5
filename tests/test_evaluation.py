"""Evaluation: what it counts, that it repeats, and that the best checkpoint is the one kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from agents import PPO, Evaluation, ValueHeadLM, evaluate
from agents.evaluation import distinct_n
from tests.agent_fixtures import even_share, identical, make_agent, make_env, make_policy, small_config, weights
from tests.conftest import make_gpt2, make_llama

HELDOUT = [[5, 6, 7], [8], [9, 10], [11, 12]]


@pytest.mark.parametrize(
    ("texts", "n", "share"),
    [
        (["the cat saw the cat"], 1, 3 / 5),
        (["the cat saw the cat"], 2, 3 / 4),  # the-cat, cat-saw, saw-the, the-cat
        (["a b c", "A B C"], 2, 2 / 4),  # case is folded
        (["a b", "b c"], 2, 1.0),  # no pair spans two texts: there is no b-b
        (["a", ""], 2, 0.0),
        ([], 2, 0.0),
        (["a b c d"], 3, 1.0),
    ],
)
def test_distinct_n_by_hand(texts: list[str], n: int, share: float) -> None:
    assert distinct_n(texts, n) == pytest.approx(share)


def test_summary_by_hand() -> None:
    summary = Evaluation(
        prompts=["x"] * 3,
        responses=["a b", "a b", "c d"],
        scores=[1.0, 2.0, 6.0],
        kls=[0.5, 1.0, 3.0],
        lengths=[2, 2, 5],
        finish_reasons=[1, 1, 2],
    ).summary
    sd = math.sqrt((4 + 1 + 9) / 2)
    assert summary == {
        "score_mean": 3.0,
        "score_sd": pytest.approx(sd),
        "score_se": pytest.approx(sd / math.sqrt(3)),
        "kl_mean": 1.5,
        "length_mean": 3.0,
        "distinct_2": pytest.approx(2 / 3),
    }


def test_evaluate_tells_scores_kls_and_lengths_of_its_own_samples() -> None:
    lm, reference = make_gpt2(), make_gpt2(initializer_range=0.2)
    envs = make_env(reference, temperature=0.7)
    policy = make_policy(lm)
    result = evaluate(policy, envs, HELDOUT, seed=3)
    for row, prompt in enumerate(HELDOUT):
        # Without a tokenizer, texts are the ids.
        response = json.loads(result.responses[row])
        assert json.loads(result.prompts[row]) == prompt
        assert result.lengths[row] == len(response)
        assert result.scores[row] == pytest.approx(even_share(prompt, response))
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            laws = [torch.log_softmax(m(input_ids=ids).logits[0].double() / 0.7, -1) for m in (lm, reference)]
        places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
        kl = sum(float(laws[0][t, ids[0, t + 1]] - laws[1][t, ids[0, t + 1]]) for t in places)
        assert result.kls[row] == pytest.approx(kl, abs=1e-4)
        assert result.finish_reasons[row] == (1 if response[-1] in envs.task.stop_token_ids else 2)


def test_the_same_seed_gives_the_same_responses_and_touches_nothing() -> None:
    policy, envs = make_policy(), make_env()
    before, rng = weights(policy), torch.get_rng_state()
    first = evaluate(policy, envs, HELDOUT, seed=1)
    torch.manual_seed(5)
    assert evaluate(policy, envs, HELDOUT, seed=1) == first
    assert evaluate(policy, envs, HELDOUT, seed=2).responses != first.responses
    torch.set_rng_state(rng)
    assert identical(before, weights(policy))
    assert policy.training


def test_without_a_reference_there_is_no_kl() -> None:
    assert evaluate(make_policy(), make_env(kl_coef=0.0), HELDOUT).kls == [0.0] * 4


def test_the_kl_source_does_not_change_an_evaluation() -> None:
    policy = make_policy()
    envs = make_env(make_llama(initializer_range=0.2))
    by_agent = evaluate(policy, envs, HELDOUT)
    envs.attach(policy.next_logits)
    assert evaluate(policy, envs, HELDOUT) == by_agent


def test_texts_are_decoded(tiny_tokenizer: Any) -> None:
    result = evaluate(make_policy(), make_env(tokenizer=tiny_tokenizer, stop_token_ids=[]), ["w5 w6"])
    assert result.prompts == ["w5 w6"]
    assert all(word.startswith("w") for word in result.responses[0].split())


def test_an_evaluation_is_saved_and_loaded(tmp_path: Path) -> None:
    result = evaluate(make_policy(), make_env(), HELDOUT)
    result.save(tmp_path / "evaluation.json")
    assert Evaluation.load(tmp_path / "evaluation.json") == result


@pytest.mark.parametrize("bf16", [False, True])
def test_the_agent_evaluates_with_scores_and_reference_in_full_precision(bf16: bool) -> None:
    agent = make_agent(small_config(bf16=bf16))
    autocast: list[bool] = []

    def score(prompt: object, response: list[int]) -> float:
        autocast.append(torch.is_autocast_enabled("cpu"))
        return 0.0

    agent.envs = make_env(score=score)
    agent.evaluate(HELDOUT)
    assert autocast == [False] * len(HELDOUT)


def test_eval_every_adds_metrics_and_keeps_the_best_checkpoint(tmp_path: Path) -> None:
    config = small_config(eval_every=2, learning_rate=3e-2, lr_schedule="constant")
    agent = PPO(make_policy(), make_env(), config, eval_prompts=HELDOUT * 4)
    states: dict[int, dict[str, torch.Tensor]] = {}
    history = agent.learn(8, lambda update, _: states.update({update: weights(agent.policy)}), folder=tmp_path)
    evaluated = {number: row for number, row in enumerate(history, 1) if "eval/score_mean" in row}
    assert sorted(evaluated) == [2, 4, 6, 8]
    for row in evaluated.values():
        assert row["eval/objective"] == pytest.approx(row["eval/score_mean"] - 0.1 * row["eval/kl_mean"])
    objectives = {number: row["eval/objective"] for number, row in evaluated.items()}
    assert len(set(objectives.values())) > 1
    best = max(objectives, key=lambda number: (objectives[number], -number))
    assert agent.best_objective == objectives[best]
    assert identical(states[best], weights(ValueHeadLM.from_pretrained(tmp_path / "best")))
    again = PPO.load(tmp_path / "best", make_env(), eval_prompts=HELDOUT * 4)
    assert again.updates == best
    assert again.evaluate().summary["score_mean"] == pytest.approx(evaluated[best]["eval/score_mean"])


def test_a_worse_policy_does_not_replace_the_best(tmp_path: Path) -> None:
    agent = PPO(make_policy(), make_env(), small_config(eval_every=1), eval_prompts=HELDOUT)
    agent.best_objective = 1e9
    agent.learn(1, folder=tmp_path)
    assert agent.best_objective == 1e9
    assert not (tmp_path / "best").exists()
