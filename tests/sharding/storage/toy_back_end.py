"""A storage back end that keeps a dataset in one SQLite file, ``sqlite://FOLDER/NAME``.

A test copies this file into the package as ``sharding/storage/sqlite.py``.
"""

from __future__ import annotations

import hashlib
import io
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from sharding.storage.base import Range, checked_name, file_exists, missing_file, short_file
from sharding.storage.space import FreeSpace


class SqliteStorage:
    """A dataset in one SQLite file; a connection per call, so any thread or process may use it."""

    near_bytes = 16 * 1024
    ranges_a_call = 16
    readers: int | None = None
    request_bytes: int | None = None

    def __init__(self, location: str) -> None:
        self.location = location
        self._file = Path(location.removeprefix("sqlite://")).with_suffix(".db")

    def names(self) -> list[str]:
        return [name for (name,) in self._query("SELECT name FROM files ORDER BY name")]

    def size(self, name: str) -> int | None:
        rows = self._query("SELECT length(data) FROM files WHERE name = ?", checked_name(name))
        return int(rows[0][0]) if rows else None

    def fingerprint(self, name: str) -> tuple[int, str] | None:
        if self.size(name) is None:
            return None
        data = self.read(name)
        return len(data), hashlib.sha256(data).hexdigest()

    def read(self, name: str) -> bytes:
        rows = self._query("SELECT data FROM files WHERE name = ?", checked_name(name))
        if not rows:
            raise missing_file(self.location, name)
        return bytes(rows[0][0])

    def open(self, name: str) -> BinaryIO:
        return io.BytesIO(self.read(name))

    def read_into(self, ranges: Sequence[Range], buffers: Sequence[memoryview]) -> None:
        for part, buffer in zip(ranges, buffers, strict=True):
            view = buffer.cast("B")
            rows = self._query(
                "SELECT substr(data, ?, ?) FROM files WHERE name = ?",
                part.offset + 1,
                len(view),
                checked_name(part.name),
            )
            if not rows:
                raise missing_file(self.location, part.name)
            if len(rows[0][0]) != len(view):
                raise short_file(self.location, part, len(rows[0][0]), len(view))
            view[:] = rows[0][0]

    def copy_cached(
        self, _names: Sequence[str], _offsets: Sequence[int], _rows: Sequence[Any], /
    ) -> bool:
        return False

    def counts(self) -> Mapping[str, int]:
        return {}

    def publish(self, name: str, data: bytes, *, replace: bool = False) -> None:
        verb = "REPLACE" if replace else "INSERT"
        try:
            self._query(f"{verb} INTO files VALUES (?, ?)", checked_name(name), bytes(data))
        except sqlite3.IntegrityError:
            raise file_exists(self.location, name) from None

    @contextmanager
    def publishing(self, name: str, *, replace: bool = False) -> Iterator[BinaryIO]:
        buffer = io.BytesIO()
        yield buffer
        self.publish(name, buffer.getvalue(), replace=replace)

    def remove(self, name: str) -> None:
        self._query("DELETE FROM files WHERE name = ?", checked_name(name))

    def space(self) -> FreeSpace:
        return FreeSpace()

    def check_writable(self) -> None: ...

    def sweep(self) -> None: ...

    def close(self) -> None: ...

    def _query(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self._file, timeout=60)) as database, database:
            database.execute("CREATE TABLE IF NOT EXISTS files (name TEXT PRIMARY KEY, data BLOB)")
            return database.execute(statement, values).fetchall()
