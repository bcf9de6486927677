"""``metrics.jsonl``: all metrics of a run, with each step once, over any number of restarts.

Each line is a JSON object with ``step``, ``epoch`` and ``kind``. A run that resumes from a
checkpoint drops the later records of the failed attempt, truncated lines included, and writes
those steps again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from configs.corrupt import report_corrupt
from configs.errors import MachineError, StateError
from configs.runtime.publish import publish_bytes

Record = Mapping[str, Any]


class MetricsFile:
    """The metrics file of a run, open for appending."""

    def __init__(self, path: Path, *, from_step: int) -> None:
        """Drop the records after ``from_step`` and open the file for appending."""
        existing = read_metrics(path)
        self.retained = [record for record in existing if record["step"] <= from_step]
        """The records of earlier attempts."""
        # Replaced atomically: a kill during this rewrite loses no record.
        publish_bytes(path, b"".join(map(_line, self.retained)))
        self._file = path.open("ab")

    def append(self, kind: str, *, step: int, epoch: int, **values: object) -> None:
        """Write and flush one record; ``nan`` and infinities become null.

        Raises:
            MachineError: the write failed, for example on a full disk.
        """
        try:
            self._file.write(_line({"step": step, "epoch": epoch, "kind": kind, **values}))
            self._file.flush()
        except OSError as error:
            raise MachineError(
                f"{self._file.name}: {error.strerror}; free disk space and rerun the command"
            ) from error

    def sync(self) -> None:
        """Flush all records to disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # ``append`` has reported the full disk
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the complete records of a run; a last line truncated by a kill is ignored.

    Raises:
        StateError: a line is corrupt.
    """
    return list(iter_metrics(path))


def iter_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records that ``read_metrics`` returns, which may be millions, one at a time."""
    for number, line in _lines(path):
        yield _record(line, f"{path}: line {number}")


def read_progress(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Return the validations of a run and its last record, without parsing the others.

    Raises:
        StateError: one of these lines is corrupt.
    """
    validations: list[dict[str, Any]] = []
    number, last = 0, b""
    for number, last in _lines(path):
        if b'"validation"' in last:
            validations.append(_record(last, f"{path}: line {number}"))
    return validations, _record(last, f"{path}: line {number}") if last else None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the complete lines with their numbers from 1."""
    if not path.exists():
        return
    with path.open("rb") as file:
        yield from ((n, line) for n, line in enumerate(file, 1) if line.endswith(b"\n"))


def _record(line: bytes, where: str) -> dict[str, Any]:
    with report_corrupt(where, "delete this line, its metrics are lost", StateError):
        record: dict[str, Any] = json.loads(line)
        place = record["step"], record["epoch"], record["kind"]
        if tuple(map(type, place)) != (int, int, str):
            raise ValueError(f"got step, epoch and kind {place}")
        return record


def _line(record: Record) -> bytes:
    return json.dumps(_plain(record), allow_nan=False).encode() + b"\n"


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
