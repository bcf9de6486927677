"""A FUSE file system that passes calls on to a folder, with two habits of network file systems.

    network_disk.py FOLDER MOUNT

fsync of a folder fails with EINVAL, as on CIFS and in shared folders of virtual machines. A deleted
file that is open stays in its folder under another name, as on NFS; libfuse itself does that.
"""

# The signatures and calls are those of FUSE.
# ruff: noqa: ARG002, PTH101, PTH102, PTH105, PTH106, PTH108, PTH208

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from typing import Any

import mfusepy


class NetworkDisk(mfusepy.Operations):  # type: ignore[misc]  # the package has no types
    """The calls that a build and a training run make."""

    use_ns = True

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def _path(self, path: str) -> str:
        return self._folder + path

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        found = os.lstat(self._path(path))
        fields = ("st_mode", "st_size", "st_nlink", "st_uid", "st_gid", "st_blocks", "st_blksize")
        times = {f"st_{name}": getattr(found, f"st_{name}_ns") for name in ("atime", "mtime")}
        return {name: getattr(found, name) for name in fields} | times

    def readdir(self, path: str, fh: int) -> Iterator[str]:
        yield from (".", "..", *os.listdir(self._path(path)))

    def mkdir(self, path: str, mode: int) -> int:
        os.mkdir(self._path(path), mode)
        return 0

    def rmdir(self, path: str) -> int:
        os.rmdir(self._path(path))
        return 0

    def unlink(self, path: str) -> int:
        os.unlink(self._path(path))
        return 0

    def rename(self, old: str, new: str, flags: int = 0) -> int:
        os.replace(self._path(old), self._path(new))
        return 0

    def chmod(self, path: str, mode: int) -> int:
        os.chmod(self._path(path), mode)
        return 0

    def utimens(self, path: str, times: tuple[int, int]) -> int:
        os.utime(self._path(path), ns=times)
        return 0

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        os.truncate(self._path(path), length)
        return 0

    def open(self, path: str, flags: int) -> int:
        return os.open(self._path(path), flags)

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        return os.open(self._path(path), os.O_RDWR | os.O_CREAT, mode)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        return os.pwrite(fh, data, offset)

    def release(self, path: str, fh: int) -> int:
        os.close(fh)
        return 0

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        os.fsync(fh)
        return 0

    def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
        raise mfusepy.FuseOSError(errno.EINVAL)


if __name__ == "__main__":
    mfusepy.FUSE(NetworkDisk(sys.argv[1]), sys.argv[2], foreground=True, nothreads=True)
