"""Which files of a folder are pieces of one archive: ``x.zip.001``, ``x.tar.gz.00``, ``x.zip.aa``.

Such pieces are read one behind the other, as ``cat`` would join them. The disks of a split zip
(``x.z01 … x.zip``) are no such pieces; ``zip -s 0`` joins them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from configs.errors import DataError

_PIECE = re.compile(r"(.+\.(?:zip|tar|tar\.gz|tgz))\.([0-9]{2,4}|[a-f][a-z])", re.IGNORECASE)
_DISK = re.compile(r"(.+)\.z[0-9]{2,3}", re.IGNORECASE)


def whole_name(name: str) -> str:
    """Return the name of the archive that ``name`` is a piece of; any other name as it is."""
    match = _PIECE.fullmatch(name)
    return match[1] if match else name


def is_piece(name: str) -> bool:
    """Tell whether a file is a piece of an archive."""
    return _PIECE.fullmatch(name) is not None


def disks(names: Iterable[str]) -> dict[str, int]:
    """Return the split zips whose disks are among ``names``: name of the last disk, and how many.

    The last disk, ``x.zip``, is not counted: it need not have arrived.
    """
    counts: defaultdict[str, int] = defaultdict(int)
    for name in names:
        if match := _DISK.fullmatch(name):
            counts[f"{match[1]}.zip"] += 1
    return dict(counts)


def pieces(whole: str, names: Iterable[str], where: str) -> tuple[str, ...]:
    """Return the pieces of an archive in order; none if there are none.

    Args:
        whole: Name of the archive, e.g. ``x.tar.gz``.
        names: Files that lie beside it.
        where: Folder, for errors.

    Raises:
        DataError: one is missing between the others, or the first is.
    """
    found = {
        match[2]: name for name in names if (match := _PIECE.fullmatch(name)) and match[1] == whole
    }
    if not found:
        return ()
    numbers = {_number(suffix): name for suffix, name in found.items()}
    width = max(map(len, found))
    first = 0 if 0 in numbers else 1
    last = max(numbers)
    missing = [number for number in range(first, last + 1) if number not in numbers]
    if missing or len(numbers) < len(found):
        letters = not next(iter(found)).isdigit()
        names_missing = [f"{whole}.{_suffix(n, width, letters=letters)}" for n in missing[:3]]
        what = f"without {', '.join(names_missing)}" if missing else "two of one number"
        raise DataError(
            f"{where}/{whole}: got {len(found)} parts, want {last + 1 - first} ({what}); "
            "download what is missing, the parts are read as they lie"
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
