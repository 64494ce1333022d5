"""Records of the files that people keep rows of data in, each with its place."""

from __future__ import annotations

import codecs
import csv
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
"""The files that `read_rows` takes, beside folders that `Dataset.save_to_disk` has written."""


@dataclass(frozen=True)
class Record:
    """A row where it was found."""

    where: str
    """`path:line`, or the index in what has no lines."""
    value: Any = None
    """What was read; None where it does not parse."""
    problem: str | None = None
    """`expected ..., got ...` for a row that does not parse."""


def read_records(source: Any, needed: Sequence[str] = ()) -> Iterator[Record]:
    """Each row where it was found, whatever it is.

    Args:
        source: As in `read_rows`.
        needed: Columns that a source with a heading or a schema must have.

    Raises:
        ValueError: If the source cannot be read, or lacks a column in `needed`.
    """
    if isinstance(source, str | Path):
        return _file_records(Path(source), needed)
    schema = getattr(source, "column_names", None)
    if isinstance(source, Mapping) or isinstance(schema, Mapping) or not isinstance(source, Iterable):
        raise ValueError(
            f"source: expected one of {', '.join(SUFFIXES)}, one dataset or its folder, or a list of rows, got "
            f"{shown(source)}"
        )
    if schema is not None:
        check_columns("the dataset", schema, needed)
    return (Record(f"row {index}", row) for index, row in enumerate(source))


def source_name(source: Any) -> str:
    """What a source is called in an error: a path as it is, what lies in memory by its type, as it may be long.

    >>> source_name("a.csv"), source_name([{"a": 1}])
    ('a.csv', 'the list')
    """
    return str(source) if isinstance(source, str | Path) else f"the {type(source).__name__}"


def shown(value: Any, width: int = 80) -> str:
    """A value in an error: a path as it is, others as `repr`, cut."""
    text = str(value) if isinstance(value, Path) else repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with its own line ends and without a byte-order mark.

    Raises:
        ValueError: If it is missing or no UTF-8, naming the line.
    """
    content = read_bytes(path)
    try:
        return content.decode("utf8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: expected UTF-8 text, got {_bad_byte(error)}") from error


def read_lines(path: Path) -> Iterator[Record]:
    """Each line of a text that is not blank.

    Raises:
        ValueError: As `read_text`.
    """
    # Not splitlines(): it also splits at U+2028 and its like, which are part of a text.
    lines = enumerate(read_text(path).split("\n"), start=1)
    return (Record(f"{path}:{number}", line.removesuffix("\r")) for number, line in lines if line.strip())


def read_bytes(path: Path) -> bytes:
    """The bytes of a file, without a byte-order mark.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        return path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise ValueError(f"{path}: expected a readable file, got {error.strerror}") from error


def _file_records(path: Path, needed: Sequence[str]) -> Iterator[Record]:
    match path.suffix:
        case ".jsonl":
            return _json_lines(path)
        case ".json":
            return _json_list(path)
        case ".csv":
            return iter(_delimited(path, ",", needed))
        case ".tsv":
            return iter(_delimited(path, "\t", needed))
        case ".parquet":
            return _parquet(path, needed)
        case _ if os.path.isdir(path):  # not Path.is_dir, which raises for what is too long to be a name
            return _saved_dataset(path, needed)
        case _:
            raise ValueError(
                f"source: expected one of {', '.join(SUFFIXES)}, or a folder of Dataset.save_to_disk, got {str(path)!r}"
            )


def check_columns(where: str, columns: Sequence[str], needed: Sequence[str]) -> None:
    """Raise ValueError unless the columns that are needed are there."""
    missing = [name for name in needed if name not in columns]
    if missing:
        raise ValueError(f"columns: expected {missing} in {where}, got {list(columns)}")


