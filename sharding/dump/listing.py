"""Which stretches of an archive's listing belong to which folder, without an object a member.

Members of a folder nearly always stand together, so a listing of millions is a few runs a folder;
the worst is a run a member, 16 bytes each. What a run says in full is read again, where it lies,
when its movie is opened.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from configs.errors import DataError
from sharding.format.encoding import npz_arrays, npz_bytes

MAX_FOLDERS = 1_000_000
"""A dump of films has a few thousand."""

_SHOWN = 20
_LONGEST = 2**32 - 1


def place(name: str) -> tuple[str, str, bool]:
    """Return folder and base of a member's name, and whether the name is safe.

    The folder is what remains of it without ``.``, ``..`` and the root; nothing is ever written
    there, it only tells the movie.
    """
    parts = (name.replace("\\", "/") if "/" not in name else name).split("/")
    safe = parts[0] != "" and ".." not in parts
    kept = [part for part in parts[:-1] if part not in ("", ".", "..")]
    return "/".join(kept), parts[-1], safe


@dataclass(frozen=True)
class Listing:
    """Runs of an archive's members, by group: a folder of images, or a tar of one movie."""

    groups: tuple[str, ...]
    """Folders, and names of tars, as ``place`` cleans them."""

    folders: tuple[str, ...]
    """Those that are folders with images."""

    tars: tuple[str, ...]
    """Those that are tars."""

    members: int
    others: int
    """Members that belong to no group."""

    shown: tuple[str, ...]
    """The first of these, for messages."""

    group: npt.NDArray[Any]
    """u32 [R]"""

    begin: npt.NDArray[Any]
    """u64 [R]: first byte of the run."""

    length: npt.NDArray[Any]
    """u32 [R]: bytes of the run; a longer stretch is several runs."""

    def runs(self, group: str) -> Iterator[tuple[int, int]]:
        """Yield first byte, and first byte behind, of a group's runs, in their order."""
        try:
            wanted = self.groups.index(group)
        except ValueError:
            return
        for run in np.flatnonzero(self.group == wanted):
            begin = int(self.begin[run])
            yield begin, begin + int(self.length[run])

    def to_bytes(self) -> bytes:
        """Return the listing as an ``.npz``."""
        head = [self.groups, self.folders, self.tars, self.members, self.others, self.shown]
        text = np.frombuffer(json.dumps(head).encode("ascii"), np.uint8)
        return npz_bytes(
            {"head": text, "group": self.group, "begin": self.begin, "length": self.length}
        )

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Read it back.

        Raises:
            DataError: it is damaged.
        """
        arrays = npz_arrays(data, where, ("head", "group", "begin", "length"))
        try:
            groups, folders, tars, members, others, shown = json.loads(arrays["head"].tobytes())
        except ValueError as error:
            raise DataError(f"{where}: not a listing ({error}); remove it") from None
        return cls(
            tuple(groups), tuple(folders), tuple(tars), members, others, tuple(shown),
            arrays["group"], arrays["begin"], arrays["length"],
        )  # fmt: skip


@dataclass
class Collector:
    """Builds a listing from an archive's members in their order."""

    where: str
    members: int = 0
    _numbers: dict[str, int] = field(default_factory=dict)
    _wanted: dict[int, bool] = field(default_factory=dict)
    """Of each group with an image or a tar: whether it is a folder."""

    _group: array[int] = field(default_factory=lambda: array("I"))
    _begin: array[int] = field(default_factory=lambda: array("Q"))
    _length: array[int] = field(default_factory=lambda: array("I"))
    _counts: array[int] = field(default_factory=lambda: array("Q"))
    _first: dict[int, str] = field(default_factory=dict)
    _last: tuple[int, int] = (-1, -1)

    def number(self, group: str, name: str) -> int:
        """Return the number of a group; ``name`` is kept as the first member of a new one."""
        number = self._numbers.setdefault(group, len(self._numbers))
        if number == len(self._counts):
            if number == MAX_FOLDERS:
                raise DataError(
                    f"{self.where}: more than {MAX_FOLDERS:,} folders; no dump of films"
                )
            self._counts.append(0)
            self._first[number] = name
        return number

    def want(self, number: int, *, folder: bool) -> None:
        """Say that a group holds images, or is a tar of them."""
        self._wanted[number] = folder

    def wanted(self, number: int) -> bool:
        """Tell whether ``want`` was said."""
        return number in self._wanted

    def add(self, number: int, begin: int, length: int) -> None:
        """Add a member: its stretch in the listing."""
        self.members += 1
        self._counts[number] += 1
        if self._last == (number, begin) and self._length[-1] + length <= _LONGEST:
            self._length[-1] += length
        else:
            self._group.append(number)
            self._begin.append(begin)
            # Of a member beyond 4 GiB the run is cut: only what starts in a run is looked for.
            self._length.append(min(length, _LONGEST))
        self._last = number, begin + length

    def listing(self) -> Listing:
        """Return what was collected."""
        names = tuple(self._numbers)
        others = [number for number in range(len(names)) if number not in self._wanted]
        return Listing(
            groups=names,
            folders=tuple(names[n] for n, folder in self._wanted.items() if folder),
            tars=tuple(names[n] for n, folder in self._wanted.items() if not folder),
            members=self.members,
            others=sum(self._counts[number] for number in others),
            shown=tuple(self._first[number] for number in others[:_SHOWN]),
            group=np.frombuffer(self._group, np.uint32),
            begin=np.frombuffer(self._begin, np.uint64),
            length=np.frombuffer(self._length, np.uint32),
        )
