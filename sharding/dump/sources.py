"""The images of one movie: in a folder, a tar, or a folder of a zip.

A source lists all images with their sizes without reading them, and reads one image into a buffer.
Members that are not images of a shot are listed as skipped. No name in an archive becomes a path.
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
from configs.runtime.hints import hint
from sharding.dump.listing import place
from sharding.dump.readers import Readable
from sharding.dump.zip import DEFLATED, End, Entry, content_at, read_entries
from sharding.format import tar
from sharding.format.encoding import sha256_hex
from sharding.format.names import frame_name

_IMAGE = re.compile(r"shot_([0-9]{1,9})_img_([0-9]{1,4})\.jpe?g", re.IGNORECASE)
_NO_IMAGE = "no image of a shot"
_NOT_PLAIN = "not a plain file"


class Image(NamedTuple):
    """One image of a movie's source."""

    shot: int
    image: int
    name: str
    """Without folders."""

    size: int
    offset: int
    """First byte in the tar, or of the local header in the zip; 0 in a folder."""

    fingerprint: int
    """Modification time in ns in a folder; 0 in an archive."""

    @property
    def member(self) -> str:
        """Name in a frame shard, in the movie's folder."""
        return frame_name(self.shot, self.image)


class SkippedMember(NamedTuple):
    """A member of a source that is not used as an image, and why."""

    member: str
    reason: str


class MovieSource(Protocol):
    """An open source: the images of one movie."""

    images: tuple[Image, ...]
    """In order of (shot, image), each once."""

    skipped: tuple[SkippedMember, ...]
    """Members that are not used as images, in order of name."""

    fingerprint: str
    """Changes when the source changes."""

    def read_into(self, image: Image, buffer: memoryview) -> str | None:
        """Fill ``buffer`` with the bytes of an image.

        Returns:
            Why the bytes are corrupt, if the source detects it by a checksum; else None.

        Raises:
            DataError: the source changed while it was read.
            OSError: the source cannot be read.
        """

    def close(self) -> None:
        """Release open files."""


def is_image(name: str) -> bool:
    """Return whether a base name is that of an image of a shot."""
    return _IMAGE.fullmatch(name) is not None


class FolderSource:
    """One movie as a folder of JPEGs."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with os.scandir(path) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
            files = [(entry.name, entry.stat()) for entry in ordered if entry.is_file()]
            others = [SkippedMember(e.name, _NOT_PLAIN) for e in ordered if not e.is_file()]
        rows = [f"{name}\n{stat.st_size}:{stat.st_mtime_ns}\n" for name, stat in files]
        self.fingerprint = sha256_hex("".join(rows).encode("utf-8", "surrogateescape"))
        images = (
            _image(name, stat.st_size, fingerprint=stat.st_mtime_ns)
            or SkippedMember(name, _NO_IMAGE)
            for name, stat in files
        )
        self.images, self.skipped = _sort_out([*others, *images])
        # Images are opened relative to this handle, even if the folder is renamed or replaced.
        self._handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def read_into(self, image: Image, buffer: memoryview) -> str | None:
        """Fill ``buffer`` with the bytes of an image."""
        path = self._path / image.name
        with _named(path):
            file = os.open(image.name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._handle)
            try:
                stat = os.fstat(file)
                done = 0
                while done < len(buffer) and (got := os.readv(file, [buffer[done:]])):
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
        runs: Byte ranges that contain the members; None: the complete tar.
        group: Folder of the movie, if the tar contains several.
    """

    def __init__(
        self, file: Readable, runs: Iterable[tuple[int, int]] | None = None, group: str = ""
    ) -> None:
        self._file = file
        self.fingerprint = file.fingerprint()
        self.images, self.skipped = _sort_out(self._members(runs, group))

    def read_into(self, image: Image, buffer: memoryview) -> str | None:
        """Fill ``buffer`` with the bytes of an image."""
        if self._file.pread_into(image.offset, buffer) < len(buffer):
            raise _changed(self._file.where)
        return None

    def close(self) -> None:
        """Close the tar.

        Raises:
            DataError: the file changed while it was read.
        """
        _close(self._file, self.fingerprint)

    def _members(
        self, runs: Iterable[tuple[int, int]] | None, group: str
    ) -> Iterator[Image | SkippedMember]:
        if runs is None:
            members = tar.members(self._file, self._file.where)
            yield from (_classify_member(member) for member in members if member.kind != "folder")
            return
        for start, stop in runs:
            for member in tar.members(self._file, self._file.where, start=start, stop=stop):
                if member.kind != "folder" and place(member.name)[0] == group:
                    yield _classify_member(member)


