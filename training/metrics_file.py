"""``metrics.jsonl``: every metric of a run, each step once, over any number of restarts.

One JSON object a line with ``step``, ``epoch`` and ``kind``. A run that goes on from a checkpoint
drops what a lost attempt wrote beyond it, half lines included, and writes those steps again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from configs.errors import MachineError, StateError
from configs.runtime.publish import publish_bytes

Record = Mapping[str, Any]


class MetricsFile:
    """The record of a run, open for appending."""

    def __init__(self, path: Path, *, from_step: int) -> None:
        """Keep the records up to ``from_step`` and go on behind them."""
        found = read_metrics(path)
        kept = [record for record in found if record["step"] <= from_step]
        self.after_kill = kept if len(kept) < len(found) else []
        """What was kept, where the attempt before was lost with what it wrote beyond it."""
        publish_bytes(path, b"".join(map(_line, kept)))
        self._file = path.open("ab")

    def append(self, kind: str, *, step: int, epoch: int, **values: object) -> None:
        """Write one record at once; ``nan`` and infinities become null.

        Raises:
            MachineError: the disk refuses it.
        """
        try:
            self._file.write(_line({"step": step, "epoch": epoch, "kind": kind, **values}))
            self._file.flush()
        except OSError as error:
            raise MachineError(
                f"{self._file.name}: {error.strerror}; make room and run the same command again"
            ) from error

    def sync(self) -> None:
        """Wait until all records are on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; what a full disk has refused is lost, and was told before."""
        with suppress(OSError):
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the whole records of a run; a last line that was cut by a kill is left out.

    Raises:
        StateError: a line is damaged.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline was never finished
    try:
        return [json.loads(line) for line in lines]
    except ValueError:
        number = next(number for number, line in enumerate(lines, 1) if not _is_json(line))
        raise StateError(
            f"{path}: line {number} is damaged; remove it, its steps stay without a record"
        ) from None


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _line(record: Record) -> bytes:
    return json.dumps(_plain(record), allow_nan=False).encode() + b"\n"


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
