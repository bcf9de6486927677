"""A dump of key frames in MovieNet's layout: one tar or one folder of JPEGs a movie.

    DUMP/tt0032138.tar      members shot_0000_img_0.jpg, also below a folder
    DUMP/tt0032138/         shot_0000_img_0.jpg …
    DUMP/240P/…             the same one level down, also below 240P/all/

Nothing that a dump names ever becomes a path that is written. An image that is not whole is left
out and listed; a read error is an error, never a bad image.
"""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from configs.errors import ConfigError, DataError
from sharding import tar
from sharding.forms import frame_name, sha256_hex
from sharding.plan import Movie, choose, ids_by_name

logger = logging.getLogger(__name__)

LEVELS = ("240P", "all")
"""Folders between the dump and its movies."""

_IMAGE = re.compile(r"shot_([0-9]{1,9})_img_([0-9]{1,4})\.jpe?g", re.IGNORECASE)
_JPEG_START = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
_TAIL_BYTES = 1024  # some writers leave a few bytes behind the end marker
_PACKED = (".zip", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst", ".7z", ".rar")


class Image(NamedTuple):
    """One image of a movie's source."""

    shot: int
    image: int
    name: str
    """Without folders."""

    size: int
    offset: int
    """First byte in the tar; 0 in a folder."""

    stamp: int
    """Modification time in ns in a folder; 0 in a tar."""

    @property
    def member(self) -> str:
        """Name in a frame shard, below the movie."""
        return frame_name(self.shot, self.image)


class Odd(NamedTuple):
    """A member of a source that is no image of ours."""

    member: str
    reason: str


class Source(Protocol):
    """The images of one movie, opened."""

    images: tuple[Image, ...]
    """In order of (shot, image), each once."""

    odd: tuple[Odd, ...]
    stamp: str
    """Changes when the source does."""

    def read_into(self, image: Image, room: memoryview) -> None:
        """Fill ``room`` with the bytes of an image.

        Raises:
            DataError: the source changed while it was read.
            OSError: it cannot be read.
        """

    def close(self) -> None:
        """Let go of open files."""


def flaw(jpeg: memoryview) -> str | None:
    """Say why bytes are no whole JPEG; None if they look like one. Nothing is decoded."""
    if not len(jpeg):
        return "empty"
    if jpeg[:3] != _JPEG_START:
        return "no JPEG start marker"
    if _JPEG_END not in bytes(jpeg[-_TAIL_BYTES:]):
        return "no JPEG end marker, cut"
    return None


def find_sources(dump: Path) -> dict[str, tuple[str, ...]]:
    """Return the sources of each movie of a dump, relative to it, by the dump's own name.

    Raises:
        ConfigError: there is no such folder.
        DataError: there is no movie in it.
    """
    if not dump.is_dir():
        raise ConfigError(f"data.dump: no folder {dump}")
    found: defaultdict[str, list[str]] = defaultdict(list)
    packed: list[str] = []
    for entry, path in _entries(dump, ""):
        if entry.is_dir():
            found[entry.name].append(path)
        elif entry.name.endswith(".tar") and entry.is_file():
            found[entry.name.removesuffix(".tar")].append(path)
        elif entry.name.lower().endswith(_PACKED):
            packed.append(path)
    if packed:
        logger.warning(
            "%d packed files of the dump are not read (%s, …): unpack them or make plain tars",
            len(packed),
            packed[0],
        )
    if not found:
        raise DataError(f"{dump}: no movie, want MOVIE.tar files or folders of JPEGs")
    return {name: tuple(sorted(found[name])) for name in sorted(found)}


def read_movies(
    dump: Path,
    limit: int | tuple[str, ...] | None = None,
    *,
    on_movie: Callable[[], None] = lambda: None,
) -> list[Movie]:
    """Scan a dump: names, sizes and stamps of its movies, without reading an image.

    Args:
        dump: The folder.
        limit: Only the first n movies in order of id, or only these.
        on_movie: Called after each movie.

    Raises:
        ConfigError: there is no such folder.
        DataError: no movie has an image, a tar is damaged, or a movie of ``limit`` is not there.
    """
    sources = find_sources(dump)
    names = {movie: name for name, movie in ids_by_name(sources).items()}
    ids = tuple(names) if not isinstance(limit, tuple) else choose(tuple(names), limit)
    movies: list[Movie] = []
    empty: list[str] = []
    for movie in ids:
        if isinstance(limit, int) and len(movies) == limit:
            break
        found = _read_movie(dump, movie, names[movie], sources[names[movie]])
        if found.images:
            movies.append(found)
        else:
            empty.append(movie)
        on_movie()
    if empty:
        logger.warning("%d movies without an image are left out (%s, …)", len(empty), empty[0])
    if not movies:
        raise DataError(f"{dump}: no image of the name shot_0000_img_0.jpg in {len(ids)} movies")
    return movies


@contextmanager
def open_source(dump: Path, path: str) -> Iterator[Source]:
    """Open one movie's tar or folder.

    Args:
        dump: The dump.
        path: Relative to it, as in the plan.

    Raises:
        DataError: it is gone, or its tar is damaged.
    """
    full = dump / path
    try:
        source = TarSource(full) if path.endswith(".tar") and full.is_file() else FolderSource(full)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{full}: gone since it was planned; run plan --replace") from None
    try:
        yield source
    finally:
        source.close()


class TarSource:
    """One movie as a tar."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb", buffering=0)
        try:
            self.stamp = self._stamp()
            self.images, self.odd = _sort_out(self._members())
        except BaseException:
            self._file.close()
            raise

    def read_into(self, image: Image, room: memoryview) -> None:
        """Fill ``room`` with the bytes of an image."""
        done = 0
        while done < len(room):
            with _named(self._path):
                got = os.preadv(self._file.fileno(), [room[done:]], image.offset + done)
            if got == 0:
                raise _changed(self._path)
            done += got

    def close(self) -> None:
        """Close the tar.

        Raises:
            DataError: it changed while it was read.
        """
        stamp = self._stamp()
        self._file.close()
        if stamp != self.stamp:
            raise _changed(self._path)

    def _stamp(self) -> str:
        stat = os.fstat(self._file.fileno())
        return f"{stat.st_size}:{stat.st_mtime_ns}"

    def _members(self) -> Iterator[Image | Odd]:
        # Unbuffered: a header is read where it stands, the contents between are never touched.
        for member in tar.members(self._file, str(self._path)):
            if member.kind == "folder":
                continue
            yield _sorted_member(member)


class FolderSource:
    """One movie as a folder of JPEGs."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with os.scandir(path) as entries:
            files = sorted((e.name, e.stat()) for e in entries if e.is_file())
        rows = [f"{name}\n{stat.st_size}:{stat.st_mtime_ns}\n" for name, stat in files]
        self.stamp = sha256_hex("".join(rows).encode("utf-8", "surrogateescape"))
        self.images, self.odd = _sort_out(
            _image(name, stat.st_size, stamp=stat.st_mtime_ns) or Odd(name, "no image of a shot")
            for name, stat in files
        )
        self._handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def read_into(self, image: Image, room: memoryview) -> None:
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
        if (stat.st_size, stat.st_mtime_ns, done) != (image.size, image.stamp, image.size):
            raise _changed(path)

    def close(self) -> None:
        """Close the folder."""
        os.close(self._handle)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let a read error tell its file; the system itself names none."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def _entries(folder: Path, prefix: str) -> Iterator[tuple[os.DirEntry[str], str]]:
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.name.startswith("."):
            continue
        if entry.name in LEVELS and entry.is_dir():
            yield from _entries(Path(entry.path), f"{prefix}{entry.name}/")
        else:
            yield entry, prefix + entry.name


def _read_movie(dump: Path, movie: str, name: str, paths: Iterable[str]) -> Movie:
    found: list[Movie] = []
    for path in paths:
        with open_source(dump, path) as source:
            n_bytes = sum(image.size for image in source.images)
            found.append(Movie(movie, name, path, source.stamp, len(source.images), n_bytes))
    # More images win; then a tar, which is read faster than a folder.
    best = max(found, key=lambda made: (made.images, made.source.endswith(".tar")))
    for other in found:
        if other is not best:
            logger.warning(
                "movie %s is there twice: taking %s (%d images), not %s (%d)",
                movie, best.source, best.images, other.source, other.images,
            )  # fmt: skip
    return best


def _sorted_member(member: tar.Member) -> Image | Odd:
    parts = member.name.split("/")
    if member.kind != "file":
        return Odd(member.name, "not a plain file")
    if member.name.startswith("/") or ".." in parts:
        return Odd(member.name, "unsafe path")
    image = _image(parts[-1], member.size, offset=member.offset)
    return image or Odd(member.name, "no image of a shot")


def _image(name: str, size: int, *, offset: int = 0, stamp: int = 0) -> Image | None:
    match = _IMAGE.fullmatch(name)
    return match and Image(int(match[1]), int(match[2]), name, size, offset, stamp)


def _sort_out(found: Iterable[Image | Odd]) -> tuple[tuple[Image, ...], tuple[Odd, ...]]:
    images: dict[tuple[int, int], Image] = {}
    odd: list[Odd] = []
    for item in found:
        if isinstance(item, Odd):
            odd.append(item)
            continue
        # In a tar that was appended to, the last one is what unpacking leaves.
        twice = images.get(item[:2])
        if twice:
            odd.append(Odd(twice.name, "stands there twice, the last one is taken"))
        images[item.shot, item.image] = item
    return tuple(sorted(images.values())), tuple(sorted(odd))


def _changed(path: Path) -> DataError:
    return DataError(f"{path}: changed while it was read; let it come to rest, plan --replace")
