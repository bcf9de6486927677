"""Free bytes and files of a file system, and the user's quota on it.

The kernel reports a quota where it keeps one (ext4, XFS); network file systems keep it on the
server and report it only once it is exceeded.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from configs.errors import MachineError
from configs.units import format_bytes
from sharding.storage.base import Storage
from sharding.storage.local import DiskStorage

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


def free(storage: Storage) -> Space:
    """Return what the file system of a set, which need not exist yet, can still take."""
    if not isinstance(storage, DiskStorage):
        return Space(storage.free_bytes())
    stat = os.statvfs(existing_folder(storage))
    # Some file systems (btrfs) make room for files as they come, and tell 0 of 0.
    return Space(storage.free_bytes(), stat.f_favail if stat.f_files else None)


def quota(storage: Storage) -> Space | None:
    """Return what this user's quota leaves on the file system of a set; None without one."""
    if not isinstance(storage, DiskStorage) or sys.platform != "linux":
        return None
    told = _Quota()
    handle = os.open(existing_folder(storage), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
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


def check_permission(storage: Storage) -> None:
    """Raise ``MachineError`` if this user cannot write to the folder of a dataset."""
    if not isinstance(storage, DiskStorage):
        return
    folder = existing_folder(storage)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise MachineError(
            f"{folder}: may not be written; change its rights, or set data.root elsewhere"
        )


def existing_folder(storage: DiskStorage) -> Path:
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
