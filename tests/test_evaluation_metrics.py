"""Metrics of an assessment: by hand, and their errors by leaving prompts out."""

from __future__ import annotations

import math
import random
from functools import partial

import numpy as np
import pytest

from agents.assessment import Assessment
from agents.evaluation import distinct_n
from agents.evaluation_metrics import compare, distinct, gains, metrics, repetition, second_score
from tests.evaluation_fixtures import assessment


def test_every_metric_by_hand() -> None:
    found = {name: estimate.value for name, estimate in metrics(assessment(second=[0, 1, 0, 1]), second_score).items()}
    assert found == pytest.approx(
        {
            "score": 3.0,
            "second": 0.5,
            "kl": 7 / 4,
            "kl_k1": 7 / 4,
            "kl_token": 7 / 14,
            "kl_token_k1": 7 / 14,
            "entropy": 14 / 14,
            "perplexity": math.exp(21 / 14),
            "distinct_1": 6 / 14,  # a b c d e f
            "distinct_2": 6 / 10,  # ab ba bc de ef fd
            "distinct_3": 5 / 6,  # aba bab def efd fde def
            "repetition": 0.0,
            "length": 3.5,
            "stopped": 0.25,
        }
    )


def test_kl_and_its_estimate_are_told_apart() -> None:
    found = metrics(assessment(kls=[0.0, 0.0, 0.0, 1.0]))
    assert (found["kl"].value, found["kl_k1"].value) == (1.75, 0.25)
    assert (found["kl_token"].value, found["kl_token_k1"].value) == pytest.approx((7 / 14, 1 / 14))


@pytest.mark.parametrize(
    ("text", "n", "share"),
    [("a b c d e", 4, 0.0), ("a b c d a b c d", 4, 1 / 5), ("x x x x x x", 4, 2 / 3), ("a b", 4, 0.0), ("", 1, 0.0)],
)
def test_repetition_by_hand(text: str, n: int, share: float) -> None:
    assert repetition(text, n) == pytest.approx(share)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_and_its_error_by_leaving_prompts_out(n: int) -> None:
    draw = random.Random(n)
    texts = [" ".join(draw.choices("abcdefgh", k=draw.randrange(9))) for _ in range(36)]
    prompts = [f"p{i}" for i in range(12)]
    filler = {name: [1] * 36 for name in ("lengths", "finish_reasons", "kls", "exact_kls", "entropies", "ref_nlls")}
    found = distinct(assessment(scores=[0.0] * 36, responses=texts, prompts=prompts, **filler), n)
    without = [distinct_n(texts[: 3 * i] + texts[3 * i + 3 :], n) for i in range(12)]
    assert found.value == pytest.approx(distinct_n(texts, n))
    assert found.without == pytest.approx(without)
    assert found.se > 0


def test_the_jackknife_of_distinct_is_not_too_small_and_the_bootstrap_is_no_help() -> None:
    rng = np.random.default_rng(3)
    words, law = [f"w{i}" for i in range(400)], 1 / np.arange(1, 401)

    def texts() -> list[str]:
        return [" ".join(rng.choice(words, size=12, p=law / law.sum())) for _ in range(40)]

    def one(rows: list[str]) -> tuple[float, float]:
        filler = {name: [1] * 40 for name in ("lengths", "finish_reasons", "kls", "exact_kls", "entropies", "ref_nlls")}
        prompts = [str(i) for i in range(40)]
        found = distinct(assessment(scores=[0.0] * 40, responses=rows, prompts=prompts, **filler), 2)
        return found.value, found.se

    values, errors = zip(*(one(texts()) for _ in range(60)), strict=True)
    assert np.mean(np.square(errors)) > 0.8 * np.var(values, ddof=1)  # ± 18 % is one standard error of that variance
    corpus = texts()
    value, se = one(corpus)
    resampled = [distinct_n([corpus[i] for i in rng.integers(0, 40, 40)], 2) for _ in range(60)]
    assert max(resampled) < value - 2 * se  # no resample comes near what it was drawn from


def test_gains_are_paired_by_prompt() -> None:
    ours = assessment("ours", scores=[1, 3, 11, 13], second=[0, 0, 2, 2])
    theirs = assessment("theirs", scores=[0, 2, 10, 12], second=[1, 1, 2, 2])
    found = gains(ours, theirs, second_score)
    assert (found["score_gain"].value, found["score_gain"].se) == pytest.approx((1.0, 0.0), abs=1e-9)
    assert found["score_wins"].value == pytest.approx(0.75)  # of each prompt's four pairs three
    assert found["second_gain"].value == pytest.approx(-0.5)
    assert found["second_wins"].value == pytest.approx(0.25)  # lost, tied


def test_a_corpus_statistic_as_second_reward_has_no_wins() -> None:
    found = gains(assessment("a"), assessment("b", responses=["a", "b", "c", "d"]), partial(distinct, n=1))
    assert found["second_gain"].value == pytest.approx(6 / 14 - 1)
    assert "second_wins" not in found


def many(name: str, score: float, second: float, count: int = 30) -> Assessment:
    prompts = [f"p{i}" for i in range(count)]
    filler = {name: [1] * count for name in ("lengths", "finish_reasons", "kls", "exact_kls", "entropies", "ref_nlls")}
    scores = [score + (i % 3) * 0.1 for i in range(count)]
    seconds = [second + (i % 5) * 0.1 for i in range(count)]
    return assessment(name, scores, seconds, ["x"] * count, prompts, **filler)


def test_the_flag_of_a_comparison() -> None:
    policies = [many("reference", 0, 0), many("good", 1, 1), many("hacked", 2, -1), many("worse", -1, -1)]
    results = compare(policies, second_score)
    assert [result.over_optimised for result in results] == [None, False, True, False]
    assert [result.over_optimised for result in compare(policies, second_score, 1.5)] == [None, False, False, False]
    assert [result.over_optimised for result in compare(policies)] == [None] * 4
    assert results[0].gains == {} and results[2].name == "hacked"
    written = results[2].as_dict()
    assert written["gains"]["score_gain"]["value"] == pytest.approx(2.0) and written["over_optimised"] is True


def test_one_prompt_raises_no_flag() -> None:
    results = compare([many("a", 0, 0, 1), many("b", 1, -1, 1)], second_score)
    assert results[1].over_optimised is None


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"^assessments: expected at least one and no name twice, got \['a', 'a'\]"):
        compare([assessment("a"), assessment("a")])
    with pytest.raises(ValueError, match=r"^assessments: expected at least one"):
        compare([])
    with pytest.raises(ValueError, match=r"^baseline: expected the 2 prompts of 'a' in their order"):
        gains(assessment("a"), assessment("b", prompts=["The cat", "Once"]))
    with pytest.raises(ValueError, match=r"^assessment: expected second scores of 'a', got none"):
        metrics(assessment("a"), second_score)
