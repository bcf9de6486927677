"""The images of one movie: in a folder, a tar, or a folder of a zip.

A source lists all images with their sizes without reading them, and reads one image into a buffer.
Members that are not images of a shot are listed as skipped. No name in an archive becomes a path.
"""

from __future__ import annotations

import errno
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple, Protocol

from configs.errors import DataError
from configs.runtime.hints import hint
from sharding.dump.jpeg import MAX_IMAGE_BYTES
from sharding.dump.junk import is_junk_member
from sharding.dump.listing import Listing, place
from sharding.dump.readers import Readable
from sharding.dump.zip import DEFLATED, End, Entry, content_at, read_entries
from sharding.format import tar
from sharding.format.encoding import sha256_hex
from sharding.format.names import frame_name

_IMAGE = re.compile(r"shot_([0-9]{1,9})_img_([0-9]{1,4})\.jpe?g", re.IGNORECASE)
_NO_IMAGE = "no image of a shot"
_LIMIT = f"want at most {MAX_IMAGE_BYTES}"
_NOT_PLAIN = "not a plain file"
# This text is stored in sidecars: it must not change.
_REPLACED = "stands there twice, the last one is taken"


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

    @property
    def is_lost(self) -> bool:
        """Return whether it is named like an image, so that the movie lacks this image."""
        return self.reason != _REPLACED and is_image(place(self.member)[1])

    @property
    def is_misnamed(self) -> bool:
        """Return whether it is a JPEG by its suffix, ignored only because of its name."""
        is_jpeg = self.member.lower().endswith((".jpg", ".jpeg"))
        return self.reason == _NO_IMAGE and is_jpeg


class MovieSource(Protocol):
    """An open source: the images of one movie."""

    images: tuple[Image, ...]
    """In order of (shot, image), each once."""

    skipped: tuple[SkippedMember, ...]
    """Members that are not used as images, in order of name."""

    fingerprint: str
    """Changes when an image of the source changes."""

    joined: int
    """Number of tars that follow the first one in the same file, joined by ``cat``."""

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


def lost_images(source: MovieSource) -> int:
    """Return how many members are named like images, but cannot be read."""
    return sum(member.is_lost for member in source.skipped)


def is_image(name: str) -> bool:
    """Return whether a base name is that of an image of a shot."""
    return _IMAGE.fullmatch(name) is not None


def is_regular_file(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry of a folder is a file, or a link to one."""
    try:
        return entry.is_file()
    except OSError as error:
        if error.errno != errno.ELOOP:  # a link to itself
            raise
        return False


class FolderSource:
    """One movie as a folder of JPEGs."""

    joined = 0

    def __init__(self, path: Path) -> None:
        self._path = path
        with os.scandir(path) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
            items = [_classify_entry(entry) for entry in ordered]
        # Only images: a file such as .DS_Store that appears later does not change the movie.
        rows = [
            f"{image.name}\n{image.size}:{image.fingerprint}\n"
            for image in items
            if isinstance(image, Image)
        ]
        self.fingerprint = sha256_hex("".join(rows).encode("utf-8", "surrogateescape"))
        self.images, self.skipped = _sort_out(items)
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
        listing: Its listing, if it contains several movies; None: read the complete tar.
        group: Folder of the movie in the listing.
    """

    def __init__(self, file: Readable, listing: Listing | None = None, group: str = "") -> None:
        self._file = file
        self.fingerprint = file.fingerprint()
        self.joined = 0 if listing is None else listing.joined
        members = tar.follow_links(self._members(listing, group), self._files(listing))
        self.images, self.skipped = _sort_out(
            _classify_member(member) for member in members if member.kind != "folder"
        )

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

    def _members(self, listing: Listing | None, group: str) -> Iterator[tar.Member]:
        if listing is not None:
            yield from self._in_folder(listing, group)
            return
        end, movie = 0, None
        for member in tar.members(self._file, self._file.where):
            self.joined += member.start != end
            end = member.end
            folder, base, is_safe = place(member.name)
            if is_safe and is_image(base):
                movie = folder if movie is None else movie
                self._check_folder(folder, movie)
            yield member

    def _check_folder(self, folder: str, movie: str) -> None:
        """Raise ``DataError`` if an image is not in the folder of the first one or below."""
        if movie and not f"{folder}/".startswith(f"{movie}/"):
            raise DataError(
                f"{self._file.where}: got images in {movie} and in {folder}, want one movie in a "
                "tar of its name; rename it, e.g. movies.tar"
            )

    def _files(
        self, listing: Listing | None
    ) -> Callable[[tar.Member], dict[str, list[tar.Member]]]:
        """Return a function that returns the files among which the target of a link is."""

        @cache
        def in_folder(folder: str) -> dict[str, list[tar.Member]]:
            if listing is None:
                return tar.by_name(tar.members(self._file, self._file.where))
            return tar.by_name(self._in_folder(listing, folder))

        # Equal images of two movies are one file on a disk without duplicates.
        return lambda link: in_folder("" if listing is None else place(link.link)[0])

    def _in_folder(self, listing: Listing, folder: str) -> Iterator[tar.Member]:
        for start, stop in listing.runs(folder):
            for member in tar.members(self._file, self._file.where, start=start, stop=stop):
                if place(member.name)[0] == folder:
                    yield member


class ZipSource:
    """One movie as a folder of a zip.

    Args:
        file: The zip; closed with the source.
        end: Its end record.
        runs: Byte ranges of the central directory that contain the members.
        group: Folder of the movie.
    """

    joined = 0

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
        if entry.packed > MAX_IMAGE_BYTES:  # of a small image: it is read before it is inflated
            return SkippedMember(entry.name, f"{entry.packed} bytes in the zip, {_LIMIT}")
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


def _classify_entry(entry: os.DirEntry[str]) -> Image | SkippedMember:
    if not is_regular_file(entry):
        return SkippedMember(entry.name, _NOT_PLAIN)
    image = _image(entry.name, 0)
    if image is None:
        return SkippedMember(entry.name, _NO_IMAGE)  # not opened: it may disappear, like .nfs…
    stat = entry.stat()
    return image._replace(size=stat.st_size, fingerprint=stat.st_mtime_ns)


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
            if not is_junk_member(*place(item.member)[:2]):
                skipped.append(item)
            continue
        if item.size > MAX_IMAGE_BYTES:
            skipped.append(SkippedMember(item.name, f"{item.size} bytes, {_LIMIT}"))
            continue
        # As unpacking would: in an archive that was appended to, the last of two is used.
        previous = images.get(item[:2])
        if previous:
            skipped.append(SkippedMember(previous.name, _REPLACED))
        images[item.shot, item.image] = item
    return tuple(sorted(images.values())), tuple(sorted(skipped))


def _changed(where: str) -> DataError:
    remedy = hint("movienet-shard plan --replace")
    return DataError(f"{where}: changed while it was read; wait until it is complete, run {remedy}")
