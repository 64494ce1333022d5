"""Rows of data by name, from files or from memory; a bad row is told by file and line."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from textenv.table_files import Record, read_records, shown

T = TypeVar("T")


def read_rows(
    source: Any,
    required: Sequence[str],
    *,
    optional: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
    numbers: Sequence[str] = (),
    strict: bool = False,
    tell: Callable[[str], object] | None = None,
) -> list[dict[str, Any]]:
    """Rows with the names that the caller asks for, and no others.

    A row that does not parse or lacks a required value is counted and skipped, and one line tells how many; None and a
    missing key lack a value, and in a `.csv` or `.tsv` file an empty cell does, too. Values stay what they are in the
    file, so those of a `.csv` are strings, except where `numbers` asks otherwise.

    >>> read_rows([{"prompt": "a", "text": "b"}], ["prompt"], optional=["response"], columns={"response": "text"})
    [{'prompt': 'a', 'response': 'b'}]

    Args:
        source: A `.jsonl`, `.json` (a list of objects), `.csv`, `.tsv` or `.parquet` file, a `datasets.Dataset`, or an
            iterable of mappings.
        required: Names that each row must have a value for.
        optional: Names that are None in a row without a value.
        columns: Our name → the column's name in the source, where they differ.
        numbers: Names whose values are finite numbers; text is read as one.
        strict: Whether the first bad row is an error.
        tell: Takes the line about skipped rows. None: `warnings.warn`, which is seen without any setup of logging and
            which a program can turn into an error.

    Raises:
        ValueError: If the source cannot be read, has no such column, or leaves no row; with `strict`, at a bad row.
    """
    names = [*required, *optional]
    keys = _keys(names, columns or {}, numbers)
    needed = {name: keys[name] for name in required}
    records = read_records(source, list(needed.values()))
    return good_rows(source, records, lambda value: _row(value, keys, needed, numbers), strict=strict, tell=tell)


def good_rows(
    source: Any,
    records: Iterable[Record],
    parse: Callable[[Any], T],
    *,
    strict: bool = False,
    tell: Callable[[str], object] | None = None,
) -> list[T]:
    """What is made of each record; bad ones are counted and told, or an error.

    Args:
        source: Where they come from, as an error shows it.
        records: Rows with their places.
        parse: What becomes of a value; raises `ValueError("expected ..., got ...")` for a bad one.
        strict: As in `read_rows`.
        tell: As in `read_rows`.

    Raises:
        ValueError: If no row is left; with `strict`, at a bad row.
    """
    found, bad = [], []
    name = str(source) if isinstance(source, str | Path) else shown(source)
    for record in records:
        problem = record.problem
        if problem is None:
            try:
                found.append(parse(record.value))
                continue
            except ValueError as error:
                problem = str(error)
        bad.append(f"{record.where}: {problem}")
        if strict:
            raise ValueError(bad[0])
    if not found:
        raise ValueError(f"{name}: expected rows, got none" + (f" of {len(bad)}: {bad[0]}" if bad else ""))
    if bad:
        line = f"{name}: skipped {len(bad)} of {len(bad) + len(found)} rows; the first: {bad[0]}"
        tell(line) if tell is not None else warnings.warn(line, stacklevel=3)
    return found


def _keys(names: Sequence[str], columns: Mapping[str, str], numbers: Sequence[str]) -> dict[str, str]:
    for argument, given in (("columns", columns), ("numbers", numbers)):
        unknown = [name for name in given if name not in names]
        if unknown:
            raise ValueError(f"{argument}: expected names among {list(names)}, got {unknown}")
    return {name: columns.get(name, name) for name in names}


def _row(value: Any, keys: Mapping[str, str], needed: Mapping[str, str], numbers: Sequence[str]) -> dict[str, Any]:
    """The row by our names."""
    if not isinstance(value, Mapping):
        raise ValueError(f"expected an object with {list(needed.values())}, got {shown(value)}")
    row = {name: value.get(key) for name, key in keys.items()}
    for name, key in needed.items():
        if row[name] is None:
            raise ValueError(f"expected a value for {key!r}, got none")
    for name in numbers:
        if row[name] is not None:
            number = _number(row[name])
            if number is None:
                raise ValueError(f"expected a finite number for {keys[name]!r}, got {shown(row[name])}")
            row[name] = number
    return row


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
