"""What became of each attempt at a run: ``attempt-1.json``, ``attempt-2.json`` and so on.

Exit codes do not cross ``accelerate launch`` (75 becomes 1), so whoever started a run, a person or
an sbatch script, reads here whether to start it again. One process per run writes it: rank 0.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Literal

from configs.errors import MachineError
from configs.publish import publish_bytes

Outcome = Literal["running", "done", "interrupted", "failed"]

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
    """Optimiser steps done when it ended; None where there are none to count."""

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
        number = _last_number(run_dir) + 1
        record = AttemptRecord(
            attempt=number,
            outcome="running",
            step=None,
            message="",
            started=_now(),
            ended=None,
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        attempt = cls(run_dir / f"attempt-{number}.json", record, lock)
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
        text = json.dumps(asdict(self.record), indent=2, ensure_ascii=False)
        publish_bytes(self._path, f"{text}\n".encode())


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
            f"attempt-{number}.json; wait for its end or choose another training.run"
        ) from None
    except OSError:  # a file system without locks: then nobody is warned
        pass
    return file


def _last_number(run_dir: Path) -> int:
    names = (_NAME.fullmatch(path.name) for path in run_dir.iterdir())
    return max((int(name[1]) for name in names if name), default=0)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
