"""Atomic writes of one local file or folder.

The content is written under a temporary name in the same folder, flushed to disk and renamed, and
the folder is flushed too. After a kill or a power cut the final name holds either the complete old
content or the complete new one.
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
"""Prefix of unfinished files and folders. Readers skip them, and old ones may be deleted."""


def publish_bytes(path: Path, data: bytes) -> None:
    """Replace the content of ``path`` by ``data``, atomically.

    Raises:
        OSError: The disk is full or the folder is not writable. ``path`` is unchanged.
    """
    with publishing(path) as file:
        file.write(data)


@contextmanager
def publishing(path: Path) -> Iterator[BinaryIO]:
    """Yield a writable file that becomes ``path`` if the block ends without an exception.

    Raises:
        OSError: The disk is full or the folder is not writable. ``path`` is unchanged.
    """
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
    """Yield an empty folder that becomes ``path`` if the block ends without an exception.

    A folder cannot be replaced atomically. The old one is renamed to ``PATH.old`` first. A kill
    between the two renames leaves it under that name, where ``current_folder`` finds it.

    Args:
        path: Final name of the folder.
        aside: New name of the old folder; None deletes it.

    Raises:
        OSError: The disk is full or the folder is not writable. ``current_folder`` still finds
            the old version.
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
    """Return the path of the last complete version of a published folder; None without one."""
    return next((folder for folder in (path, _old(path)) if folder.is_dir()), None)


def _old(path: Path) -> Path:
    return path.with_name(path.name + ".old")


def _temporary(path: Path) -> Path:
    # Host and pid show which process left a temporary file behind.
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
