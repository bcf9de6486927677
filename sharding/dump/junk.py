"""Files and folders that systems and file managers add to any folder, and thus to its archives."""

from __future__ import annotations

from functools import lru_cache

_NAMES = frozenset(
    {
        "__macosx",  # in zips of macOS
        "icon\r",
        "thumbs.db",  # of Windows
        "ehthumbs.db",
        "desktop.ini",
        "$recycle.bin",
        "recycler",
        "system volume information",
        "@eadir",  # of Synology
        "#recycle",
        "lost+found",  # of a file system, readable by root only
    }
)
"""In lower case, since file systems of macOS and Windows ignore case."""


def is_junk(name: str) -> bool:
    """Return whether a name without folders is junk, or hidden: ``.DS_Store``, ``._tt1.tar``."""
    return name.startswith(".") or name.lower() in _NAMES


@lru_cache
def is_junk_folder(folder: str) -> bool:
    """Return whether a folder of an archive, with ``/``, is junk or inside of it."""
    return any(part.lower() in _NAMES for part in folder.split("/"))


def is_junk_member(folder: str, base: str) -> bool:
    """Return whether a member of an archive is junk."""
    return is_junk(base) or is_junk_folder(folder)
