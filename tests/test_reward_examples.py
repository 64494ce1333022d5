"""What a reward model learns from and how it is measured: examples, losses, figures."""

from __future__ import annotations

import doctest
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scripts.reward_modelling import examples as examples_module
from scripts.reward_modelling import figures as figures_module
from scripts.reward_modelling import losses as losses_module
from scripts.reward_modelling.examples import Example, Text, as_label, comparisons, draw_comparisons, judged, split
from scripts.reward_modelling.figures import (
    Decisions,
    accuracy,
    accuracy_figures,
    by_gap,
    calibration,
    choice_figures,
    decide,
    rating_figures,
)
from scripts.reward_modelling.losses import comparison_loss, label_loss, objective_of, rating_loss
from scripts.reward_modelling.rows import Columns, read, read_texts


@pytest.mark.parametrize("module", [examples_module, figures_module, losses_module])
def test_the_examples_in_docstrings_hold(module: Any) -> None:
    assert doctest.testmod(module).failed == 0


def text(name: str) -> Text:
    return Text("", name)


# ------------------------------------------------------------------------------------------------------------ splits


def test_no_group_is_on_both_sides() -> None:
    rows = [{"prompt": f"p{n % 10}", "response": str(n), "who": n % 7} for n in range(70)]
    for key, groups in (("prompt", 3), ("who", 2)):
        grouped = rows if key == "prompt" else [row | {"group": row["who"]} for row in rows]
        training, heldout = split(grouped, 0.3, 0)
        assert sorted(int(row["response"]) for row in training + heldout) == list(range(70))
        assert not {row[key] for row in training} & {row[key] for row in heldout}
        assert len({row[key] for row in heldout}) == groups
    assert split(rows, 0.3, 0) == split(rows, 0.3, 0) != split(rows, 0.3, 1)


def test_rows_without_a_prompt_are_groups_of_their_own() -> None:
    rows = [{"prompt": None if n % 2 else "", "response": str(n)} for n in range(10)]
    training, heldout = split(rows, 0.2, 0)
    assert (len(training), len(heldout)) == (8, 2)


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_neither_side_is_ever_empty(fraction: float) -> None:
    assert all(split([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "b"}], fraction, 0))
    with pytest.raises(ValueError, match=r"split_by: expected rows of at least 2 groups, got 1 \(by prompt\)"):
        split([{"prompt": "a"}, {"prompt": "a"}], fraction, 0)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5])
def test_a_fraction_is_a_share(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction: expected a share between 0 and 1"):
        split([{"prompt": "a"}, {"prompt": "b"}], fraction, 0)


# ---------------------------------------------------------------------------------------------------------- examples


def test_ties_are_dropped_and_counted() -> None:
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 0.5},
        {"prompt": None, "chosen": "a", "rejected": "a", "margin": None},
        {"prompt": None, "chosen": "c", "rejected": "d", "margin": None},
    ]
    found, ties = comparisons(rows)
    assert ties == 1
    assert found == [
        Example((Text("p", "a"), Text("p", "b")), 0.5, 0.5),
        Example((Text("", "c"), Text("", "d")), 0.0, None),
    ]


def test_drawn_comparisons_are_far_enough_apart_and_the_right_way_round() -> None:
    values = np.random.default_rng(0).integers(-4, 5, 60).tolist()
    ratings = [Example((text(str(n)),), float(value)) for n, value in enumerate(values)]
    found = draw_comparisons(ratings, min_gap=1.0, rounds=6, seed=3)
    for example in found:
        better, worse = (values[int(t.response)] for t in example.texts)
        assert better - worse > 1 and example.gap == better - worse and example.target == 0.0
    pairs = [frozenset(example.texts) for example in found]
    assert len(set(pairs)) == len(pairs)
    uses = [sum(text(str(n)) in pair for pair in pairs) for n in range(60)]
    assert max(uses) <= 6
    # Nearly all of 6 · 30 pairs: two of nine values are more than 1 apart with probability 56/81.
    assert len(found) == pytest.approx(180 * 56 / 81, abs=3 * math.sqrt(180 * 56 / 81 * 25 / 81))
    assert draw_comparisons(ratings, min_gap=1.0, rounds=6, seed=3) == found
    assert draw_comparisons(ratings, min_gap=1.0, rounds=6, seed=4) != found


def test_a_gap_of_exactly_the_least_is_none() -> None:
    ratings = [Example((text("a"),), 2.0), Example((text("b"),), 1.0)]
    with pytest.raises(ValueError, match=r"more than 1\.0 apart, got none among 2 from 1 to 2; set it below .*, 0\.5"):
        draw_comparisons(ratings, min_gap=1.0, rounds=3, seed=0)
    assert len(draw_comparisons(ratings, min_gap=0.99, rounds=3, seed=0)) == 1


