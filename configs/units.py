"""Sizes and durations as users write them: ``512MiB``, ``30s``."""

from __future__ import annotations

import math
import re

_BYTES = {"": 1, "B": 1}
_BYTES |= {f"{p}B": 1000**k for k, p in enumerate("kMGT", 1)} | {"KB": 1000}
_BYTES |= {f"{p}iB": 1024**k for k, p in enumerate("KMGT", 1)}
_SECONDS = {"": 1.0, "s": 1.0, "ms": 0.001, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(value: object) -> int:
    """Return bytes from ``536870912``, ``"512MiB"`` or ``"1.5 GB"``.

    Raises:
        ValueError: Not a number with a valid unit, or negative.
    """
    return int(_parse(value, _BYTES, "bytes, e.g. 512MiB or 2GB"))


def parse_seconds(value: object) -> float:
    """Return seconds from ``30``, ``"30s"``, ``"5min"`` or ``"2h"``.

    Raises:
        ValueError: Not a number with a valid unit, or negative.
    """
    return _parse(value, _SECONDS, "a duration, e.g. 30s or 5min")


def format_bytes(n_bytes: float) -> str:
    """Return a readable size of three digits in powers of 1,000: ``"161 GB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 999.5:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"


def format_seconds(seconds: float) -> str:
    """Return a readable duration: ``"8.3 s"``, ``"12 min 05 s"``, ``"3 h 20 min"``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    seconds = round(seconds)
    for size, unit, next_size, next_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit} {seconds % size // next_size:02} {next_unit}"
    return f"{seconds // 60} min {seconds % 60:02} s" if seconds >= 60 else f"{seconds} s"


def _parse(value: object, units: dict[str, float] | dict[str, int], expected: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf:
        return value
    match = _NUMBER.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2] not in units:
        raise ValueError(f"got {value!r}, want {expected}")
    number = float(match[1]) * units[match[2]]
    if number == math.inf:
        raise ValueError(f"got {match[0][:20]}…, want {expected}")
    return number
