"""The images of one movie, wherever they lie: a folder, a tar, a folder of a zip.

A source lists images with their sizes cheaply and reads one into a buffer. What is no image of
ours is listed as odd. No name of an archive ever becomes a path.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from configs.errors import DataError
from sharding.dump.listing import place
from sharding.dump.readers import Readable
from sharding.dump.zip import DEFLATED, End, Entry, content_at, read_entries
from sharding.format import tar
from sharding.format.encoding import sha256_hex
from sharding.format.names import frame_name

_IMAGE = re.compile(r"shot_([0-9]{1,9})_img_([0-9]{1,4})\.jpe?g", re.IGNORECASE)
_NOT_OURS = "no image of a shot"
_NOT_PLAIN = "not a plain file"


class Image(NamedTuple):
    """One image of a movie's source."""

    shot: int
    image: int
    name: str
    """Without folders."""

    size: int
    offset: int
    """First byte in the tar, or of the header in the zip; 0 in a folder."""

    fingerprint: int
    """Modification time in ns in a folder; 0 in an archive."""

    @property
    def member(self) -> str:
        """Name in a frame shard, below the movie."""
        return frame_name(self.shot, self.image)


class SkippedMember(NamedTuple):
    """A member of a source that is no image of ours."""

    member: str
    reason: str


class MovieSource(Protocol):
    """The images of one movie, opened."""

    images: tuple[Image, ...]
    """In order of (shot, image), each once."""

    odd: tuple[SkippedMember, ...]
    fingerprint: str
    """Changes when the source does."""

    def read_into(self, image: Image, room: memoryview) -> str | None:
        """Fill ``room`` with the bytes of an image.

        Returns:
            Why they are bad, where the source itself tells (a check sum); else None.

        Raises:
            DataError: the source changed while it was read.
            OSError: it cannot be read.
        """

    def close(self) -> None:
        """Let go of open files."""


def is_image(name: str) -> bool:
    """Tell whether a base name is that of an image of a shot."""
    return _IMAGE.fullmatch(name) is not None