@pytest.mark.parametrize("value", [2, "maybe", 0.5, "0.5", "nan", None, "", [1]])
def test_a_label_is_good_or_bad(value: Any) -> None:
    assert [as_label(v) for v in (1, 1.0, "1", "1.0", np.int64(1), True, "TRUE", " yes ")] == [1.0] * 8
    assert [as_label(v) for v in (0, 0.0, "0", "0.00", False, "False", "bad")] == [0.0] * 7
    with pytest.raises(ValueError, match="expected 1, 0, true, good, yes, false, bad, no for 'label', got"):
        as_label(value)


# -------------------------------------------------------------------------------------------------------------- rows


def test_columns_are_found_by_their_names_and_bad_rows_told() -> None:
    told: list[str] = []
    rows = [
        {"question": "q", "best": "a", "worst": "b", "by": "0.5", "who": "me"},
        {"question": None, "best": "a", "worst": "b", "by": None, "who": "you"},
        {"question": "q", "best": ["a"], "worst": "b", "by": None, "who": "you"},
        {"question": "q", "best": "a", "worst": None, "by": None, "who": "you"},
    ]
    columns = Columns(prompt="question", chosen="best", rejected="worst", margin="by")
    reading = read(rows, "pairs", columns, None, split_by="who")
    assert reading.told(told.append) == [
        {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 0.5, "group": "me"},
        {"prompt": None, "chosen": "a", "rejected": "b", "margin": None, "group": "you"},
    ]
    assert reading.problems == (
        "row 2: expected text or one message, the answer to the prompt, for 'best', got ['a']",
        "row 3: expected a value for 'worst', got none",
    )
    assert len(told) == 1 and told[0].endswith(f"skipped 2 of 4 rows; the first: {'; '.join(reading.problems)}")
    with pytest.raises(ValueError, match="expected good rows, got 1 of 3 bad; the first: row 2: expected text or"):
        read(rows[:3], "pairs", columns, None, strict=True)
    with pytest.raises(ValueError, match="expected rows, got none of 1; the first: row 0: expected text or one"):
        read(rows[2:3], "pairs", columns, None)


def test_a_column_that_was_renamed_is_in_some_row(tmp_path: Path) -> None:
    rows = [{"question": "q", "chosen": "a", "rejected": "b"}, {"chosen": "a", "rejected": "b", "by": 1}]
    for columns, name in ((Columns(prompt="quesion"), "quesion"), (Columns(margin="gain"), "gain")):
        message = rf"columns: expected \['{name}'\] in .*, got \['question', 'chosen', 'rejected', 'by'\]"
        with pytest.raises(ValueError, match=message):
            read(rows, "pairs", columns, None)
    (tmp_path / "a.csv").write_text("question,response\n,a\n")
    with pytest.raises(ValueError, match=r"columns: expected \['quesion'\] in .*a.csv, got \['question', 'response'\]"):
        read_texts(tmp_path / "a.csv", Columns(prompt="quesion"), None)
    # One row with it is enough, empty or not, and what the task does not ask for may be called anything.
    found = read(rows, "pairs", Columns(prompt="question", margin="by", rating="nowhere"), None).rows
    assert [(row["prompt"], row["margin"]) for row in found] == [("q", None), (None, 1.0)]
    assert read_texts(tmp_path / "a.csv", Columns(prompt="question"), None).rows == [Text("", "a")]
    assert read(rows, "pairs", Columns(), None).rows[0]["prompt"] is None


@pytest.mark.parametrize(("column", "values"), [("label", ["cats", "dogs"]), ("rating", ["4 stars", "5 stars"])])
def test_what_rows_are_split_by_is_no_number_and_no_label(column: str, values: list[str]) -> None:
    rows = [{"chosen": str(n), "rejected": "b", column: values[n % 2]} for n in range(8)]
    found = read(rows, "pairs", Columns(), None, split_by=column, strict=True).rows
    training, heldout = split(found, 0.5, 0)
    assert sorted(len({row["group"] for row in side}) for side in (training, heldout)) == [1, 1]
    assert len(training) == len(heldout) == 4
    numbers = [{"response": "a", "rating": "1.50"}]
    assert read(numbers, "ratings", Columns(), None, split_by="rating").rows == [
        {"prompt": None, "response": "a", "rating": 1.5, "group": "1.50"}
    ]


