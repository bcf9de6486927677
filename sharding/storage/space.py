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

_QUOTACTL_FD = 443  # the number is the same on every architecture
_GET_USER_QUOTA = 0x800007 << 8
_QUOTA_BLOCK = 1024


@dataclass(frozen=True)
class Space:
    """Bytes and files, needed or free; None if unknown."""

    n_bytes: int | None = None
    files: int | None = None

    def __str__(self) -> str:
        n_bytes = "unknown" if self.n_bytes is None else format_bytes(self.n_bytes)
        return n_bytes if self.files is None else f"{n_bytes} in {self.files:,} files"


@dataclass(frozen=True)
class FreeSpace:
    """Space that is left in a storage, as far as the storage reports it."""

    free: Space = Space()
    quota: Space | None = None
    """Space that is left of the user's quota; None without a quota."""

    def require(self, needed: Space, where: str, purpose: str, remedy: str) -> None:
        """Raise an error unless enough space is left.

        Args:
            needed: Bytes and files that will be written; None is not checked.
            where: Location, for the message.
            purpose: What needs the space, such as ``the feature shards``.
            remedy: What to do instead of deleting files.

        Raises:
            MachineError: the free space or the quota is too small.
        """
        for space, kind in ((self.free, "free"), (self.quota, "left of the user's quota")):
            if space is None:
                continue
            if _is_short(space.n_bytes, needed.n_bytes):
                short = f"got {_bytes(space)} {kind}, want {_bytes(needed)}"
            elif _is_short(space.files, needed.files):
                short = f"got {space.files} files {kind}, want {needed.files}"
            else:
                continue
            raise MachineError(f"{where}: {short} for {purpose}; free some space, {remedy}")


def disk_space(folder: Path) -> FreeSpace:
    """Return the space that is left in the file system of an existing folder."""
    stat = os.statvfs(folder)
    # A file system reports 0 of 0 for what it does not count: btrfs inodes, some FUSE ones bytes.
    n_bytes = stat.f_bavail * stat.f_frsize if stat.f_blocks else None
    files = stat.f_favail if stat.f_files else None
    return FreeSpace(Space(n_bytes, files), _quota(folder))


def existing_folder(folder: Path) -> Path:
    """Return a folder, or its nearest parent that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _is_short(free: int | None, needed: int | None) -> bool:
    return free is not None and needed is not None and free < needed


def _bytes(space: Space) -> str:
    return format_bytes(space.n_bytes or 0)


def _quota(folder: Path) -> Space | None:
    if sys.platform != "linux":
        return None
    quota = _Quota()
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syscall = ctypes.CDLL(None, use_errno=True).syscall
        failed = syscall(_QUOTACTL_FD, handle, _GET_USER_QUOTA, os.getuid(), ctypes.byref(quota))
    finally:
        os.close(handle)
    if failed or not (quota.hard_blocks or quota.hard_files):
        return None
    return Space(
        max(0, quota.hard_blocks * _QUOTA_BLOCK - quota.n_bytes) if quota.hard_blocks else None,
        max(0, quota.hard_files - quota.files) if quota.hard_files else None,
    )


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
