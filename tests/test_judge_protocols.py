"""What judges are asked and how their answers are read, by hand-written requests and replies."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from textenv.rewards.judge import (
    Chat,
    Classify,
    ExpectedDigit,
    JSONField,
    Match,
    Plain,
    Pooling,
    Score,
    UnusableReply,
)
from textenv.rewards.judge.client import read_scores

TWO = (["Hi", "Bye"], [" you", " now"])


def said(text: Any, logprobs: Any = None) -> dict[str, Any]:
    """A chat completion with one choice."""
    message = {"role": "assistant", "content": text}
    return {"choices": [{"index": 0, "message": message, "logprobs": logprobs, "finish_reason": "stop"}]}


def place(token: str, **law: float) -> dict[str, Any]:
    """The log-probs of one token, from probabilities; `_7` stands for a 7 after a space."""
    top = [{"token": name.replace("_", " ").replace("d", ""), "logprob": math.log(p)} for name, p in law.items()]
    own = next((entry["logprob"] for entry in top if entry["token"] == token), -9999.0)
    return {"token": token, "logprob": own, "top_logprobs": top}


# Requests and replies as vLLM 0.32 defines and sends them.


def test_plain() -> None:
    assert Plain().request(*TWO) == {"prompts": ["Hi", "Bye"], "responses": [" you", " now"]}
    assert Plain().scores({"scores": [1, 2.5]}, 2) == [1, 2.5]


def test_classify() -> None:
    protocol = Classify("rm")
    assert protocol.request(*TWO) == {"model": "rm", "input": ["Hi you", "Bye now"], "use_activation": False}
    entry = {"label": "LABEL_0", "num_classes": 2}
    reply = {
        "object": "list",
        "data": [{"index": 1, "probs": [0.5, 3.0], **entry}, {"index": 0, "probs": [-2.0, 4.0], **entry}],
    }
    assert protocol.scores(reply, 2) == [-2.0, 0.5]
    assert Classify("rm", label=1).scores(reply, 2) == [4.0, 3.0]
    asked = Classify("rm", template="Q: {prompt}\nA:{response}", use_activation=True).request(["x"], [" y"])
    assert asked == {"model": "rm", "input": ["Q: x\nA: y"], "use_activation": True}


def test_score() -> None:
    asked = Score("ce").request(*TWO)
    assert asked == {"model": "ce", "text_1": ["Hi", "Bye"], "text_2": [" you", " now"], "use_activation": False}
    data = [{"index": 0, "object": "score", "score": 0.25}, {"index": 1, "object": "score", "score": -1.0}]
    assert Score("ce").scores({"data": data}, 2) == [0.25, -1.0]


def test_pooling() -> None:
    assert Pooling("rm").request(*TWO) == {"model": "rm", "input": ["Hi you", "Bye now"], "use_activation": False}
    texts = {"data": [{"index": 0, "object": "pooling", "data": [1.5]}, {"index": 1, "data": [2.5]}]}
    tokens = {"data": [{"index": 0, "data": [[9.0], [1.5]]}, {"index": 1, "data": [[2.5]]}]}
    assert Pooling("rm").scores(texts, 2) == Pooling("rm").scores(tokens, 2) == [1.5, 2.5]


MALFORMED: list[tuple[Any, Any, str]] = [
    (Score("m"), {"data": [{"index": 0, "score": 1}]}, "expected 2 scores, got 1"),
    (Score("m"), {"data": [{"index": 0, "score": 1}] * 2}, r"expected indices 0 to 1, got \[0, 0\]"),
    (Score("m"), {"data": [{"index": i, "score": 1} for i in (1, 2)]}, r"expected indices 0 to 1, got \[1, 2\]"),
    (Score("m"), {"data": [{"score": 1}, {"score": 2}]}, "malformed.*KeyError: 'index'"),
    (Score("m"), {"error": {"message": "busy"}}, "malformed.*busy"),
    (Score("m"), None, "malformed, 'null'"),
    (Classify("m", label=1), {"data": [{"index": i, "probs": [1.0]} for i in (0, 1)]}, "malformed.*IndexError"),
    (Pooling("m"), {"data": [{"index": i, "data": [1.0, 2.0]} for i in (0, 1)]}, "one value a text or token, got 2"),
    (Pooling("m"), {"data": [{"index": i, "data": [[1.0, 2.0]]} for i in (0, 1)]}, "one value a text or token, got 2"),
    (Pooling("m"), {"data": [{"index": i, "data": []} for i in (0, 1)]}, "malformed.*IndexError"),
    (Plain(), {"scores": "ab"}, "expected a finite score, got 'a'"),
    (Plain(), {"scores": {"a": 1, "b": 2}}, "expected a finite score, got 'a'"),
    (Plain(), {"scores": 5}, "malformed.*TypeError"),
]


@pytest.mark.parametrize(("protocol", "reply", "message"), MALFORMED)
def test_malformed_replies(protocol: Any, reply: Any, message: str) -> None:
    with pytest.raises(UnusableReply, match=message):
        read_scores(protocol, json.dumps(reply), 2)


def test_a_bad_row_is_named() -> None:
    with pytest.raises(UnusableReply) as caught:
        read_scores(Plain(), '{"scores": [1, 2, NaN]}', 3)
    assert caught.value.row == 2


@pytest.mark.parametrize(
    "kind", [lambda t: Classify("m", template=t), lambda t: Pooling("m", template=t), lambda t: Chat("m", t)]
)
def test_a_template_without_a_response_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"template: expected a text with \{response\}.*, got '\{prompt\}'"):
        kind("{prompt}")


def test_a_label_is_a_place() -> None:
    with pytest.raises(ValueError, match="label: expected an integer >= 0, got -1"):
        Classify("m", label=-1)


# Chat.


def test_a_chat_request() -> None:
    protocol = Chat("gpt", 'Rate "{response}" for {prompt} as {"score": n}.', JSONField(), system="Be strict.")
    assert protocol.request(["{response}"], ["{prompt}?"]) == {
        "model": "gpt",
        "messages": [
            {"role": "system", "content": "Be strict."},
            # Filled in once: texts that look like places are texts. Other braces stay.
            {"role": "user", "content": 'Rate "{prompt}?" for {response} as {"score": n}.'},
        ],
        "temperature": 0.0,
        "max_tokens": 256,
    }
    assert not protocol.batched


def test_options_of_a_chat() -> None:
    options = {"response_format": {"type": "json_object"}, "top_logprobs": 5}
    asked = Chat("m", "{response}", ExpectedDigit(), temperature=None, max_tokens=None, options=options)
    assert asked.request(["p"], ["r"]) == {
        "model": "m",
        "messages": [{"role": "user", "content": "r"}],
        "logprobs": True,
        "top_logprobs": 5,
        "response_format": {"type": "json_object"},
    }
    with pytest.raises(ValueError, match="options: expected what JSON can hold"):
        Chat("m", "{response}", options={"seed": object()})
    with pytest.raises(ValueError, match="low, high: expected low < high, got 5 and 5"):
        Chat("m", "{response}", low=5, high=5)


@pytest.mark.parametrize(
    ("reader", "text", "score"),
    [
        (Match(), "Score: 7", 7.0),
        (Match(), "A score: 3 would be low. It is good.\nScore: -8.5.", -8.5),
        (Match(r"\[\[(\d+)\]\]"), "I say [[4]]", 4.0),
        (JSONField(), '{"score": 7}', 7.0),
        (JSONField("rating"), 'Here:\n```json\n{"why": "a {b}", "rating": 2.5}\n```', 2.5),
    ],
)
def test_scores_in_text(reader: Any, text: str, score: float) -> None:
    assert read_scores(Chat("m", "{response}", reader), json.dumps(said(text)), 1) == [score]


@pytest.mark.parametrize(
    ("reader", "text", "message"),
    [
        (Match(), "Score: high", r"expected a number where .* has it, got 'Score: high'"),
        (Match(r"Score: (\w+)"), "Score: high", r"expected a number where .* has it, got 'Score: high'"),
        (Match(), None, "expected a reply in text, got None"),
        (JSONField(), "no JSON", "expected JSON with the field 'score', got 'no JSON'"),
        (JSONField(), '{"score": 7', "expected JSON with the field 'score'"),
        (JSONField(), '{"rating": 7}', "expected JSON with the field 'score'"),
        (JSONField(), "[7]", "expected JSON with the field 'score'"),
        (JSONField(), '{"score": "7"}', "malformed.*TypeError"),
        (Match(), "Score: 11", "expected a score from 1 to 10, got 11.0"),
        (Match(), "Score: 0", "expected a score from 1 to 10, got 0.0"),
        (JSONField(), '{"score": NaN}', "expected a score from 1 to 10, got nan"),
    ],
)
def test_text_without_a_score(reader: Any, text: Any, message: str) -> None:
    with pytest.raises(UnusableReply, match=message):
        read_scores(Chat("m", "{response}", reader, low=1, high=10), json.dumps(said(text)), 1)


def test_patterns_have_one_group() -> None:
    for pattern, message in (("(", "expected a regular expression"), (r"\d", "got 0 in"), (r"(\d)(\d)", "got 2 in")):
        with pytest.raises(ValueError, match=f"pattern: .*{message}"):
            Match(pattern)


def expected_digit(*places: dict[str, Any], **settings: Any) -> float:
    protocol = Chat("m", "{response}", ExpectedDigit(**settings))
    return read_scores(protocol, json.dumps(said("", {"content": list(places)})), 1)[0]


def test_the_expected_digit() -> None:
    # By hand: (2·.25 + 4·.5) / .75, where "no" has the rest.
    assert expected_digit(place("4", d2=0.25, d4=0.5, no=0.25)) == pytest.approx(10 / 3)
    # A digit with and without a space is one digit: (3·.4 + 5·.4) / .8; 0 is out of range.
    assert expected_digit(place("3", d3=0.1, _3=0.3, d5=0.4, d0=0.2)) == pytest.approx(4.0)
    assert expected_digit(place("0", d0=0.5, d1=0.5), low=0, high=1) == pytest.approx(0.5)
    # The first digit counts, not the first token nor a later digit.
    assert expected_digit(place("Score", Score=1.0), place("9", d9=1.0), place("1", d1=1.0)) == pytest.approx(9.0)
    # What was said may be missing among the most probable: (1·.25 + 2·.5) / .75.
    said_alone = {"token": "1", "logprob": math.log(0.25), "top_logprobs": [{"token": "2", "logprob": math.log(0.5)}]}
    assert expected_digit(said_alone) == pytest.approx(5 / 3)


def test_no_expected_digit() -> None:
    with pytest.raises(UnusableReply, match="expected a digit from 1 to 9, got 'Well 0'"):
        expected_digit(place("Well", Well=1.0), place(" 0", _0=1.0))
    with pytest.raises(UnusableReply, match=r"a probability of 0\.5 together, got 0\.4"):
        expected_digit(place("7", d7=0.4, Well=0.6))
    assert expected_digit(place("7", d7=0.4, Well=0.6), min_mass=0.3) == pytest.approx(7.0)
    for logprobs in (None, {"content": None}):
        with pytest.raises(UnusableReply, match="log-probs, which this server does not give"):
            read_scores(Chat("m", "{response}", ExpectedDigit()), json.dumps(said("7", logprobs)), 1)


@pytest.mark.parametrize("settings", [{"low": 5, "high": 5}, {"high": 10}, {"low": -1}])
def test_digits_are_one_token(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="low, high: expected 0 <= low < high <= 9"):
        ExpectedDigit(**settings)
    with pytest.raises(ValueError, match=r"min_mass: expected a number in \(0, 1\], got 0"):
        ExpectedDigit(min_mass=0)
