"""Scores that are known already, in memory or in a file."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class ScoreCache(Protocol):
    """Keeps scores by key. What is kept is never replaced: whoever comes first decides."""

    def get(self, keys: Iterable[bytes]) -> dict[bytes, float]:
        """Those of the keys that are known."""
        ...

    def put(self, scores: Mapping[bytes, float]) -> dict[bytes, float]:
        """Keep these, and return what is known of their keys now."""
        ...


class MemoryCache:
    """In this process; beyond `size` scores the oldest go."""

    def __init__(self, size: int) -> None:
        """Begin with none.

        Args:
            size: Most scores kept.
        """
        self.size = size
        self._scores: dict[bytes, float] = {}

    def get(self, keys: Iterable[bytes]) -> dict[bytes, float]:
        """See `ScoreCache`."""
        return {key: self._scores[key] for key in keys if key in self._scores}

    def put(self, scores: Mapping[bytes, float]) -> dict[bytes, float]:
        """See `ScoreCache`."""
        kept = {key: self._scores.setdefault(key, score) for key, score in scores.items()}
        while len(self._scores) > self.size:
            del self._scores[next(iter(self._scores))]
        return kept


@dataclass(frozen=True)
class DiskCache:
    """In an SQLite file, which survives the process and may be shared by several.

    SQLite comes with Python, and a row is 32 bytes and a number: there is nothing to unpickle. The file is opened for
    each use, so that no connection is carried into a fork.
    """

    path: Path
    """The file, made if it is not there; its scores are never deleted."""

    def __post_init__(self) -> None:
        """Make the file, or see that it is one of these."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._open() as database:
                database.execute("CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, score REAL NOT NULL)")
                database.execute("SELECT key, score FROM scores LIMIT 1")
        except (sqlite3.Error, OSError) as error:
            raise ValueError(f"cache_path: expected a file of scores, got {str(self.path)!r} ({error})") from error

    def get(self, keys: Iterable[bytes]) -> dict[bytes, float]:
        """See `ScoreCache`."""
        with self._open() as database:
            return _select(database, keys)

    def put(self, scores: Mapping[bytes, float]) -> dict[bytes, float]:
        """See `ScoreCache`."""
        with self._open() as database:
            database.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?)", scores.items())
            return _select(database, scores)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        # Another process may be writing: 60 s are more than it takes.
        with closing(sqlite3.connect(self.path, timeout=60.0)) as database, database:
            yield database


def _select(database: sqlite3.Connection, keys: Iterable[bytes]) -> dict[bytes, float]:
    found = {key: database.execute("SELECT score FROM scores WHERE key = ?", (key,)).fetchone() for key in keys}
    return {key: row[0] for key, row in found.items() if row is not None}
