"""Whether a set fits: asked before the first byte is written.

A file system tells its free bytes and files; the kernel tells a user's quota where it keeps one
(ext4, XFS; network file systems keep it on the server, and only say so when it is full).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from configs.errors import MachineError
from configs.units import format_bytes
from sharding import tar
from sharding.forms import PlannedMovie
from sharding.storage import DiskStorage, Storage

_FILES_A_SHARD = 3
_FILES_A_SET = 3
_INDEX_BYTES = 22  # a row of ``FrameIndex``
_SHARD_BYTES = tar.RECORD + 4096  # closing blocks; headers of the index, sidecar
_QUOTACTL_FD = 443  # the number is the same on every architecture
_GET_USER_QUOTA = 0x800007 << 8
_QUOTA_BLOCK = 1024


@dataclass(frozen=True)
class Space:
    """Bytes and files, needed or free; None where nobody knows."""

    n_bytes: int | None = None
    files: int | None = None

    def __str__(self) -> str:
        n_bytes = "unknown" if self.n_bytes is None else format_bytes(self.n_bytes)
        return n_bytes if self.files is None else f"{n_bytes} in {self.files:,} files"


def needed(movies: Iterable[PlannedMovie]) -> Space:
    """Return what the frame shards of these movies take, padding counted on the average."""
    member = tar.BLOCK + tar.BLOCK // 2 + _INDEX_BYTES
    rows = [(movie.n_bytes + member * (movie.images or 0), movie.shard) for movie in movies]
    shards = len({shard for _, shard in rows})
    n_bytes = sum(n_bytes for n_bytes, _ in rows) + _SHARD_BYTES * shards
    return Space(n_bytes, _FILES_A_SHARD * shards + _FILES_A_SET)


def free(storage: Storage) -> Space:
    """Return what the file system of a set, which need not exist yet, can still take."""
    if not isinstance(storage, DiskStorage):
        return Space(storage.free_bytes())
    stat = os.statvfs(_existing(storage))
    # Some file systems (btrfs) make room for files as they come, and tell 0 of 0.
    return Space(storage.free_bytes(), stat.f_favail if stat.f_files else None)


def quota(storage: Storage) -> Space | None:
    """Return what this user's quota leaves on the file system of a set; None without one."""
    if not isinstance(storage, DiskStorage) or sys.platform != "linux":
        return None
    told = _Quota()
    handle = os.open(_existing(storage), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syscall = ctypes.CDLL(None, use_errno=True).syscall
        failed = syscall(_QUOTACTL_FD, handle, _GET_USER_QUOTA, os.getuid(), ctypes.byref(told))
    finally:
        os.close(handle)
    if failed or not (told.hard_blocks or told.hard_files):
        return None
    return Space(
        max(0, told.hard_blocks * _QUOTA_BLOCK - told.n_bytes) if told.hard_blocks else None,
        max(0, told.hard_files - told.files) if told.hard_files else None,
    )


def check_space(storage: Storage, movies: Iterable[PlannedMovie]) -> None:
    """Refuse to begin what cannot end.

    Raises:
        MachineError: the shards of these movies do not fit, or may not be written there.
    """
    want = needed(movies)
    if not want.files or not want.n_bytes:
        return
    _check_permission(storage)
    for got, what in ((free(storage), "free"), (quota(storage), "left of the user's quota")):
        if got and got.n_bytes is not None and got.n_bytes < want.n_bytes:
            short = f"got {format_bytes(got.n_bytes)} {what}, want {format_bytes(want.n_bytes)}"
        elif got and got.files is not None and got.files < want.files:
            short = f"got {got.files} files {what}, want {want.files}"
        else:
            continue
        raise MachineError(
            f"{storage.location}: {short} for the frame shards; free some, set data.root "
            "elsewhere, or try data.limit"
        )


def _check_permission(storage: Storage) -> None:
    if not isinstance(storage, DiskStorage):
        return
    folder = _existing(storage)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise MachineError(
            f"{folder}: may not be written; change its rights, or set data.root elsewhere"
        )


def _existing(storage: DiskStorage) -> Path:
    """Return the folder of a set, or the nearest one above it that exists."""
    folder = Path(storage.location).absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


class _Quota(ctypes.Structure):
    """``struct if_dqblk`` of linux/quota.h."""

    hard_blocks: int
    n_bytes: int
    hard_files: int
    files: int

    _fields_ = (
        ("hard_blocks", ctypes.c_uint64),
        ("soft_blocks", ctypes.c_uint64),
        ("n_bytes", ctypes.c_uint64),
        ("hard_files", ctypes.c_uint64),
        ("soft_files", ctypes.c_uint64),
        ("files", ctypes.c_uint64),
        ("grace_blocks", ctypes.c_uint64),
        ("grace_files", ctypes.c_uint64),
        ("valid", ctypes.c_uint32),
    )
