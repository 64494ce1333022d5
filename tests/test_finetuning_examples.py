"""Rows become token ids: what is learnt of them, where they end, what is cut, and which are refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import textenv
from scripts.finetuning.examples import Columns, Encoder, read_examples
from textenv.models import load_tokenizer

HIDDEN = -100


def with_template(tokenizer: Any, template: str) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def dressed(tokenizer: Any, before: str, after: str) -> Any:
    """One that puts special tokens around a text by itself."""
    from tokenizers.processors import TemplateProcessing

    changed = copy.deepcopy(tokenizer)
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{before} $A {after}".strip(), special_tokens=[("<s>", 1), ("<pad>", 0)]
    )
    return changed


def test_of_a_pair_the_response_and_its_end_are_learnt(tiny_tokenizer: Any) -> None:
    example = Encoder(tiny_tokenizer).pair("w3 w4", " w5 w6")
    assert example.input_ids == [3, 4, 5, 6, 1]
    assert example.labels == [HIDDEN, HIDDEN, 5, 6, 1]
    assert example.learnt == 3 and not example.cut


def test_of_a_text_all_is_learnt_but_that_nothing_predicts_the_first(tiny_tokenizer: Any) -> None:
    example = Encoder(tiny_tokenizer).text("w3 w4")
    assert example.input_ids == example.labels == [3, 4, 1]
    assert example.learnt == 2


def test_the_end_is_learnt_where_padding_is_the_end(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    assert Encoder(tokenizer).pair("w3", "w5").labels == [HIDDEN, 5, 1]


@pytest.mark.parametrize(
    ("before", "after", "prompt", "text"),
    [
        ("", "", [3], [3, 1]),
        ("<s>", "", [1, 3], [1, 3, 1]),
        ("", "<s>", [3], [3, 1]),
        ("<s>", "<s>", [1, 3], [1, 3, 1]),
        ("<pad> <s>", "<pad> <s>", [0, 1, 3], [0, 1, 3, 1]),
    ],
)
def test_what_a_tokenizer_adds_by_itself_stays_before_and_goes_behind(
    tiny_tokenizer: Any, before: str, after: str, prompt: list[int], text: list[int]
) -> None:
    if before or after:
        tokenizer = dressed(tiny_tokenizer, before, after)
        assert tokenizer("w3")["input_ids"] != tiny_tokenizer("w3")["input_ids"]
    else:
        tokenizer = tiny_tokenizer
    encoder = Encoder(tokenizer)
    assert encoder.pair("w3", " w4").input_ids == [*prompt, 4, 1]
    assert encoder.pair("w3", " w4").labels == [HIDDEN] * len(prompt) + [4, 1]
    assert encoder.text("w3").input_ids == text


TEXT = st.text(alphabet="ab eHT,.\n'é", max_size=12)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(prompt=TEXT, response=TEXT.filter(str.strip))
def test_the_prompt_has_the_ids_that_it_has_in_the_environment(prompt: str, response: str) -> None:
    tokenizer = load_tokenizer(textenv.embedded.STORYTELLER, argument="model")
    example = Encoder(tokenizer).pair(prompt, response)
    start = tokenizer(prompt)["input_ids"]
    assert example.input_ids[: len(start)] == start
    assert example.labels == [HIDDEN] * len(start) + example.input_ids[len(start) :]
    assert example.input_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(example.input_ids, skip_special_tokens=True) == prompt + response


def test_a_response_that_would_change_the_prompt_is_tokenized_apart() -> None:
    tokenizer = load_tokenizer(textenv.embedded.STORYTELLER, argument="model")
    prompt, response = "Once up", "on a time"
    start, joint = tokenizer(prompt)["input_ids"], tokenizer(prompt + response)["input_ids"]
    assert joint[: len(start)] != start  # or this shows nothing
    example = Encoder(tokenizer).pair(prompt, response)
    assert example.input_ids == [*start, *tokenizer(response, add_special_tokens=False)["input_ids"], 2]


# ------------------------------------------------------------------------------------------------------------- chats

TURNS = "{% for m in messages %}{{ ' <s> ' if m.role == 'user' else ' <pad> ' }}{{ m.content }}{% endfor %}"
OPEN = "{% if add_generation_prompt %} <pad> {% endif %}"
ENDING = (
    "{% for m in messages %}{% if m.role == 'user' %} <unk> {{ m.content }}{% else %} <pad> {{ m.content }} <s> w9 "
    "{% endif %}{% endfor %}" + OPEN
)
CHAT = [
    {"role": "user", "content": "w3"},
    {"role": "assistant", "content": "w4 w5"},
    {"role": "user", "content": "w6"},
    {"role": "assistant", "content": "w7"},
]


def test_of_a_chat_every_answer_is_learnt_and_the_last_ends(tiny_tokenizer: Any) -> None:
    encoder = Encoder(with_template(tiny_tokenizer, TURNS + OPEN))
    example = encoder.chat(CHAT)
    assert example.input_ids == [1, 3, 0, 4, 5, 1, 6, 0, 7, 1]
    assert example.labels == [HIDDEN] * 3 + [4, 5] + [HIDDEN] * 3 + [7, 1]
    assert encoder.chat([*CHAT, {"role": "user", "content": "w8"}]) == example


def test_a_template_that_ends_answers_is_left_alone(tiny_tokenizer: Any) -> None:
    example = Encoder(with_template(tiny_tokenizer, ENDING)).chat(CHAT)
    assert example.input_ids == [2, 3, 0, 4, 5, 1, 9, 2, 6, 0, 7, 1, 9]
    assert example.labels == [HIDDEN] * 3 + [4, 5, 1, 9] + [HIDDEN] * 3 + [7, 1, 9]


def test_a_prompt_is_a_chat_if_it_is_messages_or_asked_for(tiny_tokenizer: Any) -> None:
    tokenizer = with_template(tiny_tokenizer, TURNS + OPEN)
    expected = ([1, 3, 0, 4, 1], [HIDDEN] * 3 + [4, 1])
    for example in (
        Encoder(tokenizer).pair([{"role": "user", "content": "w3"}], "w4"),
        Encoder(tokenizer, chat_template=True).pair("w3", "w4"),
    ):
        assert (example.input_ids, example.labels) == expected
    assert Encoder(tokenizer).pair("w3", " w4").input_ids == [3, 4, 1]


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        (None, CHAT, "expected a tokenizer with a chat template"),
        (TURNS, CHAT[:1], "expected at least one message of the assistant"),
        (TURNS, "w3", "expected messages with 'role' and 'content', got 'w3'"),
        (TURNS, [*CHAT, 3], "expected messages with 'role' and 'content'"),
        (TURNS, [{"role": "assistant"}], "expected messages with 'role' and 'content'"),
        # The first answer is shown only while it is the last message, as templates do that drop old thoughts.
        (
            "{% for m in messages %}{{ ' w8 ' if loop.last and m.role == 'assistant' }} {{ m.content }}{% endfor %}",
            CHAT,
            "expected a chat template that leaves earlier messages alone",
        ),
    ],
)
def test_bad_chats(tiny_tokenizer: Any, template: Any, chat: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Encoder(with_template(tiny_tokenizer, template)).chat(chat)


# ------------------------------------------------------------------------------------------------------------- limits


def test_a_long_example_loses_its_end_and_no_end_is_learnt(tiny_tokenizer: Any) -> None:
    encoder = Encoder(tiny_tokenizer, max_tokens=4)
    example = encoder.pair("w3 w4", " w5 w6 w7")
    assert (example.input_ids, example.labels, example.cut) == ([3, 4, 5, 6], [HIDDEN, HIDDEN, 5, 6], True)
    assert not encoder.pair("w3 w4", " w5").cut
    with pytest.raises(ValueError, match="expected a token to learn, got none in the first 4 of 6"):
        encoder.pair("w3 w4 w5 w6", "w7")
    with pytest.raises(ValueError, match="max_tokens: expected an integer >= 2, got 1"):
        Encoder(tiny_tokenizer, max_tokens=1)


@pytest.mark.parametrize("blank", ["", " \n"])
def test_a_blank_response_is_refused(tiny_tokenizer: Any, blank: str) -> None:
    encoder = Encoder(with_template(tiny_tokenizer, TURNS + OPEN))
    with pytest.raises(ValueError, match="expected text that is not blank, got"):
        encoder.text(blank)
    for prompt in ("w3", CHAT[:1]):
        with pytest.raises(ValueError, match="expected a response that is not blank, got"):
            encoder.pair(prompt, blank)
    silent = {"role": "assistant", "content": blank}
    for chat in ([*CHAT, silent], [CHAT[0], silent, *CHAT]):
        with pytest.raises(ValueError, match="expected an answer that is not blank, got"):
            encoder.chat(chat)
    encoder.chat([*CHAT, silent | {"tool_calls": [{"name": "look"}]}])  # which a template renders


def test_a_tokenizer_without_an_end_is_refused(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tokenizer: expected one with an EOS token"):
        Encoder(tokenizer)


# -------------------------------------------------------------------------------------------------------------- files


def write(folder: Path, rows: list[Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "w3 w4"}, [3, 4, 1]),
        ({"prompt": "w3", "response": "w4"}, [3, 4, 1]),
        ({"prompt": "w3", "response": "w4", "text": "w9"}, [3, 4, 1]),
        ({"messages": CHAT, "prompt": "w3", "response": "w4"}, [1, 3, 0, 4, 5, 1, 6, 0, 7, 1]),
    ],
)
def test_the_form_is_that_of_the_first_row(tmp_path: Path, tiny_tokenizer: Any, row: Any, expected: list[int]) -> None:
    encoder = Encoder(with_template(tiny_tokenizer, TURNS + OPEN))
    # "w3w4" is one unknown word: pairs are joined as they stand.
    row = {key: f" {value}" if key == "response" else value for key, value in row.items()}
    assert [e.input_ids for e in read_examples(write(tmp_path, [row]), encoder, strict=True).rows] == [expected]


def test_form_and_columns_may_be_chosen(tmp_path: Path, tiny_tokenizer: Any) -> None:
    encoder, path = Encoder(tiny_tokenizer), tmp_path / "a.csv"
    path.write_text("question,answer,text\nw3, w4,w9\n")
    columns = Columns(prompt="question", response="answer")
    assert [e.input_ids for e in read_examples(path, encoder, columns=columns).rows] == [[3, 4, 1]]
    assert [e.input_ids for e in read_examples(path, encoder, columns=columns, form="text").rows] == [[9, 1]]
    with pytest.raises(ValueError, match=r"columns: expected one of \[\['messages'\], .* in .*a.csv, got \['question'"):
        read_examples(path, encoder, columns=Columns(text="story"))
    with pytest.raises(ValueError, match=r"columns: expected \['story'\] in .*a.csv, got \['question'"):
        read_examples(path, encoder, columns=Columns(text="story"), form="text")


def test_each_line_of_a_text_file_is_a_text(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"w3 w4\r\n\n  \nw5\n")
    assert [e.input_ids for e in read_examples(path, Encoder(tiny_tokenizer)).rows] == [[3, 4, 1], [5, 1]]


def test_bad_rows_are_told_by_line_and_skipped_or_an_error(tmp_path: Path, tiny_tokenizer: Any) -> None:
    good, long = {"prompt": "w3", "response": " w4"}, {"prompt": "w3", "response": " w4 w5 w6"}
    path = write(tmp_path, [good, "{oops", {"prompt": "w3"}, {"prompt": 3, "response": "w4"}, long, [1]])
    told: list[str] = []
    reading = read_examples(path, Encoder(tiny_tokenizer, max_tokens=3), tell=told.append)
    assert [e.input_ids for e in reading.rows] == [[3, 4, 1], [3, 4, 5]]
    assert (reading.counts["read"], reading.counts["kept"], reading.counts["skipped"]) == (6, 2, 4)
    assert told[0].startswith(f"{path}: skipped 4 of 6 rows; the first: {path}:2: expected JSON, got '{{oops'")
    assert told[0].endswith(f"; {path}:4: expected a prompt that is a string, got 3; and 1 more")
    assert told[1:] == [f"{path}: cut 1 of 2 examples to 3 tokens"]
    with pytest.warns(UserWarning, match="skipped 4 of 6 rows"), pytest.warns(UserWarning, match="cut 1 of 2"):
        read_examples(path, Encoder(tiny_tokenizer, max_tokens=3))
    for place, message in ((2, "expected a value for 'response', got none"), (3, "expected a prompt that is a string")):
        part = tmp_path / "part.jsonl"
        part.write_text("\n".join(path.read_text().split("\n")[i] for i in (0, place)))
        with pytest.raises(ValueError, match=f"part.jsonl:2: {message}"):
            read_examples(part, Encoder(tiny_tokenizer), strict=True)
