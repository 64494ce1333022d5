"""Rewards by rule, by answer, by lexicon and by hand: values worked out on paper, and what they refuse."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from textenv.rewards import (
    ExactAnswer,
    HumanReward,
    LengthTarget,
    LexiconReward,
    MissingEOS,
    NumericAnswer,
    RegexMatch,
    RewardContext,
    SoftOverlong,
    last_number,
    read_lexicon,
)
from textenv.rewards.human import printable

# Rules.


def test_a_pattern_is_found_or_is_all_of_it() -> None:
    responses = [" Yes.", "yes", "", " Yes. No."]
    assert RegexMatch(r"Yes\.$")([""] * 4, responses) == [1, 0, 0, 0]
    assert RegexMatch("yes", flags=2)([""] * 4, responses) == [1, 1, 0, 1]  # re.IGNORECASE
    assert RegexMatch(r"\s*Yes\.", full=True)([""] * 4, responses) == [1, 0, 0, 0]


def test_lengths_in_each_unit() -> None:
    assert LengthTarget(4)([[1]] * 3, [[5, 6], [5, 6, 7, 2], [5] * 6]) == [-0.5, 0, -0.5]
    assert LengthTarget(2, "words")([""] * 3, ["", " one  two\n", "a b c"]) == [-1, 0, -0.5]
    assert LengthTarget(5, "characters")([""] * 2, ["abcde", "abcdefgh"]) == [0, -0.6]
    assert LengthTarget(4).wants_ids and not LengthTarget(4, "words").wants_ids


def test_the_penalty_of_overlong_responses_grows_over_the_buffer() -> None:
    # L = 10, b = 4: free up to 6, then a quarter a token, −1 at 10 and beyond.
    reward = SoftOverlong(4, 10)
    lengths = [1, 6, 7, 8, 9, 10, 11, 30]
    assert reward([[1]] * 8, [[5] * n for n in lengths]) == [0, 0, -0.25, -0.5, -0.75, -1, -1, -1]
    assert SoftOverlong(4).bind(RewardContext(max_new_tokens=10)) == reward
    assert reward.bind(RewardContext(max_new_tokens=99)) is reward


def test_a_missing_end() -> None:
    bound = MissingEOS(2.5).bind(RewardContext(stop_token_ids=frozenset({2, 9})))
    assert bound([[1]] * 4, [[5, 2], [9], [2, 5], [5]]) == [0, 0, -2.5, -2.5]
    own = MissingEOS(1.0, frozenset({5}))
    assert own.bind(RewardContext(stop_token_ids=frozenset({2}))) is own
    assert own([[1]], [[5]]) == [0]


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: RegexMatch("("), r"pattern: expected a regular expression, got '\('"),
    (lambda: LengthTarget(0), "target: expected an integer >= 1, got 0"),
    (lambda: LengthTarget(2, "lines"), "unit: expected one of 'tokens', 'words', 'characters', got 'lines'"),  # type: ignore[arg-type]
    (lambda: SoftOverlong(0), "buffer_tokens: expected an integer >= 1, got 0"),
    (lambda: SoftOverlong(4, 4), "max_tokens: expected more than buffer_tokens=4, got 4"),
    (lambda: SoftOverlong(4).bind(RewardContext(max_new_tokens=3)), "max_tokens: expected more than"),
    (lambda: SoftOverlong(4)([[1]], [[1]]), "max_tokens: expected a limit, because there is no environment"),
    (lambda: MissingEOS(-1), "penalty: expected a finite number >= 0, got -1"),
    (lambda: MissingEOS()([[1]], [[1]]), "stop_token_ids: expected some, because there is no environment"),
    (lambda: NumericAnswer({}), "answers: expected texts by prompt, got {}"),
    (lambda: NumericAnswer({"2 + 2": "four"}), "answers: expected a number for '2 \\+ 2', got 'four'"),
    (lambda: NumericAnswer({"a": "1", " a": "2"}), "answers: expected prompts that differ in more than white space"),
    (lambda: NumericAnswer({"a": "1"}, tolerance=-1), "tolerance: expected a finite number >= 0, got -1"),
    (lambda: NumericAnswer({"a": "1"})(["b"], ["1"]), "expected a prompt that there is an answer to, got 'b'"),
    (lambda: ExactAnswer({"a": "1"})(["b"], ["1"]), "expected a prompt that there is an answer to, got 'b'"),
    (lambda: LexiconReward({}), "values: expected numbers by word, got {}"),
    (lambda: LexiconReward({"a": float("nan")}), "values: expected finite numbers, got nan for 'a'"),
    (lambda: HumanReward(low=1, high=0), "high: expected a finite number >= 1, got 0"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_settings_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# Answers.

NUMBERS: list[tuple[str, str | None]] = [
    ("no number", None),
    ("", None),
    ("7", "7"),
    ("It is 7.", "7"),
    ("3 and then 4", "4"),
    ("-3", "-3"),
    ("= −3", "-3"),  # a real minus sign
    ("+3", "3"),
    ("5-3", "3"),
    ("5 - 3", "3"),
    ("(5)-3", "3"),
    ("x-3", "3"),
    ("1,234", "1234"),
    ("-1,234,567.25", "-4938269/4"),
    ("1,2345", "2345"),  # no thousands separator
    ("12,34", "34"),
    (".5", "1/2"),
    ("0.50", "1/2"),
    ("3/4", "3/4"),
    ("-6/8.", "-3/4"),
    ("1/0", None),
    ("2 or 1/0", "2"),
    ("$1,500", "1500"),
    ("-$5", "-5"),
    ("007", "7"),
    ("#### 42", "42"),
    ("42 ٣", "42"),  # other digits are not read
    ("9" * 100, "9" * 100),
    ("1 " + "9" * 5000, "1"),  # Python would refuse to convert it
]


@pytest.mark.parametrize(("text", "number"), NUMBERS, ids=[repr(text[:20]) for text, _ in NUMBERS])
def test_the_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Fraction(number))


def test_numeric_answers() -> None:
    reward = NumericAnswer({"half of one is": "so #### 1/2", "2 + 2 =": "4"}, right=2, wrong=-1, none=-3)
    prompts = [" half of one is", "half of one is", "2 + 2 =", "2 + 2 =", "2 + 2 ="]
    assert reward(prompts, [" 0.5", " 0.49", " 2 + 2 is 4.0", " 4 or 5", " four"]) == [2, -1, 2, -1, -3]
    near = NumericAnswer({"pi": "3.14"}, tolerance=0.25)
    assert near(["pi"] * 3, ["3.39", "2.89", "3.40"]) == [1, 1, 0]


def test_exact_answers() -> None:
    assert ExactAnswer({"France:": " Paris"})(["France: "] * 3, ["paris\n", "Paris.", ""]) == [1, 0, 0]
    assert ExactAnswer({"France:": "Paris"}, case=True)(["France:"] * 2, [" paris", " Paris"]) == [0, 1]


# Lexicons.


def test_valence_sums_words_or_different_words() -> None:
    values = {"good": 1.5, "don't": -0.5, "bad": -2.0}
    texts = ["Good, GOOD! don't", "", "goodness bad", "bad-good"]
    assert LexiconReward(values)([""] * 4, texts) == [2.5, 0, -2, -0.5]
    assert LexiconReward(values, distinct=True)([""] * 4, texts) == [1, 0, -2, -0.5]


def test_lexicon_files(tmp_path: Path) -> None:
    tabs, commas = tmp_path / "a.txt", tmp_path / "a.csv"
    tabs.write_text('joy\t2.8\t0.7\t[1, 2]\n:"(\t-1.9\t1\t[]\nof course\t1\nCAPS\t1\nsad\t-2\n', "utf8")
    commas.write_text('word,value\njoy,2.8\n"sad",-2\n\n', "utf8")
    assert read_lexicon(tabs) == read_lexicon(str(commas)) == {"joy": 2.8, "sad": -2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("joy\t1\nsad\n", r"lexicon: expected a word and its value in line 2 of a.txt, got \['sad'\]"),
        ("joy\t1\nsad\tnan\n", "lexicon: expected a word and its value in line 2"),
        (":)\t1\n", "lexicon: expected words and values in a.txt, got none"),
    ],
)
def test_bad_lexicons(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.txt").write_text(text, "utf8")
    with pytest.raises(ValueError, match=message):
        read_lexicon(tmp_path / "a.txt")


# A human.


class Person:
    """Types what was prepared, and keeps what was shown."""

    def __init__(self, *typed: str) -> None:
        self.typed, self.shown = list(typed), []

    def __call__(self, prompt: str, response: str) -> str:
        self.shown.append((prompt, response))
        return self.typed.pop(0)


def test_the_same_pair_is_asked_about_once() -> None:
    person = Person("0.5", "-1", "1")
    reward = HumanReward(person)
    assert reward(["a", "a", "b"], ["x", "x", "x"]) == [0.5, 0.5, -1]
    assert reward(["b", "a"], ["x", "y"]) == [-1, 1]
    assert person.shown == [("a", "x"), ("b", "x"), ("a", "y")]


def test_what_is_no_score_is_asked_again() -> None:
    person = Person("", "good", "nan", "inf", "1.01", "-2", "1")
    assert HumanReward(person)(["a"], ["x"]) == [1]
    assert len(person.shown) == 7


def test_answers_are_kept_in_the_state() -> None:
    reward, again = HumanReward(Person("0.25")), HumanReward(Person())
    assert reward.state_dict() == {}
    reward(["a"], ["x\u202e"])
    assert reward.state_dict() == {"answers": [["a", "x\u202e", 0.25]]}
    again.load_state_dict(reward.state_dict())
    assert again(["a"], ["x\u202e"]) == [0.25]


def test_what_a_terminal_would_obey_is_escaped() -> None:
    person = Person("0")
    HumanReward(person)(["a\x1b[2J"], ["b\r\x07\x9b31m\u202e\u200b\n\té"])
    assert person.shown == [("a\\x1b[2J", "b\\r\\x07\\x9b31m\\u202e\\u200b\n\té")]
    assert printable("plain [bold]text[/]") == "plain [bold]text[/]"


@pytest.mark.parametrize("rich", [True, False])
def test_the_terminal_shows_both_and_no_markup(
    rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not rich:
        for name in ("rich", "rich.console", "rich.text"):
            monkeypatch.setitem(sys.modules, name, None)
    asked: list[str] = []
    monkeypatch.setattr(builtins, "input", lambda prompt="": asked.append(prompt) or "0.75")
    assert HumanReward(low=0, high=2)(["Once"], [" [red]upon[/red]"]) == [0.75]
    out = capsys.readouterr().out + "".join(asked)
    assert "Once" in out and "[red]upon[/red]" in out and "Score from 0 to 2: " in out


# Real words.


def test_the_lexicon_reward_is_the_sum_that_the_benchmarks_were_measured_with(material: Path) -> None:
    """The score of `scripts/valence.py` in the words of its first version: the response's ids decoded alone."""
    import re

    from scripts.valence import make_env
    from textenv.models import load_tokenizer

    envs = make_env(material=material)
    task = envs.unwrapped.task
    tokenizer = load_tokenizer(material / "models" / "stories260K", argument="material")
    rows = (line.split("\t") for line in (material / "data" / "vader_lexicon.txt").read_text("utf8").splitlines())
    values = {row[0]: float(row[1]) for row in rows}
    stories = (material / "data" / "tinystories_sample.txt").read_text("utf8")[:60_000].split("\n")
    responses = [ids[1:49] for story in stories if len(ids := tokenizer(story)["input_ids"]) >= 49][:64]
    assert len(responses) == 64
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    expected = [sum(values.get(word, 0.0) for word in re.findall(r"[a-z']+", text.lower())) for text in texts]
    scores = task.reward.scores(task.prompts[:64], responses)
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 3) for score in expected}) > 30
