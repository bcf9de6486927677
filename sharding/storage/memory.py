"""A dataset in memory."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

from sharding.storage.base import Range, checked_name, file_exists, missing_file, short_file
from sharding.storage.local import DiskStorage
from sharding.storage.space import FreeSpace

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class MemoryStorage:
    """A dataset in a dictionary: for tests, and for datasets that only this process needs."""

    near_bytes = DiskStorage.near_bytes
    ranges_a_call = DiskStorage.ranges_a_call
    readers: int | None = None
    request_bytes: int | None = None

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self._lock = threading.Lock()

    @property
    def location(self) -> str:
        """A name for messages."""
        return "memory:"

    def names(self) -> list[str]:
        """Return the names of all files, sorted."""
        with self._lock:
            return sorted(self.files)

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes; None if it does not exist."""
        data = self.files.get(checked_name(name))
        return None if data is None else len(data)

    def fingerprint(self, name: str) -> tuple[int, str] | None:
        """Return size and digest of a file; None if it does not exist."""
        data = self.files.get(checked_name(name))
        return None if data is None else (len(data), hashlib.sha256(data).hexdigest())

    def read(self, name: str) -> bytes:
        """Return the contents of a file."""
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

    def copy_cached(
        self, _names: Sequence[str], _offsets: Sequence[int], _rows: Sequence[NDArray[np.uint8]], /
    ) -> bool:
        """Return False: a dictionary is read like a disk."""
        return False

    def counts(self) -> Mapping[str, int]:
        """Return no counters: each range is one read."""
        return {}

    def publish(self, name: str, data: bytes, *, replace: bool = False) -> None:
        """Write ``data`` to ``name`` atomically."""
        with self._lock:
            if not replace and checked_name(name) in self.files:
                raise file_exists(self.location, name)
            self.files[name] = bytes(data)

    @contextmanager
    def publishing(self, name: str, *, replace: bool = False) -> Iterator[BinaryIO]:
        """Yield a file to write; it is published if the block ends without an exception."""
        buffer = io.BytesIO()
        yield buffer
        self.publish(name, buffer.getvalue(), replace=replace)

    def remove(self, name: str) -> None:
        """Delete a file; do nothing if it does not exist."""
        with self._lock:
            self.files.pop(checked_name(name), None)

    def space(self) -> FreeSpace:
        """Return unknown space."""
        return FreeSpace()

    def check_writable(self) -> None:
        """Do nothing: a dictionary is always writable."""

    def sweep(self) -> None:
        """Do nothing: memory ends with the process."""

    def close(self) -> None:
        """Do nothing: there are no open files."""
