"""Open files of one process: a limited number of handles for any number of files and threads."""

from __future__ import annotations

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from configs.errors import DataError

MAX_OPEN_FILES = 256
"""Files kept open at most; fewer if the process may open fewer than 1,024."""


@dataclass
class OpenFile:
    """A handle and the number of threads that use it."""

    handle: int
    users: int = 0
    dropped: bool = False

    def close_if_unused(self) -> None:
        """Close the handle if no thread uses it, and none will."""
        if self.dropped and self.users == 0:
            os.close(self.handle)


class OpenFiles:
    """Handles of files by name; the least recently used is closed first.

    Users are counted: a handle that one thread evicts stays open until other threads release it.
    A file that is opened again must still have the size and modification time of the first time.

    Args:
        folder: Folder of the names, for messages.
        open_file: Returns a handle for reading, or raises.
    """

    def __init__(self, folder: Path, open_file: Callable[[str], int]) -> None:
        self._folder = folder
        self._open_file, self._limit = open_file, open_limit()
        self._lock = threading.Lock()
        self._files: OrderedDict[str, OpenFile] = OrderedDict()
        self._versions: dict[str, tuple[int, int]] = {}

    def take(self, name: str) -> OpenFile:
        """Return the handle of a file, to be released after use.

        Raises:
            DataError: another file has this name since it was first opened.
        """
        # Not a context manager, which would be slower: this runs once per window.
        with self._lock:
            file = self._files.get(name) or self._open(name)
            self._files.move_to_end(name)
            file.users += 1
            return file

    def release(self, file: OpenFile) -> None:
        """Give a handle back."""
        with self._lock:
            file.users -= 1
            file.close_if_unused()

    def forget(self, name: str) -> None:
        """Close a file, which this process has replaced or deleted."""
        with self._lock:
            self._drop(name)
            self._versions.pop(name, None)

    def close(self) -> None:
        """Close all files; they may be opened again."""
        with self._lock:
            for name in list(self._files):
                self._drop(name)

    def _open(self, name: str) -> OpenFile:
        while len(self._files) >= self._limit:
            self._drop(next(iter(self._files)))
        handle = self._open_file(name)
        status = os.fstat(handle)
        version = (status.st_size, status.st_mtime_ns)
        if self._versions.setdefault(name, version) != version:
            os.close(handle)
            raise DataError(
                f"{self._folder / name}: was replaced while this command reads it; rerun it"
            )
        file = self._files[name] = OpenFile(handle)
        return file

    def _drop(self, name: str) -> None:
        file = self._files.pop(name, None)
        if file is not None:
            file.dropped = True
            file.close_if_unused()


def open_limit() -> int:
    """Return how many files may be kept open, at most a quarter of ``ulimit -n``.

    The rest is for other files, checkpoints, connections and libraries.
    """
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        return MAX_OPEN_FILES
    return max(1, min(MAX_OPEN_FILES, allowed // 4))
