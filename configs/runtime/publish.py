"""Atomic writes of one local file or folder.

The content is written under a temporary name in the same folder, flushed to disk and renamed, and
the folder is flushed too. After a kill or a power cut the final name holds either the complete old
content or the complete new one. File systems that cannot flush a folder are used without it.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)

TEMPORARY_PREFIX = ".tmp-"
"""Prefix of unfinished files and folders. Readers skip them, and old ones may be deleted."""

_REPLACED = r"\.old-[0-9]{19}-[0-9a-f]{8}"
"""Suffix of a folder between the two renames that replace it, as a pattern."""

_UNIQUE = r"-.+-[0-9]+-[0-9a-f]{8}"
"""End of a temporary name: host, process and a random number, as a pattern."""

_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF}

_unsynced: set[int] = set()
"""Devices whose folders cannot be flushed, and for which this was logged."""


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
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            # The system reports no file name when a write fails, e.g. on a full disk.
            error.filename = error.filename or str(path)
        raise
    sync_folder(path.parent)


@contextmanager
def publishing_folder(path: Path, *, aside: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder that becomes ``path`` if the block ends without an exception.

    A folder cannot be replaced atomically. The old one is first renamed to a unique name. A kill
    between the two renames leaves it there, where ``current_folder`` finds it.

    Args:
        path: Final name of the folder.
        aside: New name of the old folder, instead of another one of this name; None deletes it.

    Raises:
        OSError: The disk is full or the folder is not writable. ``current_folder`` still finds
            the old version.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _temporary(path), _replaced(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _sync_file(file)
        sync_folder(temporary)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)
    if old.exists():
        if aside is None:
            remove_folder(old)
        else:
            remove_folder(aside)
            old.rename(aside)


def remove_folder(path: Path) -> None:
    """Delete a folder, if it exists, under a name that readers skip.

    On NFS and FUSE a file that a process has open stays in its folder, renamed, so the folder stays
    too. ``path`` is free in any case.

    Raises:
        OSError: The folder that contains ``path`` is not writable.
    """
    if not path.exists():
        return
    temporary = _temporary(path)
    path.rename(temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def current_folder(path: Path) -> Path | None:
    """Return the path of the last complete version of a published folder; None without one."""
    if path.is_dir():
        return path
    replaced = _matching(path.parent, re.escape(path.name) + _REPLACED)
    return replaced[-1] if replaced else None  # the newest: these names begin with the time


def clear_leftovers(folder: Path, names: str) -> None:
    """Delete what killed processes left while they replaced or deleted folders in ``folder``.

    No other process may be working on these.

    Args:
        folder: It may be missing.
        names: Pattern of their names.
    """
    for leftover in _matching(folder, f"{re.escape(TEMPORARY_PREFIX)}({names}){_UNIQUE}"):
        shutil.rmtree(leftover, ignore_errors=True)
    for replaced in _matching(folder, f"({names}){_REPLACED}"):
        if replaced.with_suffix("").is_dir():  # else the newest of these is the current version
            remove_folder(replaced)


def _matching(folder: Path, pattern: str) -> list[Path]:
    """Return the files in ``folder`` with such names, sorted."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [file for file in files if re.fullmatch(pattern, file.name)]


def unused_name(path: Path) -> Path:
    """Return a free name next to ``path``: ``best-1`` for ``best``, ``a-1.json`` for ``a.json``."""
    names = (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def _replaced(path: Path) -> Path:
    return path.with_name(f"{path.name}.old-{time.time_ns()}-{uuid.uuid4().hex[:8]}")


def _temporary(path: Path) -> Path:
    # Host and pid show which process left a temporary file.
    unique = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{unique}")


def _sync_file(path: Path) -> None:
    if path.is_dir():
        sync_folder(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk, where the file system can: CIFS and some FUSE cannot."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
        _log_unsynced(os.fstat(handle).st_dev, folder, str(error.strerror))
    finally:
        os.close(handle)


def _log_unsynced(device: int, folder: Path, reason: str) -> None:
    if device not in _unsynced:
        _unsynced.add(device)
        logger.warning(
            "%s: this file system cannot flush folders (%s); after a power cut the newest files "
            "may be missing there, then rerun the command",
            *(folder, reason),
        )