def test_split_by_the_prompt_is_the_default() -> None:
    rows = [{"question": None if n < 4 else "q", "chosen": str(n), "rejected": "b"} for n in range(8)]
    for columns in (Columns(prompt="question"), Columns()):
        found = read(rows, "pairs", columns, None, split_by=columns.prompt, strict=True).rows
        assert found == read(rows, "pairs", columns, None).rows
        assert all(split(found, 0.2, 0))


def test_a_bad_row_of_any_kind_is_told_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"response": "a", "label": "1.0"}\n\n{"response": ["b"], "label": 0}\n{"response": "c", "label": 2}'
    )
    for reading in (read(path, "labels", Columns(), None), read_texts(path, Columns(), None)):
        assert reading.problems[0] == (
            f"{path}:3: expected text or one message, the answer to the prompt, for 'response', got ['b']"
        )
    assert read_texts(path, Columns(), None).rows == [Text("", "a"), Text("", "c")]
    labels = read(path, "labels", Columns(), None)
    assert labels.rows == [{"response": "a", "label": 1.0, "prompt": None}]
    assert labels.problems[1].startswith(f"{path}:4: expected 1, 0, true, good, yes, false, bad, no for 'label', got 2")


def test_ratings_and_labels_are_numbers() -> None:
    rows = [{"response": "a", "rating": "2.5", "label": "good"}, {"response": "b", "rating": 1, "label": False}]
    found = read(rows, "ratings", Columns(), None).rows
    assert [row["rating"] for row in found] == [2.5, 1.0] and found[0].keys() == {"prompt", "response", "rating"}
    assert [row["label"] for row in read(rows, "labels", Columns(), None).rows] == [1.0, 0.0]
    assert judged(found, "rating")[0] == Example((Text("", "a"),), 2.5)


def test_messages_read_as_a_reward_function_reads_them(tiny_tokenizer: Any) -> None:
    import copy

    from textenv.rewards.base import TextDecoder

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<s> w3 {{ m.content }} {% endfor %}{% if add_generation_prompt %}<s> w4{% endif %}"
    )
    messages = [{"role": "user", "content": "w7 w8"}]
    rows = [{"prompt": messages, "chosen": [{"role": "assistant", "content": "w9"}], "rejected": "w10"}]
    (found,) = read(rows, "pairs", Columns(), tokenizer, strict=True).rows
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    seen = TextDecoder(tokenizer, frozenset())([ids], [[9]])[0]
    assert found["prompt"] == seen[0] == "w3 w7 w8 w4"
    assert found["chosen"] == "w9"
    said = [{"prompt": "w7 w8", "chosen": "w9", "rejected": "w10"}, {"prompt": "", "chosen": "w9", "rejected": "w10"}]
    found, bare = read(said, "pairs", Columns(), tokenizer, chat_template=True).rows
    assert (found["prompt"], bare["prompt"]) == (seen[0], "")
    assert [row["prompt"] for row in read(said, "pairs", Columns(), tokenizer).rows] == ["w7 w8", ""]
    with pytest.raises(ValueError, match="row 0: expected a tokenizer with a chat template for messages"):
        read(rows, "pairs", Columns(), tiny_tokenizer, strict=True)
    rows[0]["chosen"] = messages * 2
    with pytest.raises(ValueError, match="expected text or one message, the answer to the prompt, for 'chosen', got"):
        read(rows, "pairs", Columns(), tokenizer, strict=True)


def test_reference_texts_need_no_prompt() -> None:
    rows = [{"q": "p", "a": "r"}, {"a": "s"}]
    columns = Columns(prompt="q", response="a")
    assert read_texts(rows, columns, None, strict=True).rows == [Text("p", "r"), Text("", "s")]


# ------------------------------------------------------------------------------------------------------------ losses


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_losses_against_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(12, generator=generator, dtype=torch.float64) * 3
    margins = torch.rand(6, generator=generator, dtype=torch.float64)
    found = comparison_loss(raw, margins).tolist()
    for p in range(6):
        difference = float(raw[2 * p]) - float(raw[2 * p + 1]) - float(margins[p])
        assert found[p] == pytest.approx(-math.log(sigmoid(difference)), rel=1e-12)
    ratings = torch.randn(12, generator=generator, dtype=torch.float64)
    expected = [((a - b) / 1.7) ** 2 for a, b in zip(raw.tolist(), ratings.tolist(), strict=True)]
    assert rating_loss(raw, ratings, unit=1.7).tolist() == pytest.approx(expected, rel=1e-12)
    labels = torch.tensor([1.0, 0.0] * 6, dtype=torch.float64)
    expected = [-math.log(sigmoid(a if n % 2 == 0 else -a)) for n, a in enumerate(raw.tolist())]
    assert label_loss(raw, labels).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("loss", "texts"), [(comparison_loss, 2), (rating_loss, 1), (label_loss, 1)])
