"""One local file or folder, whole or absent.

Written under a temporary name in the same folder, flushed to disk, renamed, and the folder flushed
as well: after a kill or a power cut the final name holds the old content or the new one, never
half of either.
"""

from __future__ import annotations

import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TEMPORARY_PREFIX = ".tmp-"
"""What unfinished files and folders begin with; readers skip them, anyone may delete old ones."""


def publish_bytes(path: Path, data: bytes) -> None:
    """Make ``data`` the content of ``path``, replacing what was there.

    Raises:
        OSError: the disk is full, or the folder may not be written; ``path`` is as it was.
    """
    with publishing(path) as file:
        file.write(data)


@contextmanager
def publishing(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write; it becomes ``path`` when the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextmanager
def publishing_folder(path: Path, *, aside: Path | None = None) -> Iterator[Path]:
    """Give an empty folder to fill; it becomes ``path`` when the block ends without an exception.

    Folders cannot be replaced in one step. So the old one steps aside first, and between the two
    renames a kill leaves it under ``PATH.old``: readers use ``current_folder`` to find it.

    Args:
        path: The folder's final name.
        aside: What the old one is called from then on; None deletes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _temporary(path), _old(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _sync_file(file)
        _sync_folder(temporary)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(path.parent)
    if aside is not None and old.exists():
        shutil.rmtree(aside, ignore_errors=True)
        old.rename(aside)
    shutil.rmtree(old, ignore_errors=True)


def current_folder(path: Path) -> Path | None:
    """Return where the last whole version of a published folder lies; None if there is none."""
    return next((folder for folder in (path, _old(path)) if folder.is_dir()), None)


def _old(path: Path) -> Path:
    return path.with_name(path.name + ".old")


def _temporary(path: Path) -> Path:
    # Host and pid tell a reader of the folder whose leftover it is.
    unique = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{unique}")


def _sync_file(path: Path) -> None:
    if path.is_dir():
        _sync_folder(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
