"""Locations of several files: brace patterns and ``.txt`` files of names."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from configs.corrupt import report_corrupt
from configs.errors import ConfigError, DataError
from configs.redaction import bare_url

if TYPE_CHECKING:
    from configs.schema import StorageConfig

_BRACES = re.compile(r"\{([^{}]*)\}")
_SEQUENCE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
MAX_FILES = 1_000_000
"""Files of one location, whatever ranges its braces contain."""


def expand(location: str, config: StorageConfig | None = None) -> list[str]:
    """Return the files that a location refers to.

    Args:
        location: A pattern such as ``http://host/frames-{000..370}.tar`` or ``…/{a,b}.tar``; or a
            ``.txt`` file of names, one per line, relative to its own folder; or one file.
        config: How an object store is reached.

    Raises:
        ConfigError: a brace expands to nothing, or there would be more than ``MAX_FILES`` files.
        DataError: a file of names is missing or empty.
    """
    if not bare_url(location).endswith(".txt"):
        return _expand_all([location], location)
    from sharding.storage.base import is_url
    from sharding.storage.location import split_file
    from sharding.storage.open import open_storage

    folder, name = split_file(location)
    data = open_storage(folder or ".", config).read(name)
    folder = folder.partition("?")[0] if is_url(folder) else folder  # a signature is of one file
    with report_corrupt(location, "save it as UTF-8, one name or URL per line"):
        text = data.decode()
    lines = [line.strip() for line in text.splitlines()]
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise DataError(f"{location}: got an empty file of names, want one name or URL per line")
    rooted = [
        line if is_url(line) or line.startswith("/") else f"{folder or '.'}/{line}"
        for line in names
    ]
    return _expand_all(rooted, location)


def _expand_all(patterns: Sequence[str], location: str) -> list[str]:
    if sum(map(_count, patterns)) > MAX_FILES:
        raise ConfigError(f"{location}: got more than {MAX_FILES:,} files, want one per shard")
    return [file for pattern in patterns for file in _expand_braces(pattern)]


def _count(pattern: str) -> int:
    """Return how many files a pattern expands to, without expanding it."""
    counts = []
    for braces in _BRACES.findall(pattern):
        sequence = _SEQUENCE.fullmatch(braces)
        counts.append(
            int(sequence[2]) - int(sequence[1]) + 1 if sequence else braces.count(",") + 1
        )
    return math.prod(max(1, count) for count in counts)


def _expand_braces(pattern: str) -> list[str]:
    brace = _BRACES.search(pattern)
    if brace is None:
        return [pattern]
    sequence = _SEQUENCE.fullmatch(brace[1])
    if sequence is not None:
        first, last = int(sequence[1]), int(sequence[2])
        choices = [str(number).zfill(len(sequence[1])) for number in range(first, last + 1)]
    else:
        choices = brace[1].split(",")
    if not choices or (len(choices) == 1 and sequence is None):
        raise ConfigError(
            f"{pattern}: got {{{brace[1]}}}, want e.g. {{000..370}} (rising) or {{a,b}}"
        )
    before, after = pattern[: brace.start()], pattern[brace.end() :]
    return [file for choice in choices for file in _expand_braces(before + choice + after)]