def test_losses_refuse_other_shapes(loss: Callable[..., Any], texts: int) -> None:
    for raw in (torch.zeros(3 * texts + 1), torch.zeros(3, texts + 1)):
        with pytest.raises(ValueError, match=rf"raw: expected \[{texts} P\] outputs for targets \[P\], got"):
            loss(raw, torch.zeros(3))


def test_an_objective_starts_at_the_level_of_the_data() -> None:
    def given(values: list[float]) -> list[Example]:
        return [Example((text(str(n)),), value) for n, value in enumerate(values)]

    ratings = objective_of("ratings", given([1.0, 2.0, 6.0]))
    assert (ratings.centre, ratings.unit) == (3.0, pytest.approx(math.sqrt(14 / 3)))
    # A network that says 0 has a mean loss of 1: the variance of the ratings in their own units.
    assert float(ratings.loss(torch.full((3,), ratings.centre), torch.tensor([1.0, 2.0, 6.0])).mean()) == pytest.approx(
        1
    )
    labels = objective_of("labels", given([1.0, 1.0, 1.0, 0.0]))
    assert (sigmoid(labels.centre), labels.unit) == (pytest.approx(0.75), 1.0)
    pairs = objective_of("pairs", [Example((text("a"), text("b")))])
    assert (pairs.centre, pairs.unit) == (0.0, 1.0)
    for task in ("ratings", "labels"):
        with pytest.raises(ValueError, match=rf"{task}: expected values that differ, got 1\.0 in all 2 examples"):
            objective_of(task, given([1.0, 1.0]))


# ----------------------------------------------------------------------------------------------------------- figures


def test_the_standard_error_of_choices_that_share_texts() -> None:
    """Against the double sum over pairs of choices."""
    rng = np.random.default_rng(2)
    pairs = np.array([p for p in itertools.combinations(range(7), 2) if rng.random() < 0.7])
    pairs = np.concatenate([pairs, pairs[:5, ::-1]])  # some were compared twice
    correct = (rng.random(len(pairs)) < 0.6).astype(float)
    errors = correct - correct.mean()
    total = sum(
        errors[p] * errors[q] for p in range(len(pairs)) for q in range(len(pairs)) if set(pairs[p]) & set(pairs[q])
    )
    assert total > 0
    found = accuracy(correct, pairs)
    assert found.standard_error == pytest.approx(math.sqrt(total) / len(pairs), rel=1e-12)
    alone = accuracy(correct, np.arange(2 * len(pairs)).reshape(-1, 2))
    p = correct.mean()
    assert alone.standard_error == pytest.approx(math.sqrt(p * (1 - p) / len(pairs)), rel=1e-12)
    assert accuracy(correct, np.arange(len(pairs))[:, None]) == pytest.approx(alone, rel=1e-12)


def test_an_accuracy_is_never_certain() -> None:
    """Wilson's interval by hand: at its end n/(n + 3.8415), n being the independent choices that these are worth."""
    right = accuracy_figures(decisions([1.0] * 10))
    assert (right["value"], right["standard_error"], right["high"]) == (1.0, 0.0, 1.0)
    assert right["low"] == pytest.approx(10 / 13.8415, abs=1e-4)
    pairs = np.array(list(itertools.combinations(range(5), 2)))  # ten choices, but two and a half pairs of texts
    shared = accuracy_figures(Decisions(np.ones(10), pairs, np.ones(10)))
    assert shared["low"] == pytest.approx(2.5 / 6.3415, abs=1e-4)
    mixed = accuracy_figures(decisions([1.0] * 8 + [-1.0] * 2))
    assert (mixed["low"], mixed["high"]) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    double = np.repeat(np.arange(20).reshape(10, 2), 2, axis=0)  # each choice twice: still worth ten
    twice = accuracy_figures(Decisions(np.repeat([1.0] * 8 + [-1.0] * 2, 2), double, np.ones(20)))
    assert (twice["low"], twice["high"]) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def decisions(logits: list[float], gaps: list[float] | None = None) -> Decisions:
    values = np.array(logits)
    members = np.arange(2 * len(values)).reshape(-1, 2)
    return Decisions(values, members, np.abs(values) if gaps is None else np.array(gaps))


