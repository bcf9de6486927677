"""Opening of local files, and of nothing else."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from configs.errors import DataError


def open_regular(path: Path) -> int:
    """Open a file to read; return its handle.

    Raises:
        DataError: It is a pipe, which would wait for a writer, a device without end, or a folder.
        OSError: It cannot be opened.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return handle
    os.close(handle)
    raise DataError(f"{path}: got a pipe, device or folder, want a file")


def open_file(path: Path) -> BinaryIO:
    """Open a file to read, like ``open_regular``."""
    return os.fdopen(open_regular(path), "rb")
