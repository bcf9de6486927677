"""Copies from files that the page cache holds: no system calls, no waiting.

A process that touches a mapped page beyond the end of its file ends by SIGBUS. So a file is mapped
only while this process holds a read lease on it (``F_SETLEASE`` in ``fcntl(2)``): a process that
opens it for writing or truncates it waits in the kernel until the lease is given back, for up to
``lease-break-time`` (45 s). Replacing or deleting a file breaks no lease and harms no mapping.

Leases exist on local file systems, for the owner of a file. All other files are not mapped.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.errors import MovieNetError

Content = NDArray[np.uint8]

TRUST_S = 1.0
"""Seconds between two checks of the leases. A process that writes to a file waits for the next."""

_IDLE_S = 5.0
"""Seconds without a copy after which all files are given back."""

_BREAK_TIME = Path("/proc/sys/fs/lease-break-time")
_MIN_BREAK_S = 10
"""Seconds that the kernel has to wait for a lease; else nothing is mapped."""

_SAMPLES = 16
"""Pages of a file that are looked up in the page cache before it is mapped."""

_MIN_CACHED = 0.85
"""Share of cached pages. A page at which the kernel would read ahead counts as not cached."""


class _Mapped(NamedTuple):
    """A mapped file and the handle that holds its lease."""

    handle: int
    content: Content

    def is_leased(self) -> bool:
        return fcntl.fcntl(self.handle, fcntl.F_GETLEASE) == fcntl.F_RDLCK


class PageCache:
    """The files of a folder that are mapped; any number of threads may copy from them.

    A thread checks the leases as long as files are mapped, also while no thread copies.

    Args:
        open_file: Returns a handle for reading, or raises.
        limit: Maximum number of files, each with two handles; more are not mapped at all.
    """

    def __init__(self, open_file: Callable[[str], int], *, limit: int) -> None:
        self._open_file, self._limit = open_file, limit
        self._files: dict[str, _Mapped] = {}
        self._checked = self._copied = 0.0
        self._users = self._waiting = 0
        self._lock = threading.RLock()
        self._unused = threading.Condition(self._lock)
        self._watcher: threading.Thread | None = None
        self._random = random.Random()  # not the user's: its state is part of their run
        self._process = os.getpid()

    def copy(self, names: Sequence[str], offsets: Sequence[int], rows: Sequence[Content]) -> bool:
        """Fill the rows, or return False: not all of them are in memory.

        Args:
            names: File of each row.
            offsets: First byte of each row.
            rows: uint8; undefined if the result is False.
        """
        if not self._enter():
            return False
        try:
            found = []
            for name, offset, row in zip(names, offsets, rows, strict=True):
                file = self._files.get(name) or self._map(name)
                if file is None:
                    return False
                content = file.content[offset : offset + len(row)]
                if len(content) != len(row):
                    return False  # the error of a read explains it
                found.append(content)
            # A loop of its own: rows displace all other code from the processor's cache.
            for row, content in zip(rows, found, strict=True):
                row[:] = content  # without the interpreter lock
            return True
        finally:
            self._leave()

    def forget(self, name: str) -> None:
        """Give a file back, which this process has replaced or deleted."""
        if name in self._files and not self._is_forked():
            with self._lock:
                self._wait_until_unused()
                self._drop([name])

    def close(self) -> None:
        """Give all files back."""
        if self._is_forked():
            return
        with self._lock:
            self._wait_until_unused()
            self._drop(list(self._files))

    def _is_forked(self) -> bool:
        """Whether this is a child: the lock may be held, and the leases are those of the parent."""
        return os.getpid() != self._process

    def _enter(self) -> bool:
        """Register a copy; return False if there cannot be one."""
        if not self._limit or self._is_forked():
            return False
        now = time.monotonic()
        with self._lock:
            if now > self._checked + TRUST_S:
                self._wait_until_unused()  # copies take milliseconds
                self._check()
            self._users += 1
            self._copied = now
        return True

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._waiting and not self._users:
                self._unused.notify_all()

    def _wait_until_unused(self) -> None:
        """Wait, with the lock, until no thread copies."""
        self._waiting += 1
        self._unused.wait_for(lambda: not self._users)
        self._waiting -= 1

    def _watch(self) -> None:
        while True:
            time.sleep(TRUST_S)  # not on the condition, which every copy notifies
            with self._lock:
                self._wait_until_unused()
                if time.monotonic() > self._copied + _IDLE_S:
                    self._drop(list(self._files))
                self._check()
                if not self._files:
                    self._watcher = None
                    return

    def _check(self) -> None:
        """Drop files whose lease is broken, or all if they have left the page cache."""
        self._checked = time.monotonic()
        self._drop([name for name, file in self._files.items() if not file.is_leased()])
        if self._files and not _is_cached(self._sample()):
            self._drop(list(self._files))

    def _sample(self) -> list[tuple[int, int]]:
        chosen = self._random.choices(list(self._files.values()), k=_SAMPLES)
        return [(file.handle, self._random.randrange(len(file.content))) for file in chosen]

    def _drop(self, names: Iterable[str]) -> None:
        for name in names:
            file = self._files.pop(name, None)
            if file is not None:
                # The mapping has a handle too, so that closing this one would not end the lease.
                fcntl.fcntl(file.handle, fcntl.F_SETLEASE, fcntl.F_UNLCK)
                os.close(file.handle)

    def _map(self, name: str) -> _Mapped | None:
        """Map a file; return None if it is not cached or cannot be leased."""
        with self._lock:
            if name in self._files:
                return self._files[name]
            if len(self._files) >= self._limit or not _waits_for_leases():
                self._limit = 0  # else nearly every batch would need a file that is not mapped
                return None
            try:
                handle = self._open_file(name)
            except (OSError, MovieNetError):
                return None
            file = _mapped(handle)
            if file is None:
                os.close(handle)
                return None
            self._files[name] = file
            if self._watcher is None:
                self._watcher = threading.Thread(
                    target=self._watch, name="page-cache-leases", daemon=True
                )
                self._watcher.start()
            return file


def _waits_for_leases() -> bool:
    try:
        return int(_BREAK_TIME.read_text()) >= _MIN_BREAK_S
    except (OSError, ValueError):
        return False


def _mapped(handle: int) -> _Mapped | None:
    """Lease and map a file if it is cached."""
    size = os.fstat(handle).st_size
    places = range(0, size, max(1, -(-size // _SAMPLES)))
    if not size or not _is_cached([(handle, place) for place in places]):
        return None
    try:
        # A process that breaks the lease causes this signal, which is ignored by default.
        fcntl.fcntl(handle, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError:
        return None
    try:
        mapping = mmap.mmap(handle, 0, prot=mmap.PROT_READ)  # the size cannot change any more
    except (OSError, ValueError):  # too many handles or mappings; or it was cut before the lease
        fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return None
    return _Mapped(handle, np.frombuffer(mapping, np.uint8))


def _is_cached(places: Sequence[tuple[int, int]]) -> bool:
    """Whether nearly all of these bytes, each of a handle and an offset, are in the page cache."""
    cached, byte = 0, bytearray(1)
    for handle, offset in places:
        try:
            cached += os.preadv(handle, [byte], offset, os.RWF_NOWAIT)
        except OSError:  # not cached, or the file system does not support the flag
            continue
    return cached >= _MIN_CACHED * len(places)
