"""A dataset in a local folder."""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from configs.errors import MachineError
from configs.runtime.publish import TEMPORARY_PREFIX, publishing
from sharding.storage.base import Range, checked_name, file_exists, missing_file, short_file
from sharding.storage.space import FreeSpace, disk_space, existing_folder

logger = logging.getLogger(__name__)
MAX_OPEN_FILES = 256
"""Files that one storage keeps open at most."""
_LEFTOVER = re.compile(re.escape(TEMPORARY_PREFIX) + r".*-(?P<pid>\d+)-[0-9a-f]{8}")
_LEFTOVER_SECONDS = 600.0


class DiskStorage:
    """A folder."""

    near_bytes = 16 * 1024  # a few pages cost less than a call
    ranges_a_call = 4  # fewer cost more hand-overs, more balance threads worse
    readers: int | None = None
    request_bytes: int | None = None

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = _OpenFiles(folder, MAX_OPEN_FILES)

    @property
    def location(self) -> str:
        """The folder."""
        return str(self._folder)

    def names(self) -> list[str]:
        """Return the names of all whole files, sorted; none if the folder is missing."""
        try:
            with os.scandir(self._folder) as entries:
                return sorted(
                    entry.name
                    for entry in entries
                    if entry.is_file() and not entry.name.startswith(TEMPORARY_PREFIX)
                )
        except FileNotFoundError:
            return []

    def size(self, name: str) -> int | None:
        """Return the bytes of a file; None if there is none."""
        try:
            return self._path(name).stat().st_size
        except FileNotFoundError:
            return None

    def fingerprint(self, name: str) -> tuple[int, str] | None:
        """Return size and time of change of a file; None if there is none."""
        try:
            status = self._path(name).stat()
        except FileNotFoundError:
            return None
        return status.st_size, str(status.st_mtime_ns)

    def read(self, name: str) -> bytes:
        """Return a whole file."""
        try:
            return self._path(name).read_bytes()
        except FileNotFoundError:
            raise missing_file(self.location, name) from None

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading and seeking."""
        try:
            return self._path(name).open("rb")
        except FileNotFoundError:
            raise missing_file(self.location, name) from None

    def read_into(self, ranges: Sequence[Range], buffers: Sequence[memoryview]) -> None:
        """Fill each buffer from its range; any number of threads may call this."""
        for part, buffer in zip(ranges, buffers, strict=True):
            file = self._files.take(part.name)
            try:
                self._fill(file.handle, part, buffer)
            except OSError as error:
                error.filename = str(self._path(part.name))  # a read by handle tells none
                raise
            finally:
                self._files.release(file)

    def counts(self) -> Mapping[str, int]:
        """Return nothing: each range is one read."""
        return {}

    def publish(self, name: str, data: bytes, *, replace: bool = False) -> None:
        """Make ``data`` the content of ``name``, whole or not at all."""
        with self.publishing(name, replace=replace) as file:
            file.write(data)

    @contextmanager
    def publishing(self, name: str, *, replace: bool = False) -> Iterator[BinaryIO]:
        """Give a file to write; it is published when the block ends without an exception."""
        path = self._path(name)
        if not replace and path.exists():
            raise file_exists(self.location, name)
        try:
            with publishing(path) as file:
                yield file
        except OSError as error:
            # The system tells no name when a write fails, e.g. on a full disk.
            error.filename = error.filename or str(path)
            raise
        self._files.forget(name)

    def remove(self, name: str) -> None:
        """Remove a file; nothing happens if there is none."""
        self._path(name).unlink(missing_ok=True)
        self._files.forget(name)

    def space(self) -> FreeSpace:
        """Return the space of the file system that contains the folder, or will contain it."""
        return disk_space(existing_folder(self._folder))

    def check_writable(self) -> None:
        """Raise ``MachineError`` if the user may not write to the folder."""
        folder = existing_folder(self._folder)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise MachineError(
                f"{folder}: may not be written; change its rights, or set data.root elsewhere"
            )

    def sweep(self) -> None:
        """Delete what processes of this host that were killed have left unfinished."""
        for path in sorted(self._folder.glob(f"{TEMPORARY_PREFIX}*-{socket.gethostname()}-*")):
            match = _LEFTOVER.fullmatch(path.name)
            if match and path.is_file() and _is_abandoned(path, int(match["pid"])):
                logger.info("removing %s, which a killed process left", path)
                path.unlink(missing_ok=True)

    def forget(self, name: str) -> None:
        """Open a file anew when it is next read: another process has replaced it."""
        self._files.forget(name)

    def close(self) -> None:
        """Let go of open files; the storage may be used again."""
        self._files.close()

    def _path(self, name: str) -> Path:
        return self._folder / checked_name(name)

    def _fill(self, handle: int, part: Range, buffer: memoryview) -> None:
        done = os.preadv(handle, [buffer], part.offset)
        if done == buffer.nbytes:  # nearly always
            return
        view = buffer.cast("B")
        while done < len(view):
            got = os.preadv(handle, [view[done:]], part.offset + done)
            if got == 0:
                raise short_file(self.location, part, done, len(view))
            done += got


class _OpenFiles:
    """Handles of one folder's files, the least recently used closed first.

    A handle is counted while it is used, so no thread loses one that another thread pushes out.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._lock = threading.Lock()
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()

    def take(self, name: str) -> _OpenFile:
        # No context manager: this runs once for each window that is read.
        with self._lock:
            file = self._files.get(name) or self._open(checked_name(name))
            self._files.move_to_end(name)
            file.users += 1
            return file

    def release(self, file: _OpenFile) -> None:
        with self._lock:
            file.users -= 1
            file.close_if_unused()

    def forget(self, name: str) -> None:
        with self._lock:
            self._drop(name)

    def close(self) -> None:
        with self._lock:
            for name in list(self._files):
                self._drop(name)

    def _open(self, name: str) -> _OpenFile:
        while len(self._files) >= self._limit:
            self._drop(next(iter(self._files)))
        try:
            handle = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise missing_file(str(self._folder), name) from None
        file = self._files[name] = _OpenFile(handle)
        return file

    def _drop(self, name: str) -> None:
        file = self._files.pop(name, None)
        if file is not None:
            file.dropped = True
            file.close_if_unused()


@dataclass
class _OpenFile:
    handle: int
    users: int = 0
    dropped: bool = False

    def close_if_unused(self) -> None:
        if self.dropped and self.users == 0:
            os.close(self.handle)


def _is_abandoned(path: Path, pid: int) -> bool:
    # A process of another container may carry the same host name: so it must be old as well.
    try:
        if time.time() - path.stat().st_mtime < _LEFTOVER_SECONDS:
            return False
        os.kill(pid, 0)
    except (ProcessLookupError, FileNotFoundError):
        return True
    except PermissionError:
        return False
    return False
