"""Which byte ranges of an archive's listing belong to which folder, in little memory.

The members of a folder are nearly always adjacent, so a listing of millions of members consists of
a few runs per folder; the worst case is one run of 16 bytes per member. When a movie is opened, the
entries of its runs are read again from the archive.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from configs.corrupt import report_corrupt
from configs.errors import DataError
from sharding.format.encoding import npz_arrays, npz_bytes

MAX_FOLDERS = 1_000_000
"""A dump of movies has a few thousand."""

_EXAMPLES = 20
_MAX_RUN = 2**32 - 1


def place(name: str) -> tuple[str, str, bool]:
    """Return folder and base name of a member, and whether its name is safe.

    The folder is the name's, without ``.``, ``..`` and the root. It only identifies the movie;
    nothing is ever written to it.
    """
    # Some programs write backslashes; in a name with slashes they are part of a name.
    parts = (name.replace("\\", "/") if "/" not in name else name).split("/")
    safe = parts[0] != "" and ".." not in parts
    folders = [part for part in parts[:-1] if part not in ("", ".", "..")]
    return "/".join(folders), parts[-1], safe


@dataclass(frozen=True)
class Listing:
    """Runs of an archive's members, by group: a folder of images, or a tar of one movie."""

    groups: tuple[str, ...]
    """Folders and names of tars, as normalised by ``place``."""

    folders: tuple[str, ...]
    """The groups that are folders with images."""

    tars: tuple[str, ...]
    """The groups that are tars."""

    members: int
    others: int
    """Number of members that belong to neither."""

    shown: tuple[str, ...]
    """Some of these members, for messages."""

    group: npt.NDArray[Any]
    """u32 [R]: position of the run's group in ``groups``."""

    begin: npt.NDArray[Any]
    """u64 [R]: first byte of the run."""

    length: npt.NDArray[Any]
    """u32 [R]: bytes of the run; a longer range is split into several runs."""

    joined: int = 0
    """Number of tars that follow the first one in the same file."""

    def runs(self, group: str) -> Iterator[tuple[int, int]]:
        """Yield the byte ranges ``(begin, stop)`` of a group's runs, in order."""
        try:
            number = self.groups.index(group)
        except ValueError:
            return
        for run in np.flatnonzero(self.group == number):
            begin = int(self.begin[run])
            yield begin, begin + int(self.length[run])

    def to_bytes(self) -> bytes:
        """Return the listing as an ``.npz``."""
        head = [self.groups, self.folders, self.tars, self.members, self.others, self.shown]
        head.append(self.joined)
        text = np.frombuffer(json.dumps(head).encode("ascii"), np.uint8)
        return npz_bytes(
            {"head": text, "group": self.group, "begin": self.begin, "length": self.length}
        )

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Read a listing.

        Raises:
            DataError: the file is corrupt.
        """
        arrays = npz_arrays(data, where, ("head", "group", "begin", "length"))
        with report_corrupt(where, "delete it"):
            groups, folders, tars, members, others, shown, joined = json.loads(
                arrays["head"].tobytes()
            )
            return cls(
                tuple(groups), tuple(folders), tuple(tars), members, others, tuple(shown),
                arrays["group"], arrays["begin"], arrays["length"], joined,
            )  # fmt: skip


@dataclass
class Collector:
    """A listing under construction, to which the members of an archive are added in order."""

    where: str
    members: int = 0
    _numbers: dict[str, int] = field(default_factory=dict)
    _is_folder: dict[int, bool] = field(default_factory=dict)
    """For each group that may be a movie: whether it is a folder of images or a tar."""

    _group: array[int] = field(default_factory=lambda: array("I"))
    _begin: array[int] = field(default_factory=lambda: array("Q"))
    _length: array[int] = field(default_factory=lambda: array("I"))
    _counts: array[int] = field(default_factory=lambda: array("Q"))
    _first: dict[int, str] = field(default_factory=dict)
    _last: tuple[int, int] = (-1, -1)

    def number(self, group: str, name: str) -> int:
        """Return the number of a group; the first ``name`` that is not empty is its example."""
        number = self._numbers.setdefault(group, len(self._numbers))
        if number == len(self._counts):
            if number == MAX_FOLDERS:
                raise DataError(
                    f"{self.where}: got more than {MAX_FOLDERS:,} folders, want one per movie"
                )
            self._counts.append(0)
        if name and number not in self._first:
            self._first[number] = name
        return number

    def mark_movie(self, number: int, *, folder: bool) -> None:
        """Mark a group as a folder with images, or as a tar."""
        self._is_folder[number] = folder

    def is_movie(self, number: int) -> bool:
        """Return whether a group was marked by ``mark_movie``."""
        return number in self._is_folder

    def add(self, number: int, begin: int, length: int, *, counts: bool = True) -> None:
        """Add a member of a group by its byte range in the listing; junk does not count."""
        self.members += 1
        self._counts[number] += counts
        # A member directly after one of the same group extends its run.
        if self._last == (number, begin) and self._length[-1] + length <= _MAX_RUN:
            self._length[-1] += length
        else:
            self._group.append(number)
            self._begin.append(begin)
            # A larger member is recorded as 4 GiB: only its start is looked for.
            self._length.append(min(length, _MAX_RUN))
        self._last = number, begin + length

    def listing(self) -> Listing:
        """Return the listing of the members added so far."""
        names = tuple(self._numbers)
        others = [number for number in range(len(names)) if number not in self._is_folder]
        return Listing(
            groups=names,
            folders=tuple(names[n] for n, folder in self._is_folder.items() if folder),
            tars=tuple(names[n] for n, folder in self._is_folder.items() if not folder),
            members=self.members,
            others=sum(self._counts[number] for number in others),
            shown=tuple(self._first[n] for n in others if n in self._first)[:_EXAMPLES],
            group=np.frombuffer(self._group, np.uint32),
            begin=np.frombuffer(self._begin, np.uint64),
            length=np.frombuffer(self._length, np.uint32),
        )
