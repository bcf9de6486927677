"""One finding about a site, and the checks that need only the standard library."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.units import format_bytes

Level = Literal["ok", "warn", "fail"]

_LEAST_BYTES = 1_000_000_000
"""Free space below which a folder counts as full."""


@dataclass(frozen=True)
class Row:
    """One finding."""

    check: str
    level: Level
    detail: str
    remedy: str = ""

    def line(self) -> str:
        """Return it in one line."""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.level:<4}   {self.check:<22}   {self.detail}{remedy}"


def look_at_folder(what: str, folder: Path, *, least_bytes: int = _LEAST_BYTES) -> Iterator[Row]:
    """Try in a folder what publishing needs: write, fsync, rename, flock; and its space.

    Args:
        what: Name of the folder in the rows, e.g. ``root``.
        folder: Made if it is missing.
        least_bytes: Free bytes below which it counts as full.
    """
    mine = folder / f".tmp-doctor-{uuid.uuid4().hex[:8]}"
    try:
        mine.mkdir(parents=True)
    except OSError as error:
        remedy = "make it writable, or set the path elsewhere"
        yield Row(what, "fail", f"{folder}: {error.strerror}", remedy)
        return
    try:
        yield from _try_files(what, folder, mine)
        yield _space(what, folder, least_bytes)
    finally:
        shutil.rmtree(mine, ignore_errors=True)


def _try_files(what: str, folder: Path, mine: Path) -> Iterator[Row]:
    first, second = mine / "first", mine / "second"
    try:
        with first.open("wb") as file:
            file.write(os.urandom(65536))
            file.flush()
            os.fsync(file.fileno())
        first.rename(second)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free space or quota there" if full else "use another file system"
        yield Row(what, "fail", f"{folder}: write, fsync, rename: {error.strerror}", remedy)
        return
    limits = [text for text in (_flock(second), _folder_flush(mine), _open_files(mine)) if text]
    if limits:
        remedy = "see *File systems* in configs/README.md"
        yield Row(what, "warn", f"{folder}: {'; '.join(limits)}", remedy)
    else:
        yield Row(what, "ok", f"{folder}: write, fsync, rename, flock")


def _flock(file: Path) -> str:
    try:
        with file.open("ab") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return (
            f"no flock ({error.strerror}): two processes at one run are not noticed there, so "
            "start each run once"
        )
    return ""


def _folder_flush(folder: Path) -> str:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        return f"no fsync of folders ({error.strerror}): a power cut may lose the newest files"
    finally:
        os.close(handle)
    return ""


def _open_files(folder: Path) -> str:
    file = folder / "open"
    with file.open("wb"):
        file.unlink()
        stays = [path.name for path in folder.iterdir() if path.name != "second"]
    return f"a deleted file that is open stays as {stays[0]} until it is closed" if stays else ""


def _space(what: str, folder: Path, least_bytes: int) -> Row:
    usage, files = shutil.disk_usage(folder), os.statvfs(folder)
    if not usage.total:  # as some FUSE file systems report
        return Row(f"{what} space", "ok", f"{folder}: the file system does not report it")
    left = f"{folder}: {format_bytes(usage.free)} free, {files.f_favail:,} files"
    if usage.free < least_bytes:
        remedy = f"want at least {format_bytes(least_bytes)}; free some, or set the path elsewhere"
        return Row(f"{what} space", "fail", left, remedy)
    if files.f_files and not files.f_favail:
        return Row(f"{what} space", "fail", left, "no file can be made; remove some")
    return Row(f"{what} space", "ok", left)
