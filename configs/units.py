"""Sizes and durations as people write them: ``512MiB``, ``30s``."""

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
        ValueError: not a number with a known unit, or below zero.
    """
    return int(_parse(value, _BYTES, "bytes, e.g. 512MiB or 2GB"))


def parse_seconds(value: object) -> float:
    """Return seconds from ``30``, ``"30s"``, ``"5min"`` or ``"2h"``.

    Raises:
        ValueError: not a number with a known unit, or below zero.
    """
    return _parse(value, _SECONDS, "a duration, e.g. 30s or 5min")


def format_bytes(n_bytes: float) -> str:
    """Return ``n_bytes`` for people: ``"161 GB"``, three digits, powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 999.5:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"


def _parse(value: object, units: dict[str, float] | dict[str, int], wanted: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf:
        return value
    match = _NUMBER.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2] not in units:
        raise ValueError(f"got {value!r}, want {wanted}")
    return float(match[1]) * units[match[2]]
