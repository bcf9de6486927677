"""One line for a file that cannot be parsed, whatever its parser raises."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from configs.errors import DataError, MovieNetError
from configs.one_line import one_line


@contextmanager
def report_corrupt(
    where: object,
    remedy: str,
    error: type[MovieNetError] = DataError,
    *,
    problem: str = "corrupt",
) -> Iterator[None]:
    """Convert what the block raises into one line: ``WHERE: corrupt (REASON); REMEDY``.

    Damaged bytes make json, yaml, numpy, zipfile, pickle and safetensors raise nearly any
    exception, ``RecursionError`` and ``MemoryError`` included. So the block must contain only the
    parsing of one file. Errors of the disk, and those that already are one line, pass unchanged.

    Args:
        where: File, and the place in it.
        remedy: What the user can do; empty where the caller adds it.
        error: Class of the raised error.
        problem: What the file is, e.g. ``not JSON``.
    """
    try:
        yield
    except MovieNetError:
        raise
    except Exception as cause:  # parsers document few of their exceptions
        if isinstance(cause, OSError) and not _is_damage(cause):
            raise
        advice = f"; {remedy}" if remedy else ""
        raise error(f"{where}: {problem} ({reason_of(cause)}){advice}") from cause


def _is_damage(error: OSError) -> bool:
    """Return whether an error of the system comes from the contents of a file, not from a disk."""
    # EINVAL: a parser seeks to the position that the file states, e.g. a negative one.
    return isinstance(error, FileNotFoundError) or error.errno == errno.EINVAL


def reason_of(error: Exception) -> str:
    """Return the message of an exception in one line of at most 200 characters."""
    name, message = type(error).__name__, one_line(str(error))  # it may quote the damaged bytes
    # A ValueError explains itself; a KeyError is only the key.
    reason = message if message and isinstance(error, ValueError) else f"{name}: {message}"
    return reason if len(reason) <= 200 else f"{reason[:199]}…"
