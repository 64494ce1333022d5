"""Rows from files: every format gives the same rows, and a bad row is told by file and line."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from textenv.prompts import read_prompts
from textenv.table_files import read_records
from textenv.tables import Names, parse_rows, read_rows

ROWS = [
    {"prompt": "ax", "chosen": "by"},
    {"prompt": 'say "hi",\nthen\r\ngo', "chosen": "tab\there"},
    {"prompt": "U+2028 \u2028 and NEL \u0085", "chosen": " é "},
]
NAMES = ["prompt", "chosen"]


def delimited(rows: list[dict[str, str]], delimiter: str, names: list[str] = NAMES) -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, names, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def written(folder: Path, suffix: str, rows: list[dict[str, Any]]) -> Path:
    """The rows in a file of this kind, by writers that are not ours."""
    path = folder / f"rows.{suffix}"
    if suffix == "parquet":
        arrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(rows), path)
    elif suffix == "json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf8")
    elif suffix == "jsonl":
        path.write_bytes("\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    else:
        path.write_bytes(delimited(rows, "," if suffix == "csv" else "\t").encode())
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_file_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path, suffix, ROWS)
    assert read_rows(path, NAMES) == read_rows(str(path), NAMES) == ROWS


def test_mappings_and_datasets_give_them_too() -> None:
    assert read_rows(ROWS, NAMES) == read_rows(iter(ROWS), NAMES) == ROWS
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    assert read_rows(data, NAMES) == ROWS
    with pytest.raises(ValueError, match=r"columns: expected \['rejected'\] in the dataset, got \['prompt', 'chosen'"):
        read_rows(data, ["prompt", "rejected"])
    with pytest.raises(ValueError, match=r"source: expected .* one dataset or its folder, or a list"):
        read_rows(datasets.DatasetDict(train=data), NAMES)


def test_a_folder_of_a_saved_dataset_gives_them_as_they_are_asked_for(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([*ROWS, {"prompt": None, "chosen": "x"}])
    data.save_to_disk(tmp_path / "one", num_shards=2)
    reading = parse_rows(tmp_path / "one", Names(NAMES), dict)
    assert reading.rows == ROWS == read_rows(str(tmp_path / "one"), NAMES, tell=str)
    assert reading.problems == (f"{tmp_path / 'one'} row 3: expected a value for 'prompt', got none",)
    assert read_prompts(tmp_path / "one", column="chosen")[0] == "by"
    with pytest.raises(ValueError, match=r"columns: expected \['rejected'\] in .*one, got \['prompt', 'chosen'"):
        read_rows(tmp_path / "one", ["rejected"])
    records = read_records(tmp_path / "one")
    assert not isinstance(records, list) and next(iter(records)).value == ROWS[0]


def test_other_folders_are_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data, both, broken = datasets.Dataset.from_list(ROWS), tmp_path / "both", tmp_path / "broken"
    datasets.DatasetDict(train=data, test=data).save_to_disk(both)
    with pytest.raises(ValueError, match=f"{both}: expected the folder of one dataset, got .* {both}/train, {both}/te"):
        read_rows(both, NAMES)
    assert read_rows(both / "test", NAMES) == ROWS
    refused = "{folder}: expected a folder of Dataset.save_to_disk, got an error"
    with pytest.raises(ValueError, match=refused.format(folder=tmp_path)):
        read_rows(tmp_path, NAMES)
    for file, content in itertools.product(("state.json", "dataset_info.json"), ("{oops", "[]", "null", "[1]", '"x"')):
        data.save_to_disk(broken)
        (broken / file).write_text(content)
        with pytest.raises(ValueError, match=refused.format(folder=broken)):
            read_rows(broken, NAMES)


@pytest.mark.parametrize(("name", "library"), [("folder", "datasets"), ("a.parquet", "pyarrow")])
def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, library: str) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        ValueError, match=rf"{name}: expected what pip install 'textenv\[data\]' brings, got .*{library}"
    ):
        read_rows(tmp_path / name, NAMES)


# Cells that are not empty (an empty cell is no value) and no control characters but the line ends and the tab.
CELLS = st.text(
    st.one_of(st.sampled_from('",;\t\n\r\u2028\ufeff '), st.characters(exclude_categories=["Cc", "Cs"])), min_size=1
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.fixed_dictionaries({"prompt": CELLS, "chosen": CELLS}), min_size=1, max_size=5))
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv"])
def test_any_text_survives(tmp_path: Path, suffix: str, rows: list[dict[str, str]]) -> None:
    assert read_rows(written(tmp_path, suffix, rows), NAMES) == rows


@pytest.mark.parametrize(
    "content",
    ["\ufeffprompt,chosen\r\nax,by\r\n", "prompt,chosen\nax,by", '\n\n"prompt","chosen"\n\nax,"by"\n\n'],
    ids=["byte-order mark and CRLF", "no last line end", "quotes and blank lines"],
)
def test_forms_of_csv(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content.encode())
    assert read_rows(path, NAMES) == ROWS[:1]


def test_columns_without_a_name_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,chosen,,\nax,by,,\n")
    assert read_rows(path, NAMES) == ROWS[:1]


def test_a_cell_may_be_a_long_document_and_the_limit_of_others_stays(tmp_path: Path) -> None:
    path, before = tmp_path / "a.csv", csv.field_size_limit()
    path.write_text(f"text\n{'word ' * 50_000}\n")
    assert len(read_rows(path, ["text"])[0]["text"]) == 250_000 > before
    assert csv.field_size_limit() == before


def test_columns_have_other_names_and_absent_ones_are_none() -> None:
    rows = [{"q": "ax", "a": "by", "n": 1}, {"q": "cz", "a": None}]
    got = read_rows(rows, ["prompt"], optional=["response", "n"], columns={"prompt": "q", "response": "a"})
    assert got == [{"prompt": "ax", "response": "by", "n": 1}, {"prompt": "cz", "response": None, "n": None}]


def test_only_numbers_that_are_asked_for_become_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,b,c\n1,2,\n0x1,-2.5e3,7\n")
    assert read_rows(path, ["a", "b"], optional=["c"], numbers=["b", "c"]) == [
        {"a": "1", "b": 2.0, "c": None},
        {"a": "0x1", "b": -2500.0, "c": 7.0},
    ]


BAD_ROWS: list[tuple[str, str, str]] = [
    ("csv", 'a,b\n"x\ny",1\n\n,2\n', r"a.csv:5: expected a value for 'a', got none"),
    ("csv", "a,b\nx,1\ny,1,2\n", r"a.csv:3: expected 2 cells, got 3"),
    ("csv", "a,b\nx,1\ny\n", r"a.csv:3: expected 2 cells, got 1"),
    ("csv", 'a,b\nx,1\n"y"z,2\n', r"a.csv:3: expected 2 cells, got an error"),
    ("csv", 'a,b\nx,1\n"y,2\n', r"a.csv:3: expected 2 cells, got an error \(unexpected end of data"),
    ("csv", "a,b\nx,1\ny,nan\n", r"a.csv:3: expected a finite number for 'b', got 'nan'"),
    ("csv", "a,b\nx,1\ny,one\n", r"a.csv:3: expected a finite number for 'b', got 'one'"),
    ("jsonl", '{"a": "x", "b": 1}\n\n{oops\n', r"a.jsonl:3: expected JSON, got '{oops' \(Expecting property name"),
    ("jsonl", '{"a": "x", "b": 1}\n[1]\n', r"a.jsonl:2: expected an object with \['a', 'b'\], got \[1\]"),
    ("jsonl", '{"a": "x", "b": 1}\n{"a": null, "b": 1}\n', r"a.jsonl:2: expected a value for 'a', got none"),
    ("jsonl", '{"a": "x", "b": 1}\n{"a": "y", "b": true}\n', r"a.jsonl:2: expected a finite number for 'b', got True"),
    ("jsonl", '{"a": "x", "b": 1}\n"\udcff"\n', r"a.jsonl:2: expected UTF-8 text, got byte 0xff"),
    ("jsonl", '{"a": "x", "b": 1}\n' + "[" * 200_000, r"a.jsonl:2: expected JSON, got '\[\[.* \(maximum recursion"),
    ("json", '[\n{"a": "x", "b": 1},\n\n{"a":\n "y"}]', r"a.json:4: expected a value for 'b', got none"),
]


@pytest.mark.parametrize(("suffix", "content", "message"), BAD_ROWS, ids=[row[2][:50] for row in BAD_ROWS])
def test_a_bad_row_is_told_by_file_and_line(tmp_path: Path, suffix: str, content: str, message: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="expected good rows, got 1 of 2 bad; the first: .*" + message):
        read_rows(path, ["a", "b"], numbers=["b"], strict=True)
    told: list[str] = []
    rows = read_rows(path, ["a", "b"], numbers=["b"], tell=told.append)
    assert [row["b"] for row in rows] == [1.0]
    assert len(told) == 1 and told[0].startswith(f"{path}: skipped 1 of 2 rows; the first: ")
    with pytest.warns(UserWarning, match="skipped 1 of 2 rows; the first: .*" + message):
        read_rows(path, ["a", "b"], numbers=["b"])


def test_the_first_few_bad_rows_are_told_and_all_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(['{"a": 1}', "oops", '{"a": 2}', "{}", "[]", '{"a": "x"}', "7"]))
    names = Names(["a"], numbers=["a"])
    few = (
        rf"the first: {path}:2: expected JSON, got 'oops' \(.*\); {path}:4: expected a value for 'a', got none; "
        rf"{path}:5: expected an object with \['a'\], got \[\]; and 2 more$"
    )
    told: list[str] = []
    reading = parse_rows(path, names, lambda row: 10 * row["a"])
    assert reading.told(told.append) == [10.0, 20.0]
    assert len(told) == 1 and re.match(rf"{path}: skipped 5 of 7 rows; {few}", told[0])
    problems = reading.counts.pop("problems")
    assert reading.counts == {"read": 7, "kept": 2, "skipped": 5, "problems": problems} and len(problems) == 3
    with pytest.raises(ValueError, match=rf"^{path}: expected good rows, got 5 of 7 bad; {few}"):
        parse_rows(path, names, str, strict=True)


def test_what_a_parser_refuses_is_a_bad_row_with_its_place() -> None:
    def even(row: dict[str, Any]) -> int:
        if row["a"] % 2:
            raise ValueError(f"expected an even number, got {row['a']}")
        return row["a"]

    reading = parse_rows([{"a": 2}, {"a": 3}, {"a": 4}], Names(["a"]), even)
    assert (reading.rows, reading.problems) == ([2, 4], ("row 1: expected an even number, got 3",))
    with pytest.raises(ValueError, match="expected rows, got none of 1; the first: row 0: expected an even number"):
        parse_rows([{"a": 3}], Names(["a"]), even)


@pytest.mark.parametrize(
    "read",
    [lambda rows: read_rows(rows, ["prompt"]), lambda rows: read_prompts(rows, strict=False)],
    ids=["read_rows", "read_prompts"],
)
def test_the_warning_points_at_the_caller_and_never_prints_all_rows(read: Any) -> None:
    class Rows(list):
        def __repr__(self) -> str:
            raise AssertionError("expected no repr of all rows")

    rows = Rows([{"prompt": "ax"}, {}])
    with pytest.warns(UserWarning, match=r"^the Rows: skipped 1 of 2 rows; the first: row 1: expected ") as seen:
        assert len(read(rows)) == 1
    assert [warning.filename for warning in seen] == [__file__]


def test_nothing_is_told_of_good_rows() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_rows(ROWS, NAMES, tell=lambda line: pytest.fail(line)) == ROWS


BAD_FILES: list[tuple[str, str, str]] = [
    ("a.csv", "a,c\nx,1\n", r"columns: expected \['b'\] in .*a.csv, got \['a', 'c'\]"),
    ("a.csv", "a,b,c,b\nx,1,2,3\n", r"columns: expected different names in .*a.csv, got \['b'\] more than once"),
    ("a.csv", "", r"columns: expected \['a', 'b'\] in .*a.csv, got \[\]"),
    ("a.csv", "a,b\n", r"a.csv: expected rows, got none$"),
    ("a.csv", '"a"x,b\n', r"a.csv:1: expected a heading, got an error"),
    ("a.csv", "a,b\nx,\udcff\n", r"a.csv:2: expected UTF-8 text, got byte 0xff"),
    ("a.jsonl", "1\n2\n", r"a.jsonl: expected rows, got none of 2; the first: .*a.jsonl:1: expected an object"),
    ("a.json", "{}", r"a.json: expected a list of objects, got '{}'"),
    ("a.json", '[\n{"a": 1},\n{"a" 2}]', r"a.json:3: expected JSON, got an error \(Expecting ':'"),
    ("a.json", '[\n{"a": 1}\n{"a": 2}]', r"a.json:3: expected ',' or '\]', got '{'"),
    ("a.json", '[{"a": 1}', r"a.json:1: expected ',' or '\]', got ''"),
    ("a.txt", "x", r"source: expected one of .jsonl, .json, .csv, .tsv, .parquet, or a folder of .*, got '.*a.txt'"),
    ("a.parquet", "no", r"a.parquet: expected a readable parquet file, got "),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=[row[2][:50] for row in BAD_FILES])
def test_bad_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / name, ["a", "b"])


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"columns: expected names among \['a'\], got \['z'\]"):
        read_rows([{"a": 1}], ["a"], columns={"z": "a"})
    with pytest.raises(ValueError, match=r"numbers: expected names among \['a'\], got \['z'\]"):
        read_rows([{"a": 1}], ["a"], numbers=["z"])
    with pytest.raises(ValueError, match=r"nowhere.csv: expected a readable file, got No such file"):
        read_rows(tmp_path / "nowhere.csv", ["a"])
    with pytest.raises(ValueError, match=r"source: expected .*, got {'a': 1}"):
        read_rows({"a": 1}, ["a"])
    with pytest.raises(ValueError, match=r"source: expected one of .*, got 'a b a b "):
        read_rows("a b " * 1000, ["a"])
    with pytest.raises(ValueError, match=r"source: expected .*, got 5"):
        read_rows(5, ["a"])
    with pytest.raises(ValueError, match=r"^the list: expected rows, got none$"):
        read_rows([], ["a"])
