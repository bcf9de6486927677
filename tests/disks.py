"""Small disks, for tests of a full and of a failing one, and one that behaves as in a network."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Mount a tmpfs of ``size`` at a new folder. Skip the test if the user is not allowed to.

    The test may rename the folders above it.
    """
    folder.mkdir(parents=True)
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(options, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    handle = os.open(folder, os.O_PATH)
    try:
        yield
    finally:
        current = Path(f"/proc/self/fd/{handle}").readlink()
        os.close(handle)
        subprocess.run(["umount", "-l", current], check=True)


@contextmanager
def failing_disk(folder: Path, write: Callable[[Path], Path]) -> Iterator[None]:
    """Mount a disk at a new folder on which one file exists, but reading it is an I/O error.

    Args:
        folder: Where to mount.
        write: Writes files of at most 2 MB to the folder; returns the one that fails.

    The test is skipped if the user is not allowed to mount.
    """
    folder.mkdir(parents=True)
    device = folder.with_name(f"{folder.name}.disk")
    with device.open("wb") as file:
        file.truncate(4 << 20)
    make = ["mkfs.ext4", "-q", "-O", "^has_journal", "-E", "lazy_itable_init=0", str(device)]
    mount = ["mount", "-o", "loop", str(device), str(folder)]
    for command in (make, mount):
        try:
            done = subprocess.run(command, check=False, capture_output=True)
        except FileNotFoundError:
            pytest.skip(f"no program {command[0]}")
        if done.returncode:
            pytest.skip("mounting a disk needs root and a loop device")
    try:
        path = write(folder)
        _lose_contents(device, path)
        _skip_unless_failing(path)
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def network_disk(folder: Path) -> Iterator[None]:
    """Mount a file system with the habits of ``network_disk.py`` at a new folder.

    The test is skipped where FUSE is missing.
    """
    folder.mkdir(parents=True)
    content = folder.with_name(f"{folder.name}.content")
    content.mkdir()
    serve = [sys.executable, str(Path(__file__).with_name("network_disk.py"))]
    process = subprocess.Popen([*serve, str(content), str(folder)], stderr=subprocess.PIPE)
    try:
        while not folder.is_mount():
            if process.poll() is not None and process.stderr is not None:
                reason = process.stderr.read().decode().strip().splitlines() or ["unknown"]
                pytest.skip(f"no FUSE: {reason[-1]}")
            time.sleep(0.02)
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)
        process.terminate()
        process.communicate()


def _skip_unless_failing(path: Path) -> None:
    try:
        path.read_bytes()
    except OSError:
        return
    pytest.skip("this kernel reads lost blocks as zeros")


def _lose_contents(device: Path, path: Path) -> None:
    """Cut the file behind a disk where its own files begin, and forget their cached contents."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
        os.sync()
        os.truncate(device, 600 * 1024)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)
