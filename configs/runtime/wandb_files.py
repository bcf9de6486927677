"""Files that wandb writes for a run: one ``.wandb`` file per attempt, and what it contains."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

_RUN_FOLDER = re.compile(r"(?:offline-)?run-(?P<started>\d{8}_\d{6})-(?P<id>[^-]+)(-\d+)?")
_BLOCK = 32768
_TAIL_BLOCKS = 64
"""Blocks at the end of a file in which its last step is searched: 2 MiB."""
_FULL, _FIRST, _LAST = 1, 2, 4
"""Kinds of chunks: a complete record, or the first or last chunk of one."""


def offline_segments(run_dir: Path) -> tuple[Path, ...]:
    """Return the ``.wandb`` files of offline attempts of a run, oldest first."""
    return tuple(path for path in _segments(run_dir) if _is_offline(path))


def segments_to_sync(run_dir: Path, *, active: bool) -> tuple[Path, ...]:
    """Return the ``.wandb`` files of a run that the server needs, oldest first.

    These are the offline ones, and the newest one if the server did not confirm its end. A later
    attempt has sent again what an earlier online one lost, and an active one sends by itself.
    """
    segments = _segments(run_dir)
    return tuple(p for p in segments if _is_offline(p) or (p == segments[-1] and not active))


def last_run_id(run_dir: Path) -> str | None:
    """Return the id of the newest tracked attempt, online or offline; None without one."""
    attempts = [
        (match["started"], match["id"])
        for path in (run_dir / "wandb").glob("*run-*")
        if (match := _RUN_FOLDER.fullmatch(path.name))
    ]
    return max(attempts)[1] if attempts else None


def is_synced(segment: Path) -> bool:
    """Return whether a segment is marked as uploaded, by wandb or by ``mark_synced``."""
    return _marker(segment).exists()


def mark_synced(segment: Path) -> None:
    """Mark a segment as uploaded, like `wandb sync`."""
    with suppress(OSError):  # it would be uploaded again
        _marker(segment).touch()


def ended_twice(segment: Path) -> bool:
    """Return whether wandb's service was ended before the server confirmed the run's own end.

    It then writes a second end. `wandb sync` uploads such a file and reports `No response`.
    """
    with suppress(Exception):  # not readable, or a format of another version of wandb
        return len([r for r in _last_records(segment) if r.HasField("exit")]) > 1
    return False


def next_step(run_dir: Path, *, uploaded: bool = False) -> int | None:
    """Return the step after the last one in the files of a run that are or will be uploaded.

    With ``uploaded`` only files count whose upload a server has confirmed. None if the files were
    deleted. wandb writes a step when the next one begins, so the last one is complete.
    """
    if not _segments(run_dir):
        return None
    offline = [path for path in _segments(run_dir) if _is_offline(path) and not uploaded]
    stored = [*offline, *(path for path in _segments(run_dir) if is_synced(path))]
    steps = [step for path in stored if (step := _last_step(path)) is not None]
    return max(steps) + 1 if steps else 0


def _is_offline(segment: Path) -> bool:
    return segment.parent.name.startswith("offline-")


def _segments(run_dir: Path) -> list[Path]:
    def started(path: Path) -> str:
        match = _RUN_FOLDER.fullmatch(path.parent.name)
        return match["started"] if match else ""

    found = (run_dir / "wandb").glob("*run-*/*.wandb")
    return sorted((path for path in found if started(path)), key=lambda p: (started(p), p))


def _marker(segment: Path) -> Path:
    return segment.with_name(f"{segment.name}.synced")


def _last_step(segment: Path) -> int | None:
    """Return the last step in a file; None if its end contains none or is not readable."""
    step = None
    with suppress(Exception):  # not readable, or a format of another version of wandb
        for record in _last_records(segment):
            if record.HasField("history"):
                step = int(record.history.step.num)
    return step


def _last_records(segment: Path) -> Iterator[Any]:
    """Yield the records at the end of a file, which has the format of LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    first_block = max(0, segment.stat().st_size // _BLOCK - _TAIL_BLOCKS)
    with segment.open("rb") as file:
        file.seek(first_block * _BLOCK)
        data = file.read()
    at, record = (0 if first_block else 7), None
    while at + 7 <= len(data):
        rest = _BLOCK - at % _BLOCK
        if rest < 7:
            at += rest
            continue
        size, kind = struct.unpack("<4xHB", data[at : at + 7])
        chunk = data[at + 7 : at + 7 + size]
        at += 7 + size
        if at > len(data):  # torn by a kill
            return
        # The tail may begin within a record, whose chunks are skipped.
        record = chunk if kind in (_FULL, _FIRST) else record and record + chunk
        if kind in (_FULL, _LAST) and record:
            yield Record.FromString(record)
