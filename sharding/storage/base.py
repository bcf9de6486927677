"""The storage interface, its errors, and a seekable file over byte ranges."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

from configs.errors import DataError
from sharding.storage.space import FreeSpace

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class Range:
    """Where to read; the length is that of the buffer it is read into."""

    name: str
    offset: int


class RangeReader(Protocol):
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


class Storage(RangeReader, Protocol):
    """A flat set of named files."""

    @property
    def location(self) -> str:
        """Folder or URL, for messages."""

    def names(self) -> list[str]:
        """Return the names of all whole files, sorted; none if the folder is missing."""

    def size(self, name: str) -> int | None:
        """Return the bytes of a file; None if there is none."""

    def fingerprint(self, name: str) -> tuple[int, str] | None:
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

    @property
    def request_bytes(self) -> int | None:
        """Longest range that is read in one request; None: any range is one read."""

    def space(self) -> FreeSpace:
        """Return what can still be written; unknown where the storage does not report it."""

    def check_writable(self) -> None:
        """Raise an error where it is known in advance that nothing can be written.

        Raises:
            DataError: the storage is read-only.
            MachineError: the user may not write to the folder.
        """

    def sweep(self) -> None:
        """Delete what processes of this host that were killed have left unfinished."""

    def close(self) -> None:
        """Let go of open files; the storage may be used again."""


class RangedFile(io.RawIOBase):
    """A file of a storage for whoever wants to seek in it; each read is one range."""

    def __init__(self, storage: RangeReader, name: str, size: int) -> None:
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


def is_url(location: str) -> bool:
    """Tell a URL from a folder."""
    return _SCHEME.match(location) is not None


def checked_name(name: str) -> str:
    """Return the name of a file of a set.

    Raises:
        ValueError: it could lead out of the set's folder.
    """
    if not name or "/" in name or "\0" in name or name.startswith("."):
        raise ValueError(f"file of a set: got {name!r}, want a plain name")
    return name


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
