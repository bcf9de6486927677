"""What became of each attempt at a run: ``attempt-1.json``, ``attempt-2.json`` and so on.

Exit codes do not cross ``accelerate launch`` (75 becomes 1), so whoever started a run, a person or
an sbatch script, reads here whether to start it again. Rank 0 writes it where the ranks end
together (``Attempt``); where each ends on its own, all may (``TaskAttempt``).
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

_BADNESS: tuple[Outcome, ...] = ("running", "done", "interrupted", "failed")

_NAME = re.compile(r"attempt-([1-9][0-9]*)\.json")


@dataclass(frozen=True)
class AttemptRecord:
    """Content of one ``attempt-N.json``."""

    attempt: int
    """N, from 1."""

    outcome: Outcome
    """``running`` until the end is known. It stays so after a kill or a power cut: look at
    ``host`` and ``pid``."""

    step: int | None
    """Optimiser steps done when it ended, of encoding images of the share; None if not known."""

    message: str
    """One line: why it ended."""

    started: str
    """UTC, ISO 8601, whole seconds."""

    ended: str | None
    """UTC, ISO 8601, whole seconds; None while it runs."""

    host: str
    pid: int


class Attempt:
    """One attempt at a run, on record from its first moment; no other lives beside it."""

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
        """Publish ``attempt-N.json`` as running, N one above the highest there.

        Raises:
            MachineError: another live process works on this run.
            OSError: the folder cannot be written.
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
        """Replace the record by its final form, in one step.

        Raises:
            OSError: the folder cannot be written; the record still says ``running``.
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
    """One attempt at a task whose ranks end each on its own: the worst end that one tells stands.

    ``done`` is told by whoever finds that nothing is left to do for any rank. So where one rank was
    killed and the others ended well, the record stays ``running``: start the task again. Several
    attempts may live at once.
    """

    def __init__(self, task_dir: Path, number: int) -> None:
        self._dir = task_dir
        self.number = number

    @classmethod
    def begin(cls, task_dir: Path) -> TaskAttempt:
        """Publish ``attempt-N.json`` as running, N one above the highest there; rank 0 does.

        Raises:
            OSError: the folder cannot be written.
        """
        task_dir.mkdir(parents=True, exist_ok=True)
        with _locked(task_dir):
            record = _new_record(task_dir)
            _write(_path(task_dir, record.attempt), record)
        return cls(task_dir, record.attempt)

    def tell(
        self, outcome: Outcome, step: int | None, message: str = "", *, ended: bool = True
    ) -> None:
        """Say how it stands; what is less bad than what another rank said before is not written.

        Raises:
            OSError: the folder cannot be written; the record stays as it was.
        """
        path = _path(self._dir, self.number)
        with _locked(self._dir):
            said = read_attempt(path)
            if _BADNESS.index(outcome) < _BADNESS.index(said.outcome):
                return
            line = " ".join(message.split())
            when = _now() if ended else None
            _write(path, replace(said, outcome=outcome, step=step, message=line, ended=when))


def read_attempt(path: Path) -> AttemptRecord:
    """Read an ``attempt-N.json``.

    Raises:
        DataError: it is damaged.
    """
    try:
        return AttemptRecord(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error}); delete it") from None


def last_attempt(run_dir: Path) -> AttemptRecord | None:
    """Return the newest record of a run or task; None if there is none.

    Raises:
        DataError: it is damaged.
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
    """Keep other ranks out for a moment; on a file system without locks, nobody."""
    with (task_dir / ".lock").open("ab") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lock(run_dir: Path) -> BinaryIO:
    """Hold the run until the file is closed; the system lets go of it when the process ends."""
    file = (run_dir / ".lock").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        number = _last_number(run_dir)
        raise MachineError(
            f"{run_dir}: another process works on this run, see host and pid in "
            f"attempt-{number}.json; wait for its end or choose another training.run_name"
        ) from None
    except OSError:  # a file system without locks: then nobody is warned
        pass
    return file


def _last_number(run_dir: Path) -> int:
    names = (_NAME.fullmatch(path.name) for path in run_dir.iterdir())
    return max((int(name[1]) for name in names if name), default=0)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
