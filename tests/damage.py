"""Damage as disks and copies cause it: one byte differs, or the end is missing."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st

from configs.errors import MovieNetError


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Return ``data`` with one other byte, or cut."""
    at = draw(st.integers(0, len(data) - 1))
    if draw(st.booleans()):
        return data[:at]
    return data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]


def reads_or_reports(read: Callable[[], object]) -> bool:
    """Return whether a reader succeeds, or fails with one of our errors, in one line."""
    try:
        read()
    except MovieNetError as error:
        return "\n" not in str(error)
    return True
