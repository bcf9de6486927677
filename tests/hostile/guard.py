"""A guard around a parser: what it may raise, and that it runs, writes and contacts nothing."""

from __future__ import annotations

import os
import resource
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.errors import MovieNetError
from configs.one_line import LONGEST

LONGEST_MESSAGE = LONGEST + 100
"""Characters of an error, whatever names and values of the input it contains."""

_FORBIDDEN = (
    "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen",
    "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod",
    "os.truncate", "shutil.rmtree", "socket.connect", "socket.getaddrinfo", "urllib.Request",
    "ctypes.dlopen",
)  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

_watched: list[tuple[int, list[str]]] = []
"""Threads in a guarded block, and what each did there; threads of earlier tests may still write."""

SPARE_BYTES = 8 * 1024**3
"""What a test may map in addition to what the process has mapped already."""


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    # The interpreter caches modules that a parser imports.
    if not _watched or _watched[-1][0] != threading.get_ident():
        return
    if any("__pycache__" in str(argument) for argument in arguments):
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & _WRITES and not isinstance(path, int):
            _watched[-1][1].append(f"open {path!r} to write")
    elif event in _FORBIDDEN:
        _watched[-1][1].append(f"{event} {arguments!r}"[:200])


sys.addaudithook(_audit)


@contextmanager
def no_side_effects() -> Iterator[None]:
    """Fail if the block starts a program, writes a file, or opens a connection."""
    seen: list[str] = []
    _watched.append((threading.get_ident(), seen))
    try:
        yield
    finally:
        _watched.pop()
    assert not seen, f"a parser must only read: {seen}"


def outcome(parse: Callable[[], object], reasons: tuple[type[Exception], ...] = ()) -> str:
    """Return ``ok``, or the kind of error; any other exception is a fault of the product.

    Args:
        parse: Reads one file.
        reasons: Further exceptions of the module, whose message becomes part of an error.
    """
    with no_side_effects():
        return kind_of(parse, reasons)


@contextmanager
def limited_memory() -> Iterator[None]:
    """Let an allocation of many gigabytes fail, instead of ending the tests."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    status = Path("/proc/self/status").read_text()
    mapped = int(status.partition("VmSize:")[2].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (mapped + SPARE_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def is_one_line(text: str) -> bool:
    """Return whether a text has no line breaks, control codes, or controls of its direction."""
    categories = {unicodedata.category(character) for character in text}
    directions = set(text) & set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e")
    isolates = set(text) & set("\u2066\u2067\u2068\u2069")
    return not (categories & {"Cc", "Cs", "Zl", "Zp"} or directions or isolates)


def kind_of(parse: Callable[[], object], reasons: tuple[type[Exception], ...] = ()) -> str:
    """Return ``ok``, or the kind of error, which must be one line."""
    expected: tuple[type[Exception], ...] = (MovieNetError, *reasons)
    try:
        parse()
    except expected as error:
        message = str(error)
        assert is_one_line(message), f"not one line of plain text: {message!r}"
        assert len(message) <= LONGEST_MESSAGE, f"{len(message)} characters"
        return type(error).__name__
    return "ok"