def _json_lines(path: Path) -> Iterator[Record]:
    # By lines of bytes, so that one bad byte spoils one row, and U+2028, which JSON strings may hold, ends none.
    for number, line in enumerate(read_bytes(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield Record(where, json.loads(line.decode("utf8")))
        except UnicodeDecodeError as error:
            yield Record(where, problem=f"expected UTF-8 text, got {_bad_byte(error)}")
        except (ValueError, RecursionError) as error:
            yield Record(where, problem=f"expected JSON, got {shown(line.decode('utf8').strip())} ({_reason(error)})")


def _json_list(path: Path) -> Iterator[Record]:
    """One element after the other, because a parsed list has forgotten its lines."""
    text, parse = read_text(path), json.JSONDecoder().raw_decode
    position = _skip_space(text, 0)
    if text[position : position + 1] != "[":
        raise ValueError(f"{path}: expected a list of objects, got {shown(text[position : position + 60])}")
    position = _skip_space(text, position + 1)
    line, counted = 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, end = parse(text, position)
        except (ValueError, RecursionError) as error:
            at = text.count("\n", 0, error.pos) + 1 if isinstance(error, json.JSONDecodeError) else line
            raise ValueError(f"{path}:{at}: expected JSON, got an error ({_reason(error)})") from error
        yield Record(f"{path}:{line}", value)
        position = _skip_space(text, end)
        separator = text[position : position + 1]
        if separator == ",":
            position = _skip_space(text, position + 1)
        elif separator != "]":
            at = text.count("\n", 0, position) + 1
            raise ValueError(f"{path}:{at}: expected ',' or ']', got {shown(separator)}")


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _delimited(path: Path, delimiter: str, needed: Sequence[str]) -> list[Record]:
    # Line by line with their ends, as csv wants it; not splitlines(), which also splits at U+2028 and its like.
    lines = (line + "\n" for line in read_text(path).split("\n"))
    limit = csv.field_size_limit(sys.maxsize)  # a cell may be a whole document; the limit is the process's
    try:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        heading = next((cells for cells in reader if cells), [])
        twice = [name for name, count in Counter(heading).items() if count > 1 and name]  # those without may be many
        if twice:
            raise ValueError(f"columns: expected different names in {path}, got {twice} more than once")
        check_columns(str(path), heading, needed)
        return list(_cells(path, reader, heading))
    except csv.Error as error:
        raise ValueError(f"{path}:1: expected a heading, got an error ({error})") from error
    finally:
        csv.field_size_limit(limit)


def _cells(path: Path, reader: Any, heading: Sequence[str]) -> Iterator[Record]:
    while True:
        where = f"{path}:{reader.line_num + 1}"  # a row's first line: cells may hold line ends
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Record(where, problem=f"expected {len(heading)} cells, got an error ({error})")
            continue
        if len(cells) == len(heading):
            yield Record(where, {name: cell or None for name, cell in zip(heading, cells, strict=True)})
        elif cells:
            yield Record(where, problem=f"expected {len(heading)} cells, got {len(cells)}")


def _parquet(path: Path, needed: Sequence[str]) -> Iterator[Record]:
    with _data_extra(path):
        import pyarrow as arrow
        import pyarrow.parquet as parquet

    try:
        table = parquet.read_table(path)
    except (OSError, arrow.ArrowException) as error:
        raise ValueError(f"{path}: expected a readable parquet file, got {error}") from error
    check_columns(str(path), table.column_names, needed)
    return (Record(f"{path} row {index}", row) for index, row in enumerate(table.to_pylist()))


def _saved_dataset(path: Path, needed: Sequence[str]) -> Iterator[Record]:
    """Rows of a folder that `Dataset.save_to_disk` has written, which stay there until they are asked for."""
    with _data_extra(path):
        from datasets import DatasetDict, load_from_disk

    try:
        data = load_from_disk(str(path))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # its files may hold any JSON
        raise ValueError(f"{path}: expected a folder of Dataset.save_to_disk, got an error ({error})") from error
    if isinstance(data, DatasetDict):
        names = ", ".join(str(path / str(name)) for name in data)
        raise ValueError(f"{path}: expected the folder of one dataset, got that of several; choose among {names}")
    check_columns(str(path), data.column_names, needed)
    return (Record(f"{path} row {index}", row) for index, row in enumerate(data))


@contextmanager
def _data_extra(path: Path) -> Iterator[None]:
    """Imports that come with an extra of this package."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{path}: expected what pip install 'textenv[data]' brings, got an error ({error})") from error


def _reason(error: Exception) -> str:
    """Why JSON does not parse, without the position in what is one line of a file."""
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _bad_byte(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} ({error.reason})"
