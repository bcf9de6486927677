"""``metrics.jsonl``: all metrics of a run, with each step once, over any number of restarts.

Each line is a JSON object with ``step``, ``epoch`` and ``kind``. A run that resumes from a
checkpoint drops the later records of the failed attempt, truncated lines included, and writes
those steps again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
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
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # after the last newline: empty or truncated
    return [_record(line, f"{path}: line {number}") for number, line in enumerate(lines, 1)]


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
