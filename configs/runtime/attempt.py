"""Records of the attempts at a run: ``attempt-1.json``, ``attempt-2.json`` and so on.

Exit codes do not pass through ``accelerate launch`` (75 becomes 1), so users and sbatch scripts
read from these records whether to rerun a command. Where all ranks end together, rank 0 writes the
record (``Attempt``). Where ranks end independently, each of them may (``TaskAttempt``).
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Literal

from configs.errors import DataError, MachineError
from configs.runtime.publish import publish_bytes

Outcome = Literal["running", "done", "interrupted", "failed"]

_SEVERITY: tuple[Outcome, ...] = ("running", "done", "interrupted", "failed")
"""Outcomes from best to worst."""

_NAME = re.compile(r"attempt-([1-9][0-9]*)\.json")


@dataclass(frozen=True)
class AttemptRecord:
    """Content of one ``attempt-N.json``."""

    attempt: int
    """Number of the attempt, from 1."""

    outcome: Outcome
    """``running`` until the attempt ends. It remains ``running`` after a kill or a power cut:
    check whether ``pid`` is alive on ``host``."""

    step: int | None
    """Completed optimiser steps, or encoded images of the task; None if unknown."""

    message: str
    """Reason for the end, in one line."""

    started: str
    """UTC, ISO 8601, e.g. ``2026-03-01T14:05:09+00:00``."""

    ended: str | None
    """As ``started``; None while the attempt runs."""

    host: str
    """Host name of the process that wrote the record first."""

    pid: int
    """Process id on ``host``."""


class Attempt:
    """One attempt at a run, recorded from its start. It locks the run against other processes."""

    def __init__(self, path: Path, record: AttemptRecord, lock: BinaryIO) -> None:
        self._path = path
        self._lock = lock
        self.record = record

    @property
    def number(self) -> int:
        """N of ``attempt-N.json``."""
        return self.record.attempt

    @classmethod
    def begin(cls, run_dir: Path) -> Attempt:
        """Lock the run and publish ``attempt-N.json`` as running, with the next free N.

        Raises:
            MachineError: Another live process works on this run.
            OSError: The folder is not writable.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = _lock(run_dir)
        record = _new_record(run_dir)
        attempt = cls(_path(run_dir, record.attempt), record, lock)
        attempt._publish()
        return attempt

    def finish(
        self,
        outcome: Literal["done", "interrupted", "failed"],
        step: int | None,
        message: str = "",
    ) -> None:
        """Replace the record atomically by its final form and unlock the run.

        Raises:
            OSError: The folder is not writable. The outcome on disk is still ``running``.
        """
        line = " ".join(message.split())
        self.record = replace(self.record, outcome=outcome, step=step, message=line, ended=_now())
        try:
            self._publish()
        finally:
            self._lock.close()

    def _publish(self) -> None:
        _write(self._path, self.record)


class TaskAttempt:
    """One attempt at a task whose ranks exit independently.

    The record keeps the worst outcome any rank reported. A rank reports ``done`` only if no work is
    left for any rank. So if one rank was killed and the others ended well, the outcome remains
    ``running``: rerun the task. Attempts may run concurrently.
    """

    def __init__(self, task_dir: Path, number: int) -> None:
        self._dir = task_dir
        self.number = number

    @classmethod
    def begin(cls, task_dir: Path) -> TaskAttempt:
        """Publish ``attempt-N.json`` as running, with the next free N. Only rank 0 calls this.

        Raises:
            OSError: The folder is not writable.
        """
        task_dir.mkdir(parents=True, exist_ok=True)
        with _locked(task_dir):
            record = _new_record(task_dir)
            _write(_path(task_dir, record.attempt), record)
        return cls(task_dir, record.attempt)

    def tell(
        self, outcome: Outcome, step: int | None, message: str = "", *, ended: bool = True
    ) -> None:
        """Record an outcome, unless another rank has already reported a worse one.

        Args:
            outcome: Outcome of this rank, or ``done`` for all of them.
            step: Encoded images of the task; None if unknown.
            message: Reason, in one line.
            ended: Whether the attempt ended with this outcome.

        Raises:
            OSError: The folder is not writable. The record is unchanged.
        """
        path = _path(self._dir, self.number)
        with _locked(self._dir):
            record = read_attempt(path)
            if _SEVERITY.index(outcome) < _SEVERITY.index(record.outcome):
                return
            line = " ".join(message.split())
            when = _now() if ended else None
            _write(path, replace(record, outcome=outcome, step=step, message=line, ended=when))


def read_attempt(path: Path) -> AttemptRecord:
    """Read an ``attempt-N.json``.

    Raises:
        DataError: The file is corrupt.
    """
    try:
        return AttemptRecord(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: corrupt ({error}); delete it") from None


def last_attempt(run_dir: Path) -> AttemptRecord | None:
    """Return the newest record of a run or task; None if there is none.

    Raises:
        DataError: The file is corrupt.
    """
    number = _last_number(run_dir) if run_dir.is_dir() else 0
    return read_attempt(_path(run_dir, number)) if number else None


def _path(run_dir: Path, number: int) -> Path:
    return run_dir / f"attempt-{number}.json"


def _new_record(run_dir: Path) -> AttemptRecord:
    return AttemptRecord(
        attempt=_last_number(run_dir) + 1,
        outcome="running",
        step=None,
        message="",
        started=_now(),
        ended=None,
        host=socket.gethostname(),
        pid=os.getpid(),
    )


def _write(path: Path, record: AttemptRecord) -> None:
    text = json.dumps(asdict(record), indent=2, ensure_ascii=False)
    publish_bytes(path, f"{text}\n".encode())


@contextmanager
def _locked(task_dir: Path) -> Iterator[None]:
    """Exclude other ranks while the block runs, where the file system supports locks."""
    with (task_dir / ".lock").open("ab") as file:
        with suppress(OSError):  # no locks: two ranks that end at once may overwrite each other
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lock(run_dir: Path) -> BinaryIO:
    """Lock the run until the file is closed. The system releases it when the process ends."""
    file = (run_dir / ".lock").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        number = _last_number(run_dir)
        raise MachineError(
            f"{run_dir}: another process works on this run, see host and pid in "
            f"attempt-{number}.json; wait until it ends or choose another training.run_name"
        ) from None
    except OSError:  # no locks on this file system: run without protection
        pass
    return file


def _last_number(run_dir: Path) -> int:
    names = (_NAME.fullmatch(path.name) for path in run_dir.iterdir())
    return max((int(name[1]) for name in names if name), default=0)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
