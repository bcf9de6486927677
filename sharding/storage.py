"""The only place that reads or publishes data sets; one interface, several bodies.

A set is a flat folder of files. A file is there whole or not at all, and reading many ranges at
once is what everything fast is made of.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import shutil
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from configs.errors import DataError
from configs.publish import TEMPORARY_PREFIX, publishing
from configs.schema import StorageConfig

logger = logging.getLogger(__name__)

MAX_OPEN_FILES = 256
"""Files that one storage keeps open at most."""

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_LEFTOVER = re.compile(re.escape(TEMPORARY_PREFIX) + r".*-(?P<pid>\d+)-[0-9a-f]{8}")
_LEFTOVER_SECONDS = 600.0


@dataclass(frozen=True)
class Range:
    """Where to read; the length is that of the buffer it is read into."""

    name: str
    offset: int


class Source(Protocol):
    """Where ranges of named files are read: a storage, or a cache that stands before one."""

    @property
    def near_bytes(self) -> int:
        """Bytes between two ranges that cost less to read than one range more."""

    @property
    def ranges_a_call(self) -> int:
        """Ranges that ``read_into`` should get at once, where they are not neighbours."""

    @property
    def readers(self) -> int | None:
        """Threads that should read at once, each in a call of its own; None: a few."""

    def read_into(self, ranges: Sequence[Range], buffers: Sequence[memoryview]) -> None:
        """Fill each buffer from its range; any number of threads may call this.

        Raises:
            DataError: a file is missing, or ends before a range does.
            ValueError: there are not as many buffers as ranges.
        """

    def counts(self) -> Mapping[str, int]:
        """Return what it has counted so far, e.g. ``requests``, ``retries``, ``cache_hits``.

        A disk counts nothing: there each range is one read.
        """


class Storage(Source, Protocol):
    """A flat set of named files."""

    @property
    def location(self) -> str:
        """Folder or URL, for messages."""

    def names(self) -> list[str]:
        """Return the names of all whole files, sorted; none if the folder is missing."""

    def size(self, name: str) -> int | None:
        """Return the bytes of a file; None if there is none."""

    def stamp(self, name: str) -> tuple[int, str] | None:
        """Return size, and what changes with the content; None if there is no such file."""

    def read(self, name: str) -> bytes:
        """Return a whole file.

        Raises:
            DataError: there is none.
        """

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading and seeking.

        Raises:
            DataError: there is none.
        """

    def publish(self, name: str, data: bytes, *, replace: bool = False) -> None:
        """Make ``data`` the content of ``name``, whole or not at all.

        Raises:
            DataError: the file exists, and ``replace`` is off.
        """

    def publishing(self, name: str, *, replace: bool = False) -> AbstractContextManager[BinaryIO]:
        """Give a file to write; it is published when the block ends without an exception."""

    def remove(self, name: str) -> None:
        """Remove a file; nothing happens if there is none."""

    def free_bytes(self) -> int | None:
        """Return how much may still be written; None if nobody knows."""

    def sweep(self) -> None:
        """Delete what processes of this host that were killed have left unfinished."""

    def close(self) -> None:
        """Let go of open files; the storage may be used again."""


class RangedFile(io.RawIOBase):
    """A file of a storage for whoever wants to seek in it; each read is one range."""

    def __init__(self, storage: Source, name: str, size: int) -> None:
        super().__init__()
        self._storage, self._name, self._size, self._at = storage, name, size, 0

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def seekable(self) -> bool:
        """Tell that it can be sought in."""
        return True

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte; return it."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as there are bytes; return how many."""
        view = memoryview(buffer).cast("B")[: max(0, self._size - self._at)]
        if len(view):
            self._storage.read_into([Range(self._name, self._at)], [view])
        self._at += len(view)
        return len(view)


def open_storage(location: str, config: StorageConfig | None = None) -> Storage:
    """Return the storage at a folder or URL; it need not exist yet.

    Args:
        location: A folder, or ``s3://``, ``gs://``, ``az://``; ``http(s)://`` is read-only.
        config: How an object store is reached; a folder needs none.

    Raises:
        ConfigError: a URL of another kind.
    """
    if is_url(location):
        # Not at the top: whoever stays on a disk needs neither its libraries nor their start.
        from sharding.objects import ObjectStorage

        return ObjectStorage(location, config or StorageConfig())
    return DiskStorage(Path(location))


