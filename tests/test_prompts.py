"""Reading, tokenizing and drawing prompts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import env_fixtures as fixtures
import numpy as np
import pytest

from scripts.options import prompt_sources
from textenv import MixedPromptStream, PromptMixture, PromptStream, Shared, TextEnv
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
    with pytest.raises(ValueError, match=r"prompts: columns: expected \['prompt'\] in the dataset, got \['text'\]"):
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
    ("ax by", "prompts: expected a list, a dataset, or a .*.parquet file, got 'ax by'"),
    ("ax by " * 1000, "prompts: expected a list, a dataset, or a .*.parquet file, got 'ax by .*[.]{3}$"),
    (5, "prompts: expected a list, a dataset, or a .*.parquet file, got 5"),
    ({"prompt": ["ax"]}, "prompts: expected a list, a dataset, or a .*.parquet file, got {'prompt'"),
    ("nowhere/p.txt", r"prompts: nowhere/p.txt: expected a readable file, got No such file"),
    (Path("p.doc"), "prompts: expected a list, a dataset, or a .* file, got p.doc"),
]


@pytest.mark.parametrize(("source", "message"), BAD_SOURCES, ids=[message[10:60] for _, message in BAD_SOURCES])
def test_bad_sources(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_prompts(source)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", r"prompts: .*p.jsonl:3: expected JSON, got '{oops' \(Expecting property name"),
        ("7", r"prompts: .*p.jsonl:3: expected text, ids, messages, or an object with 'prompt', got 7"),
        ('{"text": "ax"}', r"p.jsonl:3: .* or an object with 'prompt', got {'text': 'ax'}"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f'"ax"\n\n{line}\n', encoding="utf8")
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


BAD_PROMPTS: list[tuple[list[Any], str]] = [
    ([[1], ""], "prompts: at 1: expected at least one token, got an empty prompt, ''"),
    ([[1], []], r"prompts: at 1: expected at least one token, got an empty prompt, \[\]"),
    ([[1], [2.5]], r"prompts: at 1: expected text, a list of integer ids, or messages, got \[2.5\]"),
    ([[1], [True]], "prompts: at 1: expected text, a list of integer ids, or messages"),
    ([[1], [[1], [2, 3]]], "prompts: at 1: expected text, a list of integer ids, or messages"),
    ([[1], 7], "prompts: at 1: expected text, a list of integer ids, or messages, got 7"),
    ([[1], None], "prompts: at 1: expected text, a list of integer ids, or messages, got None"),
    ([[1], [1, V]], rf"prompts: at 1: expected ids in \[0, {V}\), got \[1, {V}\]"),
    ([[1], [-1]], rf"prompts: at 1: expected ids in \[0, {V}\), got \[-1\]"),
    (
        [[1], [1] * 5],
        r"prompts: at 1: expected at most max_prompt_tokens=4 tokens, got 5 in .*prompt_overflow='left'",
    ),
]


@pytest.mark.parametrize(("prompts", "message"), BAD_PROMPTS, ids=[message[10:60] for _, message in BAD_PROMPTS])
def test_bad_prompts(prompts: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenize_prompts(prompts, fixtures.tiny_tokenizer(), vocab_size=V, max_prompt_tokens=4)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="tokenizer: expected one, because prompts holds text, got None"):
        tokenize_prompts(["ax"], None, vocab_size=V)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_a_column_of_any_file(tmp_path: Path, suffix: str) -> None:
    path, rows = tmp_path / f"p.{suffix}", [{"q": "ax, by", "n": "1"}, {"q": 'c"z\nd', "n": "2"}]
    if suffix == "parquet":
        arrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(rows), path)
    elif suffix.startswith("json"):
        path.write_text(json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows)))
    else:
        lines = [["q", "n"], ['"ax, by"', "1"], ['"c""z\nd"', "2"]]
        path.write_text("\n".join(("," if suffix == "csv" else "\t").join(line) for line in lines))
    assert read_prompts(path, column="q") == ["ax, by", 'c"z\nd']
    assert read_prompts(rows, column="q") == ["ax, by", 'c"z\nd']


def test_a_row_without_a_prompt_may_be_skipped(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "ax"}\n{"prompt": 3}\n{oops\n"by"\n')
    told: list[str] = []
    assert read_prompts(path, strict=False, tell=told.append) == ["ax", "by"]
    (line,) = told
    assert line.startswith(
        f"{path}: skipped 2 of 4 rows; the first: {path}:2: expected text, ids, messages, or an object with 'prompt', "
        f"got {{'prompt': 3}}; {path}:3: expected JSON, got '{{oops'"
    )


@pytest.mark.parametrize("bad", [["a", "b"], "", [], [2.5], [[1], [2, 3]], [{"role": "user"}], [True]])
def test_what_is_no_prompt_is_skipped_or_told_where_it_stands(tmp_path: Path, bad: Any) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": row}) for row in ("ax", bad, [4])))
    told: list[str] = []
    assert read_prompts(path, strict=False, tell=told.append) == ["ax", [4]]
    assert len(told) == 1 and told[0].startswith(f"{path}: skipped 1 of 3 rows; the first: {path}:2: expected")
    with pytest.raises(ValueError, match=r"^prompts: .*p\.jsonl:2: expected"):
        read_prompts(path)


def test_files_in_a_list_are_no_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("ax\n")
    for given in ([str(path)], [path], ["ax", str(path)], iter([str(path)] * 2)):
        with pytest.raises(ValueError, match=r"^prompts: row \d: expected a prompt, got the name of a file, '.*txt'"):
            read_prompts(given)
    texts = ["no/such/file.txt", "What is p.txt", "a" * 5000 + ".txt", "\0.txt"]
    assert read_prompts(texts) == texts
    (tmp_path / "list.txt").write_text(f"{path}\n")  # a file of them is what it says
    assert read_prompts(tmp_path / "list.txt") == [str(path)]


# ------------------------------------------------------------------------------------------------------------- chats

CHAT = "{% for m in messages %}{{ '<s>' if m.role == 'user' else '</s>' }}{{ m.content }}{% endfor %}"
TEMPLATE = CHAT + "{% if add_generation_prompt %}</s>{% endif %}"


def chat_tokenizer(template: str = TEMPLATE) -> Any:
    tokenizer = copy.deepcopy(fixtures.tiny_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


def test_messages_become_ids_by_the_template() -> None:
    chat = [
        {"role": "user", "content": "▁ax"},
        {"role": "assistant", "content": "▁by"},
        {"role": "user", "content": "▁cz"},
    ]
    tokenizer = chat_tokenizer()
    ax, by, cz = (tokenizer.convert_tokens_to_ids(piece) for piece in ("▁ax", "▁by", "▁cz"))
    assert tokenize_prompts([chat], tokenizer, vocab_size=V) == [[1, ax, 2, by, 1, cz, 2]]


def test_text_becomes_what_the_user_says_only_if_asked() -> None:
    tokenizer, given = chat_tokenizer(), ["ax", [4, 5]]
    ax = tokenizer.convert_tokens_to_ids("▁ax")
    assert tokenize_prompts(given, tokenizer, vocab_size=V) == [[ax], [4, 5]]
    asked = tokenize_prompts(given, tokenizer, vocab_size=V, chat_template=True)
    assert asked == tokenize_prompts([[{"role": "user", "content": "ax"}], [4, 5]], tokenizer, vocab_size=V)
    assert asked == [[1, ax, 2], [4, 5]]


@pytest.mark.parametrize(
    ("chat", "template", "message"),
    [
        ([{"role": "user", "content": "ax"}], None, "prompts: at 1: expected a tokenizer with a chat template"),
        (
            [{"role": "user"}],
            TEMPLATE,
            "prompts: at 1: expected messages with 'role' and 'content', got {'role': 'user'}",
        ),
        (
            [{"role": "user", "content": "ax"}],
            "{{ raise_exception('no users') }}",
            "prompts: at 1: expected messages that the chat template takes, got no users",
        ),
    ],
)
def test_bad_chats(chat: Any, template: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenize_prompts([[1], chat], chat_tokenizer(template), vocab_size=V)


def test_the_environment_takes_chats_and_text_for_a_chat() -> None:
    tokenizer, chat = chat_tokenizer(), [{"role": "user", "content": "ax"}]
    ax = tokenizer.convert_tokens_to_ids("▁ax")
    options = {"tokenizer": tokenizer, "reward": lambda prompts, responses: [0.0] * len(prompts), "max_new_tokens": 2}
    env: Any = TextEnv(reference=Shared(fixtures.tiny_llama()), prompts=["ax", chat], chat_template=True, **options)
    assert env.task.prompts == [[1, ax, 2]] * 2
    observation, _ = env.reset(options={"prompt": chat})
    assert observation["input_ids"][:3].tolist() == [1, ax, 2]
    plain: Any = TextEnv(reference=Shared(fixtures.tiny_llama()), prompts=["ax", chat], **options)
    assert plain.task.prompts == [[ax], [1, ax, 2]]


# ---------------------------------------------------------------------------------------------------------- mixtures


def mixed_env(tmp_path: Path, **changes: Any) -> Any:
    (tmp_path / "a.txt").write_text("ax\nay\nbz\n")
    (tmp_path / "b.csv").write_text("prompt\ncx\n")
    options = {"tokenizer": fixtures.tiny_tokenizer(), "reward": lambda prompts, _: [0.0] * len(prompts)}
    sources = {str(tmp_path / "a.txt"): 1, str(tmp_path / "b.csv"): 3}
    return TextEnv(
        reference=Shared(fixtures.tiny_llama()), max_new_tokens=2, **options | {"prompts": sources} | changes
    )


def test_the_environment_draws_a_mixture_by_weight(tmp_path: Path) -> None:
    env = mixed_env(tmp_path)
    drawn = [env.reset(seed=0)[1]["prompt_index"]] + [env.reset()[1]["prompt_index"] for _ in range(799)]
    counts = np.bincount(drawn, minlength=4) / 800
    # Binomial: sd of the last is sqrt(.75 · .25 / 800) = .015, of the others .0097; four of them.
    assert abs(counts[3] - 0.75) < 0.062 and np.abs(counts[:3] - 1 / 12).max() < 0.04
    listed = mixed_env(tmp_path, prompts=PromptMixture([(["ax", "ay", "bz"], 1), (["cx"], 3)]))
    assert listed.task.prompts == env.task.prompts and listed.task.shares == env.task.shares == ((3, 1.0), (1, 3.0))
    again = [listed.reset(seed=0)[1]["prompt_index"]] + [listed.reset()[1]["prompt_index"] for _ in range(30)]
    assert again == drawn[:31]


def test_one_source_draws_as_ever(tmp_path: Path) -> None:
    env = mixed_env(tmp_path, prompts=["ax", "ay", "bz", "cx"])
    drawn = [env.reset(seed=3)[1]["prompt_index"]] + [env.reset()[1]["prompt_index"] for _ in range(20)]
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(3)))
    assert drawn == [int(rng.integers(4)) for _ in range(21)]


def test_a_task_makes_the_stream_of_its_sources(tmp_path: Path) -> None:
    task = mixed_env(tmp_path).task
    assert task.prompt_stream(seed=5, group=2).take(12) == MixedPromptStream([3, 1], [1, 3], seed=5, group=2).take(12)
    plain = mixed_env(tmp_path, prompts=tmp_path / "a.txt").task
    assert plain.prompt_stream(seed=5, group=2).take(9) == PromptStream(3, seed=5, group=2).take(9)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"a.txt": True}, "prompts: expected a finite weight > 0 for 'a.txt', got True"),
        ({"a.txt": float("inf")}, "prompts: expected a finite weight > 0 for 'a.txt', got inf"),
        ({"prompt": ["ax"]}, r"prompts: expected a finite weight > 0 for 'prompt', got \['ax'\]"),
        ({}, "prompts: expected at least one source, got none"),
    ],
)
def test_bad_mixtures(sources: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptMixture.of(sources)


def test_a_folder_is_itself_whatever_it_is_called(tmp_path: Path) -> None:
    folder = tmp_path / "lr=0.1"
    folder.mkdir()
    assert prompt_sources([str(folder)]).sources == ((str(folder), 1.0),)
    assert prompt_sources([f"{folder}=3"]).sources == ((str(folder), 3.0),)
    assert prompt_sources([str(tmp_path / "x=2")]).sources == ((str(tmp_path / "x"), 2.0),)


def test_weights_on_the_command_line() -> None:
    given = prompt_sources(["a.jsonl=2", "b=c.txt", "d=e.csv=.5", "f.txt"])
    assert given.sources == (("a.jsonl", 2.0), ("b=c.txt", 1.0), ("d=e.csv", 0.5), ("f.txt", 1.0))
    assert prompt_sources(None) is None
    for name in ("a.jsonl=x", "a.jsonl="):
        with pytest.raises(ValueError, match=f"env.prompts: expected file=weight, a number .*, got '{name}'"):
            prompt_sources([name])
    with pytest.raises(ValueError, match=r"prompts: expected a finite weight > 0 for 'a\.txt', got nan"):
        prompt_sources(["a.txt=nan"])