def test_calibration_by_hand() -> None:
    # p of the choice: .5250, .5250, .8808, .8808, .8808, .9999; right: 1 0 1 1 0 1.
    bins, error = calibration(decisions([0.1, -0.1, 2.0, 2.0, -2.0, 9.0]))
    assert [(round(b.low, 2), round(b.high, 2), b.count, round(b.observed, 4)) for b in bins] == [
        (0.5, 0.55, 2, 0.5),
        (0.85, 0.9, 3, 0.6667),
        (0.95, 1.0, 1, 1.0),
    ]
    assert [b.predicted for b in bins] == pytest.approx([sigmoid(0.1), sigmoid(2), sigmoid(9)])
    hand = (2 * (sigmoid(0.1) - 0.5) + 3 * (sigmoid(2) - 2 / 3) + (1 - sigmoid(9))) / 6
    assert error == pytest.approx(hand)
    assert bins[1].standard_error == pytest.approx(math.sqrt(2 / 9 / 3))


def test_a_calibrated_model_has_a_small_error_and_an_overconfident_one_has_not() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=20_000) * 2
    truth = np.where(rng.random(20_000) < 1 / (1 + np.exp(-np.abs(logits))), 1, -1)
    honest, boastful = np.abs(logits) * truth, 3 * np.abs(logits) * truth
    assert calibration(decisions(honest.tolist()))[1] < 0.01  # 10 bins of 2,000: about .003
    assert calibration(decisions(boastful.tolist()))[1] > 0.08


def test_undecided_choices_count_a_half() -> None:
    assert decisions([0.0, 1.0, -1.0, 0.0]).correct.tolist() == [0.5, 1.0, 0.0, 0.5]


def test_accuracy_by_gap_by_hand() -> None:
    given = decisions([1, -1, 1, 1, 1, 1, -1, 1, 1, 1], gaps=[9, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    bins = by_gap(given)
    assert [(b.count, b.predicted, b.observed) for b in bins] == [
        (2, 0.5, 1.0), (2, 2.5, 0.5), (2, 4.5, 1.0), (2, 6.5, 1.0), (2, 8.5, 0.5)
    ]  # fmt: skip
    (one,) = by_gap(decisions([1.0, -1.0], gaps=[3.0, 3.0]))
    assert (one.low, one.high, one.count) == (3.0, 3.0, 2)


def test_decisions_of_comparisons_and_labels() -> None:
    raw = {text("a"): 2.0, text("b"): 0.5, text("c"): -1.0}
    pairs = [Example((text("b"), text("a")), gap=3.0), Example((text("a"), text("c")), gap=None)]
    found = decide("pairs", pairs, raw)
    assert found.logits.tolist() == [-1.5, 3.0] and found.gaps.tolist() == [
        1.5,
        3.0,
    ]  # a gap is unknown: predicted ones
    assert found.members.tolist() == [[1, 0], [0, 2]]
    assert decide("ranked", [pairs[0]], raw).gaps.tolist() == [3.0]
    labels = [Example((text("a"),), 0.0), Example((text("c"),), 0.0), Example((text("b"),), 1.0)]
    assert decide("labels", labels, raw).logits.tolist() == [-2.0, 1.0, 0.5]
    figures = choice_figures("labels", labels, raw)
    assert figures["accuracy"]["value"] == pytest.approx(2 / 3)
    hand = [math.log(1 + math.exp(2)), math.log(1 + math.exp(-1)), math.log(1 + math.exp(-0.5))]
    assert figures["loss"] == pytest.approx(sum(hand) / 3)
    assert figures["by_gap"]["of"] == "predicted"


def test_figures_of_ratings() -> None:
    ratings = [Example((text(str(n)),), float(n)) for n in range(20)]
    raw = {text(str(n)): n + (1.0 if n % 2 else -1.0) for n in range(20)}
    pairs = draw_comparisons(ratings, min_gap=0.5, rounds=10, seed=0)
    figures = rating_figures(ratings, pairs, raw)
    assert figures["rmse"] == pytest.approx(1.0)
    assert figures["correlation"] == pytest.approx(np.corrcoef(list(raw.values()), range(20))[0, 1])
    right = np.mean([raw[e.texts[0]] > raw[e.texts[1]] for e in pairs])
    assert figures["accuracy"]["value"] == pytest.approx(right) and figures["by_gap"]["of"] == "rated"
    assert [b["count"] for b in figures["calibration"]["bins"]] == [2] * 10
    assert figures["calibration"]["bins"][0]["observed"] == pytest.approx(1.0)  # texts 0 and 2, predicted −1 and 1