class ZipSource:
    """One movie as a folder of a zip.

    Args:
        file: The zip; closed with the source.
        end: Its end record.
        runs: Byte ranges of the central directory that contain the members.
        group: Folder of the movie.
    """

    def __init__(
        self, file: Readable, end: End, runs: Iterable[tuple[int, int]], group: str
    ) -> None:
        self._file, self._end = file, end
        self._file_fingerprint = file.fingerprint()
        self._entries: dict[int, Entry] = {}
        rows = [self._file_fingerprint]
        items: list[Image | SkippedMember] = []
        for begin, stop in runs:
            for entry in read_entries(file, end, begin, stop, file.where):
                if entry.kind != "folder" and place(entry.name)[0] == group:
                    rows.append(f"{entry.header} {entry.size} {entry.crc}")
                    items.append(self._classify(entry))
        self.fingerprint = sha256_hex("\n".join(rows).encode("ascii"))
        self.images, self.skipped = _sort_out(items)

    def read_into(self, image: Image, buffer: memoryview) -> str | None:
        """Fill ``buffer`` with the bytes of an image."""
        entry = self._entries[image.offset]
        begin = content_at(self._file, entry, self._file.where)
        if entry.method == DEFLATED:
            return _inflate(self._file.pread(begin, entry.packed), entry, buffer)
        if self._file.pread_into(begin, buffer) < len(buffer):
            raise _changed(self._file.where)
        return _checksum_error(entry, buffer)

    def close(self) -> None:
        """Close the zip.

        Raises:
            DataError: the file changed while it was read.
        """
        _close(self._file, self._file_fingerprint)

    def _classify(self, entry: Entry) -> Image | SkippedMember:
        item = _classify_name(entry.name, entry.kind, entry.size, entry.header)
        if isinstance(item, SkippedMember):
            return item
        if defect := entry.defect(self._end):
            return SkippedMember(entry.name, defect)
        self._entries[entry.header] = entry
        return item


def _inflate(packed: bytes, entry: Entry, buffer: memoryview) -> str | None:
    decoder = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        # One byte more than stated: a longer stream is detected, and never inflated completely.
        data = decoder.decompress(packed, entry.size + 1)
    except zlib.error as error:
        return f"does not inflate: {error}"
    if len(data) != entry.size:
        return f"inflates to other than {entry.size} bytes"
    buffer[:] = data
    return _checksum_error(entry, buffer)


def _checksum_error(entry: Entry, buffer: memoryview) -> str | None:
    return None if zlib.crc32(buffer) == entry.crc else "check sum of the zip differs"


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Add the file name to a read error; the system does not set it for a read by handle."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def _close(file: Readable, fingerprint: str) -> None:
    # One comparison per movie, not per image: a change is detected before the shard is published.
    now = file.fingerprint()
    file.close()
    if now != fingerprint:
        raise _changed(file.where)


def _classify_member(member: tar.Member) -> Image | SkippedMember:
    return _classify_name(member.name, member.kind, member.size, member.offset)


def _classify_name(name: str, kind: str, size: int, offset: int) -> Image | SkippedMember:
    _, base, safe = place(name)
    if kind != "file":
        return SkippedMember(name, _NOT_PLAIN)
    if not safe:
        return SkippedMember(name, "unsafe path")
    return _image(base, size, offset=offset) or SkippedMember(name, _NO_IMAGE)


def _image(name: str, size: int, *, offset: int = 0, fingerprint: int = 0) -> Image | None:
    match = _IMAGE.fullmatch(name)
    return match and Image(int(match[1]), int(match[2]), name, size, offset, fingerprint)


def _sort_out(
    items: Iterable[Image | SkippedMember],
) -> tuple[tuple[Image, ...], tuple[SkippedMember, ...]]:
    images: dict[tuple[int, int], Image] = {}
    skipped: list[SkippedMember] = []
    for item in items:
        if isinstance(item, SkippedMember):
            skipped.append(item)
            continue
        # As unpacking would: in an archive that was appended to, the last of two is used.
        previous = images.get(item[:2])
        if previous:
            # This text is stored in sidecars: it must not change.
            skipped.append(
                SkippedMember(previous.name, "stands there twice, the last one is taken")
            )
        images[item.shot, item.image] = item
    return tuple(sorted(images.values())), tuple(sorted(skipped))


def _changed(where: str) -> DataError:
    remedy = hint("movienet-shard plan --replace")
    return DataError(f"{where}: changed while it was read; wait until it is complete, run {remedy}")