class FolderSource:
    """One movie as a folder of JPEGs."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with os.scandir(path) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
            files = [(entry.name, entry.stat()) for entry in found if entry.is_file()]
            others = [SkippedMember(e.name, _NOT_PLAIN) for e in found if not e.is_file()]
        rows = [f"{name}\n{stat.st_size}:{stat.st_mtime_ns}\n" for name, stat in files]
        self.fingerprint = sha256_hex("".join(rows).encode("utf-8", "surrogateescape"))
        images = (
            _image(name, stat.st_size, fingerprint=stat.st_mtime_ns)
            or SkippedMember(name, _NOT_OURS)
            for name, stat in files
        )
        self.images, self.odd = _sort_out([*others, *images])
        self._handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def read_into(self, image: Image, room: memoryview) -> str | None:
        """Fill ``room`` with the bytes of an image."""
        path = self._path / image.name
        with _named(path):
            file = os.open(image.name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._handle)
            try:
                stat = os.fstat(file)
                done = 0
                while done < len(room) and (got := os.readv(file, [room[done:]])):
                    done += got
            finally:
                os.close(file)
        if (stat.st_size, stat.st_mtime_ns, done) != (image.size, image.fingerprint, image.size):
            raise _changed(str(path))
        return None

    def close(self) -> None:
        """Close the folder."""
        os.close(self._handle)


class TarSource:
    """One movie as a tar, or as one folder of a tar of several.

    Args:
        file: The tar; closed with the source.
        runs: Stretches of the tar to look at; None means all of it.
        group: Folder of the movie where there are several.
    """

    def __init__(
        self, file: Readable, runs: Iterable[tuple[int, int]] | None = None, group: str = ""
    ) -> None:
        self._file = file
        self.fingerprint = file.fingerprint()
        self.images, self.odd = _sort_out(self._members(runs, group))

    def read_into(self, image: Image, room: memoryview) -> str | None:
        """Fill ``room`` with the bytes of an image."""
        if self._file.pread_into(image.offset, room) < len(room):
            raise _changed(self._file.where)
        return None

    def close(self) -> None:
        """Close the tar.

        Raises:
            DataError: it changed while it was read.
        """
        _close(self._file, self.fingerprint)

    def _members(
        self, runs: Iterable[tuple[int, int]] | None, group: str
    ) -> Iterator[Image | SkippedMember]:
        if runs is None:
            found = tar.members(self._file, self._file.where)
            yield from (_sorted_member(member) for member in found if member.kind != "folder")
            return
        for start, stop in runs:
            for member in tar.members(self._file, self._file.where, start=start, stop=stop):
                if member.kind != "folder" and place(member.name)[0] == group:
                    yield _sorted_member(member)


class ZipSource:
    """One movie as a folder of a zip.

    Args:
        file: The zip; closed with the source.
        end: Its end record.
        runs: Stretches of the directory to look at.
        group: Folder of the movie.
    """

    def __init__(
        self, file: Readable, end: End, runs: Iterable[tuple[int, int]], group: str
    ) -> None:
        self._file, self._end = file, end
        self._stamp = file.fingerprint()
        self._entries: dict[int, Entry] = {}
        rows = [self._stamp]
        found: list[Image | SkippedMember] = []
        for begin, stop in runs:
            for entry in read_entries(file, end, begin, stop, file.where):
                if entry.kind != "folder" and place(entry.name)[0] == group:
                    rows.append(f"{entry.header} {entry.size} {entry.crc}")
                    found.append(self._sorted(entry))
        self.fingerprint = sha256_hex("\n".join(rows).encode("ascii"))
        self.images, self.odd = _sort_out(found)

    def read_into(self, image: Image, room: memoryview) -> str | None:
        """Fill ``room`` with the bytes of an image."""
        entry = self._entries[image.offset]
        begin = content_at(self._file, entry, self._file.where)
        if entry.method == DEFLATED:
            return _inflate(self._file.pread(begin, entry.packed), entry, room)
        if self._file.pread_into(begin, room) < len(room):
            raise _changed(self._file.where)
        return _wrong(entry, room)

    def close(self) -> None:
        """Close the zip.

        Raises:
            DataError: it changed while it was read.
        """
        _close(self._file, self._stamp)

    def _sorted(self, entry: Entry) -> Image | SkippedMember:
        item = _sorted_name(entry.name, entry.kind, entry.size, entry.header)
        if isinstance(item, SkippedMember):
            return item
        if flaw := entry.defect(self._end):
            return SkippedMember(entry.name, flaw)
        self._entries[entry.header] = entry
        return item


def _inflate(packed: bytes, entry: Entry, room: memoryview) -> str | None:
    decoder = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = decoder.decompress(packed, entry.size + 1)
    except zlib.error as error:
        return f"does not inflate: {error}"
    if len(data) != entry.size:
        return f"inflates to other than {entry.size} bytes"
    room[:] = data
    return _wrong(entry, room)


def _wrong(entry: Entry, room: memoryview) -> str | None:
    return None if zlib.crc32(room) == entry.crc else "check sum of the zip differs"


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let a read error tell its file; the system itself names none."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def _close(file: Readable, fingerprint: str) -> None:
    now = file.fingerprint()
    file.close()
    if now != fingerprint:
        raise _changed(file.where)


def _sorted_member(member: tar.Member) -> Image | SkippedMember:
    return _sorted_name(member.name, member.kind, member.size, member.offset)


def _sorted_name(name: str, kind: str, size: int, offset: int) -> Image | SkippedMember:
    _, base, safe = place(name)
    if kind != "file":
        return SkippedMember(name, _NOT_PLAIN)
    if not safe:
        return SkippedMember(name, "unsafe path")
    return _image(base, size, offset=offset) or SkippedMember(name, _NOT_OURS)


def _image(name: str, size: int, *, offset: int = 0, fingerprint: int = 0) -> Image | None:
    match = _IMAGE.fullmatch(name)
    return match and Image(int(match[1]), int(match[2]), name, size, offset, fingerprint)


def _sort_out(
    found: Iterable[Image | SkippedMember],
) -> tuple[tuple[Image, ...], tuple[SkippedMember, ...]]:
    images: dict[tuple[int, int], Image] = {}
    odd: list[SkippedMember] = []
    for item in found:
        if isinstance(item, SkippedMember):
            odd.append(item)
            continue
        # In an archive that was appended to, the last one is what unpacking leaves.
        twice = images.get(item[:2])
        if twice:
            odd.append(SkippedMember(twice.name, "stands there twice, the last one is taken"))
        images[item.shot, item.image] = item
    return tuple(sorted(images.values())), tuple(sorted(odd))


def _changed(where: str) -> DataError:
    return DataError(f"{where}: changed while it was read; let it come to rest, plan --replace")