def is_url(location: str) -> bool:
    """Tell a URL from a folder."""
    return _SCHEME.match(location) is not None


class DiskStorage:
    """A folder."""

    near_bytes = 16 * 1024  # a few pages cost less than a call
    ranges_a_call = 4  # fewer cost more hand-overs, more balance threads worse
    readers: int | None = None

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

    def stamp(self, name: str) -> tuple[int, str] | None:
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

    def free_bytes(self) -> int | None:
        """Return the free bytes of the file system that holds the folder, or will hold it."""
        folder = self._folder.absolute()
        there = next(path for path in (folder, *folder.parents) if path.exists())
        return shutil.disk_usage(there).free

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


class MemoryStorage:
    """A dictionary; for tests and for sets that live no longer than the process."""

    near_bytes = DiskStorage.near_bytes
    ranges_a_call = DiskStorage.ranges_a_call
    readers: int | None = None

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self._lock = threading.Lock()

    @property
    def location(self) -> str:
        """A name for messages."""
        return "memory:"

    def names(self) -> list[str]:
        """Return the names of all whole files, sorted."""
        with self._lock:
            return sorted(self.files)

    def size(self, name: str) -> int | None:
        """Return the bytes of a file; None if there is none."""
        data = self.files.get(checked_name(name))
        return None if data is None else len(data)

    def stamp(self, name: str) -> tuple[int, str] | None:
        """Return size and digest of a file; None if there is none."""
        data = self.files.get(checked_name(name))
        return None if data is None else (len(data), hashlib.sha256(data).hexdigest())

    def read(self, name: str) -> bytes:
        """Return a whole file."""
        try:
            return self.files[checked_name(name)]
        except KeyError:
            raise missing_file(self.location, name) from None

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading and seeking."""
        return io.BytesIO(self.read(name))

    def read_into(self, ranges: Sequence[Range], buffers: Sequence[memoryview]) -> None:
        """Fill each buffer from its range; any number of threads may call this."""
        for part, buffer in zip(ranges, buffers, strict=True):
            view = buffer.cast("B")
            data = self.read(part.name)[part.offset : part.offset + len(view)]
            if len(data) != len(view):
                raise short_file(self.location, part, len(data), len(view))
            view[:] = data

    def counts(self) -> Mapping[str, int]:
        """Return nothing: each range is one read."""
        return {}

    def publish(self, name: str, data: bytes, *, replace: bool = False) -> None:
        """Make ``data`` the content of ``name``, whole or not at all."""
        with self._lock:
            if not replace and checked_name(name) in self.files:
                raise file_exists(self.location, name)
            self.files[name] = bytes(data)

    @contextmanager
    def publishing(self, name: str, *, replace: bool = False) -> Iterator[BinaryIO]:
        """Give a file to write; it is published when the block ends without an exception."""
        buffer = io.BytesIO()
        yield buffer
        self.publish(name, buffer.getvalue(), replace=replace)

    def remove(self, name: str) -> None:
        """Remove a file; nothing happens if there is none."""
        with self._lock:
            self.files.pop(checked_name(name), None)

    def free_bytes(self) -> int | None:
        """Return None: nobody knows."""
        return None

    def sweep(self) -> None:
        """Do nothing: a killed process leaves nothing here."""

    def close(self) -> None:
        """Do nothing."""


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


def checked_name(name: str) -> str:
    """Return the name of a file of a set.

    Raises:
        ValueError: it could lead out of the set's folder.
    """
    if not name or "/" in name or "\0" in name or name.startswith("."):
        raise ValueError(f"file of a set: got {name!r}, want a plain name")
    return name


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


def missing_file(location: str, name: str) -> DataError:
    """Say that a file is not there."""
    return DataError(f"{location}: no file {name}; is the set built and sealed, the path right?")


def file_exists(location: str, name: str) -> DataError:
    """Say that a file is there already."""
    return DataError(f"{location}: {name} exists already; say --replace to replace it")


def short_file(location: str, part: Range, got: int, wanted: int) -> DataError:
    """Say that a file ends before a range does."""
    return DataError(
        f"{location}: {part.name}: got {got} bytes at {part.offset}, want {wanted}; "
        "the file is cut, verify the set"
    )
