"""The storage interface, its errors, and a seekable file over byte ranges."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol

from configs.errors import DataError
from sharding.storage.space import FreeSpace

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class Range(NamedTuple):
    """Start of a byte range of a file; its length is that of the buffer to fill."""

    name: str
    offset: int


class RangeReader(Protocol):
    """A reader of byte ranges of named files: a storage, or a cache in front of one."""

    @property
    def near_bytes(self) -> int:
        """Longest gap between two ranges that costs less to read than a second range."""

    @property
    def ranges_a_call(self) -> int:
        """Best number of ranges per call of ``read_into``, if they are not adjacent."""

    @property
    def readers(self) -> int | None:
        """Best number of threads that call ``read_into`` concurrently; None: a few."""

    def read_into(self, ranges: Sequence[Range], buffers: Sequence[memoryview]) -> None:
        """Fill each buffer from its range; any number of threads may call this.

        Raises:
            DataError: a file is missing, or ends before a range does.
            ValueError: the numbers of ranges and buffers differ.
        """

    def copy_cached(
        self, names: Sequence[str], offsets: Sequence[int], rows: Sequence[NDArray[np.uint8]], /
    ) -> bool:
        """Fill each row from its file and offset if all are in memory; else return False at once.

        Any number of threads may call this. After False, the content of the rows is undefined.
        """

    def counts(self) -> Mapping[str, int]:
        """Return the counters so far, e.g. ``requests``, ``retries``, ``cache_hits``.

        They are empty for a local folder, where each range is one read.
        """


class Storage(RangeReader, Protocol):
    """A flat collection of named files."""

    @property
    def location(self) -> str:
        """Folder or URL, for messages."""

    def names(self) -> list[str]:
        """Return the names of all complete files, sorted; none if the folder is missing."""

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes; None if it does not exist."""

    def fingerprint(self, name: str) -> tuple[int, str] | None:
        """Return size and version (an ETag or time); None if the file does not exist."""

    def read(self, name: str) -> bytes:
        """Return the contents of a file.

        Raises:
            DataError: the file does not exist.
        """

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading and seeking.

        Raises:
            DataError: the file does not exist.
        """

    def publish(self, name: str, data: bytes, *, replace: bool = False) -> None:
        """Write ``data`` to ``name`` atomically.

        Raises:
            DataError: the file exists and ``replace`` is False.
        """

    def publishing(self, name: str, *, replace: bool = False) -> AbstractContextManager[BinaryIO]:
        """Yield a file to write; it is published if the block ends without an exception."""

    def remove(self, name: str) -> None:
        """Delete a file; do nothing if it does not exist."""

    @property
    def request_bytes(self) -> int | None:
        """Longest range that one request reads; None: no limit."""

    def space(self) -> FreeSpace:
        """Return the space that is left; unknown if the storage does not report it."""

    def check_writable(self) -> None:
        """Raise an error if it is known in advance that nothing can be written.

        Raises:
            DataError: the storage is read-only.
            MachineError: the user has no permission to write to the folder.
        """

    def sweep(self) -> None:
        """Delete the unfinished files of killed processes of this host."""

    def close(self) -> None:
        """Release open files; the storage may be used again."""


class RangedFile(io.RawIOBase):
    """A seekable file of a storage; each read is one range."""

    def __init__(self, storage: RangeReader, name: str, size: int) -> None:
        super().__init__()
        self._storage, self._name, self._size, self._at = storage, name, size, 0

    def readable(self) -> bool:
        """Return True: this file is readable."""
        return True

    def seekable(self) -> bool:
        """Return True: this file is seekable."""
        return True

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position in bytes; return it."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer up to the end of the file; return the number of bytes."""
        view = memoryview(buffer).cast("B")[: max(0, self._size - self._at)]
        if len(view):
            self._storage.read_into([Range(self._name, self._at)], [view])
        self._at += len(view)
        return len(view)


def is_url(location: str) -> bool:
    """Return whether a location is a URL, not a folder."""
    return _SCHEME.match(location) is not None


def checked_name(name: str) -> str:
    """Return ``name``, checked to be a plain file name.

    Raises:
        ValueError: it could refer to a file outside the dataset's folder.
    """
    if not name or "/" in name or "\0" in name or name.startswith("."):
        raise ValueError(f"file of a dataset: got {name!r}, want a plain name")
    return name


def missing_file(location: str, name: str) -> DataError:
    """Return the error for a missing file."""
    return DataError(
        f"{location}: no file {name}; is the path right, the dataset built and sealed?"
    )


def file_exists(location: str, name: str) -> DataError:
    """Return the error for a file that already exists."""
    return DataError(f"{location}: {name} already exists; pass `--replace` to overwrite it")


def short_file(location: str, part: Range, got: int, expected: int) -> DataError:
    """Return the error for a file that ends before a range does."""
    return DataError(
        f"{location}: {part.name}: got {got} bytes at {part.offset}, want {expected}; "
        "the file is truncated, verify the dataset"
    )
