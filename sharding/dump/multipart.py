"""Archives in several parts: ``x.zip.001 …``, ``x.tar.gz.00 …``, ``x.zip.aa …``.

The parts are read in sequence, as if joined by ``cat``. The disks of a split zip
(``x.z01 … x.zip``) cannot be read like that; ``zip -s 0`` joins them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from configs.errors import DataError

_PIECE = re.compile(r"(.+\.(?:zip|tar|tar\.gz|tgz))\.([0-9]{2,4}|[a-f][a-z])", re.IGNORECASE)
_DISK = re.compile(r"(.+)\.z[0-9]{2,3}", re.IGNORECASE)


def whole_name(name: str) -> str:
    """Return the name of the archive of which ``name`` is a part; any other name unchanged."""
    match = _PIECE.fullmatch(name)
    return match[1] if match else name


def is_piece(name: str) -> bool:
    """Return whether a file is a part of an archive."""
    return _PIECE.fullmatch(name) is not None


def disks(names: Iterable[str]) -> dict[str, int]:
    """Return the split zips among ``names``: name of the last disk, and number of other disks.

    The last disk, ``x.zip``, is not counted, since it may be missing.
    """
    counts: defaultdict[str, int] = defaultdict(int)
    for name in names:
        if match := _DISK.fullmatch(name):
            counts[f"{match[1]}.zip"] += 1
    return dict(counts)


def pieces(archive: str, names: Iterable[str], where: str) -> tuple[str, ...]:
    """Return the parts of an archive in order; empty if there are none.

    Args:
        archive: Name of the archive, e.g. ``x.tar.gz``.
        names: Files of its folder.
        where: The folder, for error messages.

    Raises:
        DataError: the first part or one between others is missing, or two have one number.
    """
    by_suffix = {
        match[2]: name
        for name in names
        if (match := _PIECE.fullmatch(name)) and match[1] == archive
    }
    if not by_suffix:
        return ()
    numbers = {_number(suffix): name for suffix, name in by_suffix.items()}
    width = max(map(len, by_suffix))
    first = 0 if 0 in numbers else 1
    last = max(numbers)
    missing = [number for number in range(first, last + 1) if number not in numbers]
    if missing:
        letters = not next(iter(by_suffix)).isdigit()
        missing_names = [f"{archive}.{_suffix(n, width, letters=letters)}" for n in missing[:3]]
        raise DataError(
            f"{where}/{archive}: got {len(by_suffix)} parts, want {last + 1 - first} "
            f"(missing: {', '.join(missing_names)}); download them, joining is not necessary"
        )
    if len(numbers) < len(by_suffix):
        raise DataError(
            f"{where}/{archive}: got {len(by_suffix)} parts, want {len(numbers)} (some have the "
            "same number); delete the duplicates"
        )
    return tuple(numbers[number] for number in range(first, last + 1))


def _number(suffix: str) -> int:
    if suffix.isdigit():
        return int(suffix)
    high, low = (ord(letter) - ord("a") for letter in suffix.lower())
    return 26 * high + low


def _suffix(number: int, width: int, *, letters: bool) -> str:
    if letters:
        return chr(ord("a") + number // 26) + chr(ord("a") + number % 26)
    return f"{number:0{width}d}"
