"""Records of the attempts at a run: ``attempt-1.json``, ``attempt-2.json`` and so on.

Exit codes do not pass through ``accelerate launch`` (75 becomes 1), so users and sbatch scripts
read from these records whether to rerun a command. Where all ranks end together, rank 0 writes the
record (``Attempt``). Where ranks end independently, each of them may (``TaskAttempt``).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from configs.corrupt import report_corrupt
from configs.errors import DataError, Interrupted, MachineError
from configs.one_line import one_line
from configs.runtime.publish import publish_bytes

if TYPE_CHECKING:
    from configs.runtime.signals import StopRequest
    from configs.schema import Config

logger = logging.getLogger(__name__)

Outcome = Literal["running", "done", "interrupted", "failed"]

_SEVERITY: tuple[Outcome, ...] = ("running", "done", "interrupted", "failed")
"""Outcomes from best to worst."""

_LOCK = ".lock"

_NUMBERS = ".numbers.lock"
"""Held while a record gets its number; the run itself may be held by another life."""

_LOOK_S = 0.2
"""Longer than another process needs to look whether a run is locked."""

_NAME = re.compile(r"attempt-([1-9][0-9]*)\.json")
_MARK = re.compile(r"attempt-[1-9][0-9]*\.rank-[0-9]+")


@dataclass(frozen=True)
class AttemptRecord:
    """Content of one ``attempt-N.json``."""

    attempt: int
    """Number of the attempt, from 1."""

    outcome: Outcome
    """``running`` until the attempt ends. It remains ``running`` after a kill or a power cut:
    check whether ``pid`` is alive on ``host``."""

    step: int | None
    """Completed optimiser steps, or encoded images of the task; in sharding the source bytes of the
    task's finished shards. None if unknown."""

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

    token: str | None = None
    """``MOVIENET_LIFE`` of the batch script that started it; None outside one."""

    job: str | None = None
    """Slurm's job, ``123`` or ``123_4``; None outside one."""

    task: str | None = None
    """``I/N`` of an array stage."""

    restarts: int = 0
    """How often Slurm had restarted the job. Repeats after a power cut of the controller."""

    from_step: int | None = None
    """Step at which training started or resumed; None before, and in other stages."""

    link: str | None = None
    """Page of the tracking run; None while there is none."""


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
    def begin(
        cls, run_dir: Path, *, wait_s: float = 0.0, stop: StopRequest | None = None
    ) -> Attempt:
        """Publish ``attempt-N.json`` as running, with the next free N, and lock the run.

        A run that an older life of the same Slurm job still holds is waited for: that life ends
        once it sees the new record. A refused attempt leaves a record too.

        Args:
            run_dir: Folder of the run.
            wait_s: Longest wait for an older life, in seconds.
            stop: Stop request that ends the wait.

        Raises:
            Interrupted: The wait was stopped.
            MachineError: Another live process works on this run.
            OSError: The folder is not writable.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        with _locked(run_dir, _NUMBERS):
            record = _new_record(run_dir)
            _write(_path(run_dir, record.attempt), record)
        lock = _lock(run_dir)
        if lock is None:  # perhaps only read by ``is_active`` at this moment
            time.sleep(_LOOK_S)
            lock = _lock(run_dir)
        deadline = time.monotonic() + wait_s
        while lock is None and _older_life(run_dir, record) and time.monotonic() < deadline:
            if stop and stop.requested:
                message = f"{stop.reason}: stopped while waiting for an older life of this job"
                ended = replace(record, outcome="interrupted", message=message, ended=_now())
                _write(_path(run_dir, record.attempt), ended)
                raise Interrupted(message)
            time.sleep(min(1.0, wait_s))
            lock = _lock(run_dir)
        if lock is None:
            holder = record.attempt - 1
            message = (
                f"{run_dir}: another process works on this run, see host and pid in "
                f"attempt-{holder}.json; wait until it ends or choose another training.run_name"
            )
            ended = replace(record, outcome="failed", message=message, ended=_now())
            _write(_path(run_dir, record.attempt), ended)
            raise MachineError(message)
        return cls(_path(run_dir, record.attempt), record, lock)

    def superseded(self) -> bool:
        """Return whether a newer life of the same Slurm job has begun and waits for this run."""
        mine = self.record
        if mine.job is None:
            return False
        try:
            numbers = range(mine.attempt + 1, _last_number(self._path.parent) + 1)
            return any(_is_other_life(self._path.parent, number, mine) for number in numbers)
        except OSError as error:  # e.g. a stale NFS handle: the next look may succeed
            logger.debug("%s: not read (%s)", self._path.parent, error)
            return False

    def record_start(self, from_step: int, link: str | None = None) -> None:
        """Add where training starts or resumes to the record, and ``link`` if it is known."""
        self.record = replace(self.record, from_step=from_step, link=link)
        self._update()

    def record_link(self, link: str) -> None:
        """Add the page of the tracking run to the record."""
        self.record = replace(self.record, link=link)
        self._update()

    def _update(self) -> None:
        try:
            _write(self._path, self.record)
        except OSError as error:  # repeated by ``finish``
            logger.debug("%s: not updated (%s)", self._path, error)

    def finish(
        self,
        outcome: Literal["done", "interrupted", "failed"],
        step: int | None,
        message: str = "",
    ) -> None:
        """Replace the record atomically by its final form and unlock the run.

        Where that fails, for example on a full disk, a warning is logged and the outcome on disk is
        still ``running``: what ended the attempt is the error to report.
        """
        line = one_line(message)
        self.record = replace(self.record, outcome=outcome, step=step, message=line, ended=_now())
        try:
            _write(self._path, self.record)
        except OSError as error:
            _log_unwritten(self._path, outcome, error)
        finally:
            self._lock.close()


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
    def begin(cls, task_dir: Path, *, task: str | None = None) -> TaskAttempt:
        """Publish ``attempt-N.json`` as running, with the next free N. Only rank 0 calls this.

        Raises:
            OSError: The folder is not writable.
        """
        task_dir.mkdir(parents=True, exist_ok=True)
        with _locked(task_dir):
            for mark in [path for path in task_dir.iterdir() if _MARK.fullmatch(path.name)]:
                mark.unlink(missing_ok=True)
            record = _new_record(task_dir, task)
            _write(_path(task_dir, record.attempt), record)
        return cls(task_dir, record.attempt)

    def rank_ended(self, rank: int) -> None:
        """Mark that a rank has no more shards to encode, whether some of them failed or not."""
        with suppress(OSError):  # then a failed rank waits longer than it must
            (self._dir / f"attempt-{self.number}.rank-{rank}").touch()

    def ranks_ended(self) -> int:
        """Return how many ranks have marked their end."""
        return len(list(self._dir.glob(f"attempt-{self.number}.rank-*")))

    def report(
        self, outcome: Outcome, step: int | None, message: str = "", *, ended: bool = True
    ) -> None:
        """Record an outcome, unless another rank has already reported a worse one.

        Where that fails, for example on a full disk, a warning is logged and the record keeps what
        it contains.

        Args:
            outcome: Outcome of this rank, or ``done`` for all of them.
            step: Encoded images of the task; None if unknown.
            message: Reason, in one line.
            ended: Whether the attempt ended with this outcome.
        """
        path = _path(self._dir, self.number)
        line, when = one_line(message), _now() if ended else None
        try:
            with _locked(self._dir):
                record = read_attempt(path)
                if _SEVERITY.index(outcome) >= _SEVERITY.index(record.outcome):
                    new = replace(record, outcome=outcome, step=step, message=line, ended=when)
                    _write(path, new)
        except (OSError, DataError) as error:
            _log_unwritten(path, outcome, error)


def tasks_dir(config: Config, stage: Literal["shard", "encode"]) -> Path:
    """Return the folder of all tasks that make a frame or feature set."""
    name = f"{config.encoder.name}-encode" if stage == "encode" else "shard"
    return config.run_dir.parent / name


def task_dir(
    config: Config,
    stage: Literal["shard", "encode"],
    task: tuple[int, int],
    only: Sequence[str] = (),
) -> Path:
    """Return where a task keeps its attempts and its wandb run.

    Args:
        config: Of the run.
        stage: The array stage.
        task: ``(i, n)``: the i-th of n tasks, from 0.
        only: Shards that it is limited to; such a task has a folder of its own.
    """
    name = f"task-{task[0]}-of-{task[1]}"
    if only:
        name += f"-only-{hashlib.sha256(' '.join(sorted(only)).encode()).hexdigest()[:8]}"
    return tasks_dir(config, stage) / name


def read_attempt(path: Path) -> AttemptRecord:
    """Read an ``attempt-N.json``.

    Raises:
        DataError: The file is corrupt.
    """
    with report_corrupt(path, "delete it"):
        record = AttemptRecord(**json.loads(path.read_bytes()))
        _SEVERITY.index(record.outcome)  # raises for any other word
        return record


def attempt_numbers(run_dir: Path) -> list[int]:
    """Return the numbers of the recorded attempts in order; none without such a folder."""
    names = (_NAME.fullmatch(path.name) for path in run_dir.iterdir()) if run_dir.is_dir() else ()
    return sorted(int(name[1]) for name in names if name)


def read_attempts(run_dir: Path) -> tuple[AttemptRecord, ...]:
    """Return the records of all attempts at a run or task, oldest first.

    Raises:
        DataError: A file is corrupt.
    """
    return tuple(read_attempt(_path(run_dir, number)) for number in attempt_numbers(run_dir))


def last_attempt(run_dir: Path) -> AttemptRecord | None:
    """Return the newest record of a run or task; None if there is none.

    Raises:
        DataError: The file is corrupt.
    """
    numbers = attempt_numbers(run_dir)
    return read_attempt(_path(run_dir, numbers[-1])) if numbers else None


def _path(run_dir: Path, number: int) -> Path:
    return run_dir / f"attempt-{number}.json"


def _new_record(run_dir: Path, task: str | None = None) -> AttemptRecord:
    return AttemptRecord(
        attempt=_last_number(run_dir) + 1,
        outcome="running",
        step=None,
        message="",
        started=_now(),
        ended=None,
        host=socket.gethostname(),
        pid=os.getpid(),
        token=os.environ.get("MOVIENET_LIFE"),
        job=_slurm_job(),
        task=task,
        restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    )


def _slurm_job() -> str | None:
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{index}" if array and index else os.environ.get("SLURM_JOB_ID")


def _log_unwritten(path: Path, outcome: Outcome, error: Exception) -> None:
    reason = getattr(error, "strerror", None) or error
    logger.warning("%s: not updated to %r (%s), as after a kill", path, outcome, reason)


def _write(path: Path, record: AttemptRecord) -> None:
    text = json.dumps(asdict(record), indent=2, ensure_ascii=False)
    publish_bytes(path, f"{text}\n".encode())


@contextmanager
def _locked(folder: Path, name: str = _LOCK) -> Iterator[None]:
    """Exclude other processes while the block runs, where the file system supports locks."""
    with (folder / name).open("ab") as file:
        with suppress(OSError):  # no locks: two ranks that end at once may overwrite each other
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_active(run_dir: Path) -> bool:
    """Return whether a process works on a run, as far as file locks show.

    The run may belong to another user: its lock is only read.
    """
    if not (run_dir / _LOCK).exists():
        return False
    with (run_dir / _LOCK).open("rb") as file, suppress(OSError):
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _lock(run_dir: Path) -> BinaryIO | None:
    """Lock the run until the file is closed or the process ends; None if another process has it."""
    file = (run_dir / _LOCK).open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError as error:
        logger.warning("%s: no file locks here (%s); start each run once", run_dir, error.strerror)
    return file


def _older_life(run_dir: Path, mine: AttemptRecord) -> bool:
    """Return whether an unfinished record is of the same job, but not of the same life."""
    if mine.job is None:
        return False
    return any(_is_other_life(run_dir, number, mine) for number in range(1, mine.attempt))


def _is_other_life(run_dir: Path, number: int, mine: AttemptRecord) -> bool:
    """Return whether a record is that of another, unfinished life of the same job.

    A corrupt record belongs to none.
    """
    try:
        record = read_attempt(_path(run_dir, number))
    except (DataError, FileNotFoundError):
        return False
    return (record.job, record.outcome) == (mine.job, "running") and record.token != mine.token


def _last_number(run_dir: Path) -> int:
    return max(attempt_numbers(run_dir), default=0)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
