"""Reading, tokenizing and drawing prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import env_fixtures as fixtures
import numpy as np
import pytest

from textenv import PromptStream
from textenv.prompts import read_prompts, tokenize_prompts

V = fixtures.VOCAB


def test_text_file(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("ax by\r\n\n  \ncz\u2028dx\n".encode())
    assert read_prompts(path) == read_prompts(str(path)) == ["ax by", "cz\u2028dx"]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    rows = ["ax", [1, 2, 3], {"prompt": "by", "more": 1}, {"prompt": [4]}, "c\u2028z\u0085"]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf8")
    assert read_prompts(path) == ["ax", [1, 2, 3], "by", [4], "c\u2028z\u0085"]


def test_lists_iterators_and_datasets() -> None:
    assert read_prompts(["ax", [1]]) == ["ax", [1]]
    assert read_prompts(row for row in ("ax", "by")) == ["ax", "by"]
    datasets = pytest.importorskip("datasets")
    assert read_prompts(datasets.Dataset.from_dict({"prompt": ["ax", "by"]})) == ["ax", "by"]
    with pytest.raises(
        ValueError, match="prompts: expected a dataset with a column 'prompt', got columns \\['text'\\]"
    ):
        read_prompts(datasets.Dataset.from_dict({"text": ["ax"]}))


def test_tokenize_keeps_order_and_ids() -> None:
    given = ["ax by", [1, 9], np.array([5, 6]), "by"]
    assert tokenize_prompts(given, fixtures.tiny_tokenizer(), vocab_size=V) == [[3, 7], [1, 9], [5, 6], [7]]
    assert tokenize_prompts([[1, 2]], None, vocab_size=V) == [[1, 2]]


def test_a_long_prompt_is_cut_on_the_left_when_asked() -> None:
    ids = [list(range(3, 10))]
    assert tokenize_prompts(ids, None, vocab_size=V, max_prompt_tokens=3, overflow="left") == [[7, 8, 9]]
    assert tokenize_prompts(ids, None, vocab_size=V, max_prompt_tokens=7) == ids


BAD_SOURCES: list[tuple[Any, str]] = [
    ([], "prompts: expected at least one prompt, got none from \\[\\]"),
    ("ax by", "prompts: expected a list, a dataset, or a .txt or .jsonl file, got 'ax by'"),
    (5, "prompts: expected a list, a dataset, or a .txt or .jsonl file, got 5"),
    ({"prompt": ["ax"]}, "prompts: expected a list, a dataset, or a .txt or .jsonl file, got {'prompt'"),
    ("nowhere/p.txt", "prompts: expected a readable text file, got 'nowhere/p.txt' .*No such file"),
    (Path("p.csv"), "prompts: expected a .txt or .jsonl file, got 'p.csv'"),
]


@pytest.mark.parametrize(("source", "message"), BAD_SOURCES, ids=[message[10:60] for _, message in BAD_SOURCES])
def test_bad_sources(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_prompts(source)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", r"prompts: expected JSON at .*p.jsonl:3, got '{oops' \(Expecting property name"),
        ("7", r"prompts: expected text, ids, or an object with 'prompt' at .*p.jsonl:3, got 7"),
        ('{"text": "ax"}', r"an object with 'prompt' at .*p.jsonl:3, got {'text': 'ax'}"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f'"ax"\n\n{line}\n', encoding="utf8")
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


BAD_PROMPTS: list[tuple[list[Any], str]] = [
    ([[1], ""], "prompts: expected text or ids, got an empty prompt at 1"),
    ([[1], []], "prompts: expected at least one token, got an empty prompt at 1"),
    ([[1], [2.5]], r"prompts: expected a string or a list of integer ids at 1, got \[2.5\]"),
    ([[1], [True]], "prompts: expected a string or a list of integer ids at 1"),
    ([[1], [[1], [2, 3]]], "prompts: expected a string or a list of integer ids at 1"),
    ([[1], 7], "prompts: expected a string or a list of integer ids at 1, got 7"),
    ([[1], None], "prompts: expected a string or a list of integer ids at 1, got None"),
    ([[1], [1, V]], rf"prompts: expected ids in \[0, {V}\), got \[1, {V}\] at 1"),
    ([[1], [-1]], rf"prompts: expected ids in \[0, {V}\), got \[-1\] at 1"),
    (
        [[1], [1] * 5],
        r"prompts: expected at most max_prompt_tokens=4 tokens, got 5 in prompt 1 .*prompt_overflow='left'",
    ),
]


@pytest.mark.parametrize(("prompts", "message"), BAD_PROMPTS, ids=[message[10:60] for _, message in BAD_PROMPTS])
def test_bad_prompts(prompts: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenize_prompts(prompts, fixtures.tiny_tokenizer(), vocab_size=V, max_prompt_tokens=4)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="tokenizer: expected one, because prompts holds text, got None"):
        tokenize_prompts(["ax"], None, vocab_size=V)


def test_a_stream_is_epochs_without_repetition() -> None:
    stream = PromptStream(5, seed=3)
    drawn = stream.take(20)
    assert all(sorted(drawn[i : i + 5]) == [0, 1, 2, 3, 4] for i in range(0, 20, 5))
    assert len({tuple(drawn[i : i + 5]) for i in range(0, 20, 5)}) > 1
    assert drawn != PromptStream(5, seed=4).take(20)


def test_a_stream_does_not_depend_on_how_it_is_taken() -> None:
    parts = PromptStream(5, seed=3, group=2)
    assert [i for n in (1, 4, 7, 3) for i in parts.take(n)] == PromptStream(5, seed=3, group=2).take(15)


def test_groups_repeat() -> None:
    single, groups = PromptStream(4, seed=0).take(6), PromptStream(4, seed=0, group=3).take(18)
    assert groups == [index for index in single for _ in range(3)]


def test_a_stream_goes_on_from_its_state() -> None:
    stream = PromptStream(7, seed=1, group=2)
    stream.take(9)
    state = json.loads(json.dumps(stream.state_dict()))
    again = PromptStream(7, seed=99, group=2)
    again.load_state_dict(state)
    assert again.take(12) == stream.take(12)
    with pytest.raises(ValueError, match="prompts: expected the checkpoint's 7 prompts in groups of 2, got 8"):
        PromptStream(8, seed=1, group=2).load_state_dict(state)
    with pytest.raises(ValueError, match="expected integers >= 1, got 0 and 1"):
        PromptStream(0, seed=1)
