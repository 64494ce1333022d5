"""Rows of data by name, from files or from memory; a bad row is told by file and line."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from textenv.table_files import Record, check_columns, read_records, shown, source_name

T = TypeVar("T")

_SHOWN = 3
"""Bad rows that are told in full."""


@dataclass(frozen=True)
class Reading(Generic[T]):
    """What was made of a source's rows, and what was wrong with the others."""

    source: str
    """Where they come from, as an error shows it."""
    rows: list[T]
    """Of the good ones, in their order."""
    skipped: int = 0
    """How many were bad."""
    problems: tuple[str, ...] = ()
    """Of the first few: where each stands, what was expected and what came."""

    @property
    def counts(self) -> dict[str, Any]:
        """What a summary tells of it: rows read, kept and skipped, and why the first few were skipped."""
        read = len(self.rows) + self.skipped
        return {"read": read, "kept": len(self.rows), "skipped": self.skipped, "problems": list(self.problems)}

    def told(self, tell: Callable[[str], object] | None = None) -> list[T]:
        """The rows, after one line about those that were skipped, if any were.

        Args:
            tell: Takes the line. None: `warnings.warn`, which is seen without any setup of logging and which a program
                can turn into an error; it points at the line that has called the function that calls this.
        """
        if self.skipped:
            line = f"{self.source}: skipped {self.skipped} of {self.counts['read']} rows{self.why}"
            tell(line) if tell is not None else warnings.warn(line, stacklevel=3)
        return self.rows

    @property
    def why(self) -> str:
        """How a line about bad rows goes on; empty if there are none."""
        if not self.skipped:
            return ""
        more = self.skipped - len(self.problems)
        return f"; the first: {'; '.join(self.problems)}" + (f"; and {more} more" if more else "")


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

    A row that does not parse or lacks a required value is counted and skipped, and one line tells how many and what
    was wrong with the first few; None and a missing key lack a value, and in a `.csv` or `.tsv` file an empty cell
    does, too. Values stay what they are in the file, so those of a `.csv` are strings, except where `numbers` asks
    otherwise.

    >>> read_rows([{"prompt": "a", "text": "b"}], ["prompt"], optional=["response"], columns={"response": "text"})
    [{'prompt': 'a', 'response': 'b'}]

    Args:
        source: A `.jsonl`, `.json` (a list of objects), `.csv`, `.tsv` or `.parquet` file, a `datasets.Dataset` or the
            folder that its `save_to_disk` has written, or an iterable of mappings.
        required: Names that each row must have a value for.
        optional: Names that are None in a row without a value.
        columns: Our name → the column's name in the source, where they differ.
        numbers: Names whose values are finite numbers; text is read as one.
        strict: Whether bad rows are an error.
        tell: Takes the line about skipped rows; None: `warnings.warn`.

    Raises:
        ValueError: If the source cannot be read, has no such column (of an optional name: if `columns` has it), or
            leaves no row; with `strict`, if a row is bad.
    """
    names = Names(required, optional, columns or {}, numbers)
    return parse_rows(source, names, lambda row: row, strict=strict).told(tell)


@dataclass(frozen=True)
class Names:
    """What is asked of a row."""

    required: Sequence[str]
    """Each must have a value."""
    optional: Sequence[str] = ()
    """None where there is no value."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Our name → the column's name in the source, where they differ."""
    numbers: Sequence[str] = ()
    """Those that are finite numbers; text is read as one."""

    def __post_init__(self) -> None:
        """Check that nothing is said of other names."""
        names = [*self.required, *self.optional]
        for argument, given in (("columns", self.columns), ("numbers", self.numbers)):
            unknown = [name for name in given if name not in names]
            if unknown:
                raise ValueError(f"{argument}: expected names among {names}, got {unknown}")

    def column(self, name: str) -> str:
        """What one of our names is called in the source."""
        return self.columns.get(name, name)

    @property
    def needed(self) -> list[str]:
        """Columns that a source must have."""
        return [self.column(name) for name in self.required]

    @property
    def renamed(self) -> list[str]:
        """Columns of optional names that are called otherwise: some row must have them, or one is mistyped."""
        return [self.column(name) for name in self.optional if self.column(name) != name]

    def row(self, value: Any) -> dict[str, Any]:
        """The row by our names.

        Raises:
            ValueError: `expected ..., got ...`, if it is a bad one.
        """
        if not isinstance(value, Mapping):
            raise ValueError(f"expected an object with {self.needed}, got {shown(value)}")
        row = {name: value.get(self.column(name)) for name in (*self.required, *self.optional)}
        for name in self.required:
            if row[name] is None:
                raise ValueError(f"expected a value for {self.column(name)!r}, got none")
        for name in self.numbers:
            if row[name] is not None:
                number = as_number(row[name])
                if number is None:
                    raise ValueError(f"expected a finite number for {self.column(name)!r}, got {shown(row[name])}")
                row[name] = number
        return row


def parse_rows(source: Any, names: Names, parse: Callable[[dict[str, Any]], T], *, strict: bool = False) -> Reading[T]:
    """What is made of each row by its names, as `sift` does it.

    Raises:
        ValueError: As `sift`, or if no row has a column of `names.renamed`.
    """
    seen: dict[str, None] = {}

    def parsed(value: Any) -> T:
        seen.update(dict.fromkeys(value if isinstance(value, Mapping) else ()))
        return parse(names.row(value))

    reading = sift(source, read_records(source, names.needed), parsed, strict=strict)
    check_columns(reading.source, list(seen), names.renamed)
    return reading


def sift(source: Any, records: Iterable[Record], parse: Callable[[Any], T], *, strict: bool = False) -> Reading[T]:
    """What is made of each record; bad ones are counted, or an error.

    Args:
        source: Where they come from, as an error shows it.
        records: Rows with their places.
        parse: What becomes of a value; raises `ValueError("expected ..., got ...")` for a bad one.
        strict: Whether bad rows are an error.

    Raises:
        ValueError: If no row is left; with `strict`, if one is bad.
    """
    found: list[T] = []
    problems: list[str] = []
    skipped = 0
    for record in records:
        problem = record.problem
        if problem is None:
            try:
                found.append(parse(record.value))
                continue
            except ValueError as error:
                problem = str(error)
        skipped += 1
        if len(problems) < _SHOWN:
            problems.append(f"{record.where}: {problem}")
    reading = Reading(source_name(source), found, skipped, tuple(problems))
    if not found:
        of = f" of {skipped}" if skipped else ""
        raise ValueError(f"{reading.source}: expected rows, got none{of}{reading.why}")
    if skipped and strict:
        bad = f"{skipped} of {reading.counts['read']} bad"
        raise ValueError(f"{reading.source}: expected good rows, got {bad}{reading.why}")
    return reading


def as_number(value: Any) -> float | None:
    """A finite number, also one that is written as text; None for anything else, truth values among it.

    >>> as_number("1.0"), as_number("one"), as_number(True)
    (1.0, None, None)
    """
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
