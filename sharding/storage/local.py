"""A dataset in a local folder."""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from configs.errors import MachineError
from configs.runtime.files import open_file, open_regular
from configs.runtime.publish import TEMPORARY_PREFIX, publishing
from sharding.storage.base import Range, checked_name, file_exists, missing_file, short_file
from sharding.storage.open_files import OpenFiles, open_limit
from sharding.storage.page_cache import PageCache
from sharding.storage.space import FreeSpace, disk_space, existing_folder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)
_LEFTOVER = re.compile(re.escape(TEMPORARY_PREFIX) + r".*-(?P<pid>\d+)-[0-9a-f]{8}")
_LEFTOVER_SECONDS = 600.0


class DiskStorage:
    """A dataset in a local folder."""

    near_bytes = 16 * 1024  # reading a few pages costs less than a system call
    ranges_a_call = 4  # fewer cause more thread switches, more balance the threads worse
    readers: int | None = None
    request_bytes: int | None = None

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = OpenFiles(folder, self._open_shard)
        self._page_cache = PageCache(self._open_shard, limit=open_limit() // 2)

    @property
    def location(self) -> str:
        """The folder."""
        return str(self._folder)

    def names(self) -> list[str]:
        """Return the names of all complete files, sorted; none if the folder is missing."""
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
        """Return the size of a file in bytes; None if it does not exist."""
        try:
            return self._path(name).stat().st_size
        except FileNotFoundError:
            return None

    def fingerprint(self, name: str) -> tuple[int, str] | None:
        """Return size and modification time of a file; None if it does not exist."""
        try:
            status = self._path(name).stat()
        except FileNotFoundError:
            return None
        return status.st_size, str(status.st_mtime_ns)

    def read(self, name: str) -> bytes:
        """Return the contents of a file."""
        try:
            with open_file(self._path(name)) as file:
                return file.read()
        except FileNotFoundError:
            raise missing_file(self.location, name) from None

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading and seeking."""
        try:
            return open_file(self._path(name))
        except FileNotFoundError:
            raise missing_file(self.location, name) from None

    def read_into(self, ranges: Sequence[Range], buffers: Sequence[memoryview]) -> None:
        """Fill each buffer from its range; any number of threads may call this."""
        for part, buffer in zip(ranges, buffers, strict=True):
            file = self._files.take(part.name)
            try:
                self._fill(file.handle, part, buffer)
            except OSError as error:
                error.filename = str(self._path(part.name))  # not set by a read by handle
                raise
            finally:
                self._files.release(file)

    def copy_cached(
        self, names: Sequence[str], offsets: Sequence[int], rows: Sequence[NDArray[np.uint8]], /
    ) -> bool:
        """Fill each row if all files are in the page cache; else return False."""
        return self._page_cache.copy(names, offsets, rows)

    def counts(self) -> Mapping[str, int]:
        """Return no counters: each range is one read."""
        return {}

    def publish(self, name: str, data: bytes, *, replace: bool = False) -> None:
        """Write ``data`` to ``name`` atomically."""
        with self.publishing(name, replace=replace) as file:
            file.write(data)

    @contextmanager
    def publishing(self, name: str, *, replace: bool = False) -> Iterator[BinaryIO]:
        """Yield a file to write; it is published if the block ends without an exception."""
        path = self._path(name)
        if not replace and path.exists():
            raise file_exists(self.location, name)
        with publishing(path) as file:
            yield file
        self.forget(name)

    def remove(self, name: str) -> None:
        """Delete a file; do nothing if it does not exist."""
        self._path(name).unlink(missing_ok=True)
        self.forget(name)

    def space(self) -> FreeSpace:
        """Return the space of the file system that contains the folder, or will contain it."""
        return disk_space(existing_folder(self._folder))

    def check_writable(self) -> None:
        """Raise ``MachineError`` if the user has no permission to write to the folder."""
        folder = existing_folder(self._folder)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise MachineError(f"{folder}: not writable; change its permissions, or move data.root")

    def sweep(self) -> None:
        """Delete the unfinished files of killed processes of this host."""
        for path in sorted(self._folder.glob(f"{TEMPORARY_PREFIX}*-{socket.gethostname()}-*")):
            match = _LEFTOVER.fullmatch(path.name)
            if match and path.is_file() and _is_abandoned(path, int(match["pid"])):
                logger.info("removing %s, left by a killed process", path)
                path.unlink(missing_ok=True)

    def forget(self, name: str) -> None:
        """Close a file that was replaced or deleted; the next read opens the new one."""
        self._files.forget(name)
        self._page_cache.forget(name)

    def close(self) -> None:
        """Release open files; the storage may be used again."""
        self._files.close()
        self._page_cache.close()

    def _open_shard(self, name: str) -> int:
        try:
            return open_regular(self._path(name))
        except FileNotFoundError:
            raise missing_file(self.location, name) from None

    def _path(self, name: str) -> Path:
        return self._folder / checked_name(name)

    def _fill(self, handle: int, part: Range, buffer: memoryview) -> None:
        done = os.preadv(handle, [buffer], part.offset)
        if done == buffer.nbytes:  # nearly always
            return
        # One read returns 2 GiB at most, and may be shorter on network file systems.
        view = buffer.cast("B")
        while done < len(view):
            got = os.preadv(handle, [view[done:]], part.offset + done)
            if got == 0:
                raise short_file(self.location, part, done, len(view))
            done += got


def _is_abandoned(path: Path, pid: int) -> bool:
    # A process of another container may have the same host name, so the file must be old too.
    try:
        if time.time() - path.stat().st_mtime < _LEFTOVER_SECONDS:
            return False
        os.kill(pid, 0)
    except (ProcessLookupError, FileNotFoundError):
        return True
    except PermissionError:
        return False
    return False
