"""A reward that is a weighted sum of words: against hand numbers, scikit-learn, and the optimum's own equation."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from env_fixtures import EOS, tiny_llama, tiny_tokenizer

import textenv
from scripts.reward_modelling.examples import Example, Text
from scripts.reward_modelling.words import WordSettings, fit_words, standardise_words
from textenv.rewards import Pointwise, WordsReward

GOOD, BAD = "a warm and funny film", "a dull and slow film"
TEXTS = [
    "A warm, funny film; warm people!",
    "dull. slow. dull again",
    "the film is long and the people are funny",
    "slow and long and dull film",
    "a warm people film",
    "funny and slow, the people say",
]
RATINGS = [3.0, -2.5, 1.0, -2.0, 2.0, 0.25]


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not textenv.embedded.REWARD.exists():
        pytest.skip("the embedded models are not made yet")
    page = (Path(__file__).parents[1] / "docs" / "reward_models.md").read_text(encoding="utf8")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(compile(block, "reward_models.md", "exec"), {})


def reward(**changes: Any) -> WordsReward:
    options: dict[str, Any] = {
        "terms": ("dull", "funny", "warm", "warm film"),
        "idf": np.array([1.0, 2.0, 1.5, 3.0]),
        "weights": np.array([-1.0, 0.5, 2.0, 4.0]),
        "bias": 0.25,
    }
    return WordsReward(**(options | changes))


def judged(values: list[float]) -> list[Example]:
    return [Example((Text("", text),), value) for text, value in zip(TEXTS, values, strict=True)]


def test_hand_numbers() -> None:
    # "Warm" twice, "funny" once; "warm film" is no run of words here, "unknown" and "I" are no terms.
    warm, funny = (1 + math.log(2)) * 1.5, 2.0
    expected = (warm * 2.0 + funny * 0.5) / math.hypot(warm, funny) + 0.25
    texts = ["Warm, funny, WARM: I unknown film", "unknown", "", "warm-film"]
    both = (1.5 * 2.0 + 3.0 * 4.0) / math.hypot(1.5, 3.0) + 0.25
    found = reward()([""] * 4, texts)
    assert found == pytest.approx([expected, 0.25, 0.25, both], rel=1e-14)
    assert reward(longest=1)([""], ["warm film"]) == pytest.approx([2.25], rel=1e-14)


def test_a_batch_is_its_rows_and_the_prompt_is_not_read() -> None:
    given = reward()
    assert given(["x", "y", "z"], TEXTS[:3]) == [given([""], [text])[0] for text in TEXTS[:3]]


@pytest.mark.parametrize("longest", [1, 2, 3])
def test_it_is_what_scikit_learn_predicts(longest: int) -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline

    theirs = make_pipeline(TfidfVectorizer(ngram_range=(1, longest), min_df=2, sublinear_tf=True), Ridge(alpha=0.7))
    theirs.fit(TEXTS, RATINGS)
    ours = fit_words("ratings", judged(RATINGS), WordSettings(longest=longest, min_texts=2, penalty=0.7))
    unseen = ["warm and slow", "The PEOPLE; the film", "Ünïcode café funny funny funny", "", "funny_film 42"]
    np.testing.assert_allclose(ours([""] * 11, [*TEXTS, *unseen]), theirs.predict([*TEXTS, *unseen]), rtol=1e-12)
    assert len(ours.terms) == len(theirs[0].vocabulary_)


def features(fitted: WordsReward, text: str) -> np.ndarray:
    """φ/‖φ‖ by asking for one unit weight at a time."""
    units = np.eye(len(fitted.terms))
    return np.array([WordsReward(fitted.terms, fitted.idf, unit)([""], [text])[0] for unit in units])


@pytest.mark.parametrize("penalty", [0.3, 2.0])
def test_pairs_are_fitted_where_the_penalised_loss_is_least(penalty: float) -> None:
    examples = [Example((Text("", TEXTS[a]), Text("", TEXTS[b]))) for a, b in ((0, 1), (2, 3), (4, 3), (4, 5), (5, 1))]
    fitted = fit_words("pairs", examples, WordSettings(min_texts=1, penalty=penalty))
    assert fitted.bias == 0.0
    gradient = penalty * fitted.weights
    for example in examples:
        d = features(fitted, example.texts[0].response) - features(fitted, example.texts[1].response)
        gradient -= d / (1 + math.exp(d @ fitted.weights))
    assert np.abs(fitted.weights).max() > 0.1
    np.testing.assert_allclose(gradient, 0, atol=2e-5)  # scikit-learn stops at 1e-6 a text


def test_labels_are_fitted_where_the_penalised_loss_is_least() -> None:
    labels = [1.0, 0.0, 1.0, 0.0, 1.0, 1.0]
    fitted = fit_words("labels", judged(labels), WordSettings(min_texts=1, penalty=0.5))
    raw = np.array(fitted([""] * 6, TEXTS))
    residual = 1 / (1 + np.exp(-raw)) - np.array(labels)
    assert abs(residual.sum()) < 2e-5
    gradient = 0.5 * fitted.weights + residual @ np.array([features(fitted, text) for text in TEXTS])
    np.testing.assert_allclose(gradient, 0, atol=2e-5)


def test_standardised_scores_lead_back_to_raw_ones() -> None:
    fitted = fit_words("ratings", judged(RATINGS), WordSettings(min_texts=1))
    raw = np.array(fitted([""] * 6, TEXTS))
    standard, back = standardise_words(fitted, [Text("", text) for text in TEXTS])
    scores = np.array(standard([""] * 6, TEXTS))
    assert [scores.mean(), scores.std()] == pytest.approx([0.0, 1.0], abs=1e-12)
    np.testing.assert_allclose(back["scale"] * scores + back["offset"], raw, rtol=1e-12)
    assert standard.scale == back["scale"]
    with pytest.raises(ValueError, match="reference: expected texts whose scores differ, got 2 scores of"):
        standardise_words(fitted, [Text("", "unknown")] * 2)


def test_a_folder_needs_no_scikit_learn_and_scores_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = fit_words("ratings", judged(RATINGS), WordSettings())
    fitted.save(tmp_path / "deep" / "folder")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert WordsReward.is_in(tmp_path / "deep" / "folder")
    assert WordsReward.load(tmp_path / "deep" / "folder")([""] * 6, TEXTS) == fitted([""] * 6, TEXTS)


def test_win_probabilities_are_in_the_units_of_what_it_was_fitted_to(tmp_path: Path) -> None:
    pairs = [Example((Text("", TEXTS[a]), Text("", TEXTS[b]))) for a, b in ((0, 1), (2, 3), (4, 3), (4, 5), (5, 1))]
    fitted = fit_words("pairs", pairs, WordSettings(min_texts=1))
    standard, _ = standardise_words(fitted, [Text("", text) for text in TEXTS])
    standard.save(tmp_path)
    first, second = fitted(["", ""], TEXTS[:2])  # log-odds, as they were fitted
    (logit,) = Pointwise(WordsReward.load(tmp_path))([""], TEXTS[:1], TEXTS[1:2])
    assert logit == pytest.approx(first - second, rel=1e-12) and abs(standard.scale - 1) > 0.1


def test_a_folder_without_a_scale_has_that_of_its_scores(tmp_path: Path) -> None:
    reward(scale=2.5).save(tmp_path)
    settings = json.loads((tmp_path / "words.json").read_text())
    assert settings.pop("scale") == 2.5 and WordsReward.load(tmp_path).scale == 2.5
    (tmp_path / "words.json").write_text(json.dumps(settings))
    assert WordsReward.load(tmp_path).scale == 1.0


def test_a_folder_is_a_reward_of_the_environment(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    word = tokenizer.decode([7]).strip()
    WordsReward((word,), np.array([1.0]), np.array([2.5]), bias=0.5).save(tmp_path)
    env: Any = gym.make(
        "RLHF-Text-v0",
        reference=textenv.Shared(tiny_llama()),
        tokenizer=tokenizer,
        reward=str(tmp_path),
        prompts=[[3]],
        kl_coef=0.0,
        max_new_tokens=4,
    )
    record = env.unwrapped.replay([[3], [3]], [[7, EOS], [3, EOS]])
    assert record.scores.tolist() == [3.0, 0.5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": np.zeros(3)}, "weights: expected 4 finite numbers, one a term"),
        ({"weights": np.array([0, 0, 0, np.nan])}, "weights: expected 4 finite numbers"),
        ({"idf": np.array([1.0, 1.0, 0.0, 1.0])}, "idf: expected positive numbers, got 0.0"),
        ({"bias": math.inf}, "bias: expected a finite number, got inf"),
        ({"scale": 0.0}, r"scale: expected a finite number > 0, got 0\.0"),
        ({"longest": 0}, "longest: expected at least 1 word a term, got 0"),
    ],
)
def test_bad_numbers_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reward(**changes)


@pytest.mark.parametrize("content", [None, "{", '{"terms": ["a"], "what": 1}', '{"bias": 0}'])
def test_another_folder_is_refused(tmp_path: Path, content: str | None) -> None:
    reward().save(tmp_path)
    (tmp_path / "words.json").unlink()
    if content is not None:
        (tmp_path / "words.json").write_text(content)
    with pytest.raises(ValueError, match=r"reward: expected a folder with words\.json and words\.safetensors"):
        WordsReward.load(tmp_path)


def test_what_cannot_be_fitted_is_refused() -> None:
    pair = Example((Text("", GOOD), Text("", BAD)), target=0.5)
    with pytest.raises(ValueError, match="margin: expected none with kind='words'"):
        fit_words("pairs", [pair], WordSettings())
    with pytest.raises(ValueError, match="min_texts: expected terms in 9 texts or more, got none"):
        fit_words("ratings", judged(RATINGS), WordSettings(min_texts=9))
    with pytest.raises(ValueError, match=r"labels: expected good and bad ones, got only 1\.0"):
        fit_words("labels", judged([1.0] * 6), WordSettings())
    for changes in ({"longest": 0}, {"min_texts": 0}, {"penalty": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(changes))}: expected"):
            WordSettings(**changes)
