"""Opens one movie of a dump: a folder, a video, an archive, or a member of an archive.

This is the only module that maps archive suffixes to readers. The layout of a dump is described in
``sharding.dump``.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from configs.errors import DataError
from configs.runtime.hints import hint
from sharding.dump import multipart
from sharding.dump.junk import is_junk_member
from sharding.dump.key_frames import VideoSource
from sharding.dump.listing import Collector, Listing, place
from sharding.dump.readers import GZIP, RAW_DEFLATE, Inflated, LocalFile, Readable, Section
from sharding.dump.remote import RemoteDump
from sharding.dump.sources import FolderSource, MovieSource, TarSource, ZipSource, is_image
from sharding.dump.video import is_video
from sharding.dump.zip import (
    STORED,
    End,
    Entry,
    content_at,
    find_end,
    read_entries,
    read_names,
    text,
)
from sharding.format import tar
from sharding.format.encoding import sha256_hex
from sharding.storage.base import Storage

logger = logging.getLogger(__name__)
Dump = Path | RemoteDump
"""A folder, a zip or tar, or URLs."""
INSIDE = "::"
"""Separates an archive from its member in the path of a source."""
_GZIPPED = (".tar.gz", ".tgz")
_TARS = (".tar", *_GZIPPED)
_RAW_TARS = tuple(suffix.encode("ascii") for suffix in _TARS)
ARCHIVE_SUFFIXES = (".zip", *_TARS)
_MAX_LISTINGS = 4
_CACHED_MEMBERS = 10_000
"""A shorter listing is not cached: reading it from the archive is as fast."""

_SLOW_MEMBERS, _SLOW_BYTES = 500_000, 1024**3
"""Listing a zip with more members, or a larger tar, may take more than a few seconds."""


@contextmanager
def open_source(
    dump: Dump,
    path: str,
    cache: Storage | None = None,
    on_shot: Callable[[], None] = lambda: None,
) -> Iterator[MovieSource]:
    """Open one movie.

    Args:
        dump: The dump.
        path: Path of the source relative to the dump, as in the plan.
        cache: Storage for the listings of large archives; None: they are not cached.
        on_shot: Called after each shot of a video, which takes long to open; may raise an error.

    Raises:
        DataError: the source no longer exists, or its archive or video is corrupt.
    """
    source = _open(dump, path, cache, on_shot)
    try:
        yield source
    finally:
        source.close()


def _open(dump: Dump, path: str, cache: Storage | None, on_shot: Callable[[], None]) -> MovieSource:
    outer, *inner = path.split(INSIDE)
    if isinstance(dump, RemoteDump):
        return _open_in(dump.open(outer), outer.rpartition("/")[2], inner, cache)
    full = dump / outer if outer else dump
    if not inner and full.is_dir():
        return FolderSource(full)
    if is_video(outer) and os.path.lexists(full):
        return VideoSource(full, on_shot)
    archive = whole_archive(full)
    if archive is None:
        raise _missing(f"{full}: planned, but no longer exists")
    file = local_archive(archive)
    try:
        return _open_in(file, archive.name, inner, cache)
    except BaseException:
        file.close()
        raise


def _open_in(file: Readable, name: str, inner: list[str], cache: Storage | None) -> MovieSource:
    if not is_zip(name):
        opened = decompressed(file, name)
        if not inner:
            return TarSource(opened)
        listing = tar_listing(opened, cache)
        _check_group(file, listing.folders, inner[0])
        return TarSource(opened, listing, inner[0])
    end = find_end(file, file.where)
    listing = zip_listing(file, end, cache)
    group, *rest = inner
    if group not in listing.tars:
        _check_group(file, listing.folders, group)
        return ZipSource(file, end, listing.runs(group), group)
    member = open_member(file, end, listing, group)
    if member is None:
        raise _missing(f"{file.where}: {group} was planned, but is no longer in it")
    return _open_in(member, group, rest, cache)


def _check_group(file: Readable, groups: Collection[str], group: str) -> None:
    if group not in groups:
        raise _missing(f"{file.where}: {group} was planned, but is no longer in it")


def _missing(what: str) -> DataError:
    remedy = hint("movienet-shard plan --replace")
    return DataError(f"{what}; restore it, or run {remedy}")


def open_member(file: Readable, end: End, listing: Listing, group: str) -> Readable | None:
    """Open a tar that is a member of a zip; None unless it is a regular file with a safe name."""
    entry: Entry | None = None
    for begin, stop in listing.runs(group):
        for candidate in read_entries(file, end, begin, stop, file.where):
            folder, base, safe = place(candidate.name)
            if safe and candidate.kind == "file" and joined_path(folder, base) == group:
                entry = candidate  # as unpacking would: of two with one name, the last
    if entry is None:
        return None
    where = f"{file.where}{INSIDE}{group}"
    if reason := entry.defect(end):
        raise DataError(f"{where}: {reason}; unpack the zip, and set data.dump to its folder")
    begin = content_at(file, entry, file.where)
    fingerprint = f"{entry.header} {entry.size} {entry.crc}"
    section = Section(where, file, begin, entry.packed, fingerprint)
    return section if entry.method == STORED else Inflated(where, section, RAW_DEFLATE)


def joined_path(folder: str, base: str) -> str:
    """Return the path of a member; ``folder`` may be empty."""
    return f"{folder}/{base}" if folder else base


def decompressed(file: Readable, name: str) -> Readable:
    """Return the tar in a ``.tar.gz``, or the file itself."""
    return Inflated(file.where, file, GZIP) if name.lower().endswith(_GZIPPED) else file


def local_archive(path: Path) -> LocalFile:
    """Open an archive on disk; several parts are read as one file.

    Raises:
        DataError: a part is missing, or is no regular file.
        OSError: a part cannot be opened.
    """
    parts = [] if path.is_file() else [path.parent / piece for piece in _pieces(path)]
    return LocalFile(
        f"{path} in {len(parts)} parts" if len(parts) > 1 else str(path), parts or [path]
    )


def whole_archive(path: Path) -> Path | None:
    """Return the archive at ``path``, or of which ``path`` is a part; None if there is none."""
    archive = path.with_name(multipart.whole_name(path.name))
    if not archive.name.lower().endswith(ARCHIVE_SUFFIXES):
        return None
    # A broken link or a pipe is an archive as well: opening it raises the error that names it.
    exists = os.path.lexists(archive) and not archive.is_dir()
    return archive if exists or _pieces(archive) else None


def _pieces(path: Path) -> tuple[str, ...]:
    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry in entries if multipart.is_piece(entry.name)]
    except (FileNotFoundError, NotADirectoryError):
        return ()
    return multipart.pieces(path.name, names, str(path.parent))


def is_zip(name: str) -> bool:
    """Return whether a file name has the suffix of a zip."""
    return name.lower().endswith(".zip")


def is_archive(path: str) -> bool:
    """Return whether a source is an archive or a member of one."""
    return INSIDE in path or path.lower().endswith(ARCHIVE_SUFFIXES)


def archive_stem(name: str) -> str:
    """Return the file name of an archive without its suffix."""
    base = name.rpartition("/")[2]
    suffix = next((s for s in (".zip", *_GZIPPED, ".tar") if base.lower().endswith(s)), "")
    return base[: len(base) - len(suffix)]


_listings: OrderedDict[str, Listing] = OrderedDict()


def zip_listing(file: Readable, end: End, cache: Storage | None) -> Listing:
    """Return the listing of a zip."""
    return _listing(file, cache, lambda: _list_zip(file, end))


def tar_listing(file: Readable, cache: Storage | None) -> Listing:
    """Return the listing of a tar."""
    return _listing(file, cache, lambda: _list_tar(file))


def _listing(file: Readable, cache: Storage | None, make: Callable[[], Listing]) -> Listing:
    """Return the listing of an archive: from this process, the cache, or the archive."""
    digest = sha256_hex(f"{file.where}\n{file.fingerprint()}".encode("utf-8", "surrogateescape"))
    name = f"listing-{digest[:16]}.npz"
    listing = _listings.pop(digest, None) or _cached(name, cache)
    if listing is None:
        listing = make()
        if cache is not None and listing.members >= _CACHED_MEMBERS:
            cache.publish(name, listing.to_bytes(), replace=True)
    _listings[digest] = listing  # as the most recently used
    while len(_listings) > _MAX_LISTINGS:
        _listings.popitem(last=False)
    return listing


def _cached(name: str, cache: Storage | None) -> Listing | None:
    if cache is None or cache.size(name) is None:
        return None
    try:
        return Listing.from_bytes(cache.read(name), f"{cache.location}/{name}")
    except DataError as error:
        logger.warning("%s; the archive is listed again", error)
        return None


def _list_zip(file: Readable, end: End) -> Listing:
    if end.entries > _SLOW_MEMBERS:
        logger.info("listing the %s members of %s", f"{end.entries:,}", file.where)
    collector = Collector(file.where)
    numbers: dict[tuple[bytes, bool], int] = {}
    for at, length, raw, utf8 in read_names(file, end.begin, end.stop, file.where):
        slash = max(raw.rfind(b"/"), raw.rfind(b"\\")) + 1
        if slash == len(raw):
            continue  # the entry of a folder itself
        # Names of images in a known folder are not decoded: there may be millions of them.
        number = numbers.get((raw[:slash], utf8))
        is_tar, counts = raw.lower().endswith(_RAW_TARS), True
        if is_tar or number is None or not collector.is_movie(number):
            number, counts = _collect(collector, text(raw, utf8=utf8))
        if not is_tar:
            numbers[raw[:slash], utf8] = number
        collector.add(number, at, length, counts=counts)
    if collector.members > end.entries:
        raise DataError(
            f"{file.where}: got {collector.members} members, want {end.entries} (end record); the "
            "file is corrupt, download it again"
        )
    return collector.listing()


def _list_tar(file: Readable) -> Listing:
    # The size of a stream is unknown before it is read to its end.
    if isinstance(file, Inflated) or file.end() > _SLOW_BYTES:
        logger.info("listing the members of %s: all their headers are read", file.where)
    collector = Collector(file.where)
    end = joined = 0
    for member in tar.members(file, file.where):
        joined += member.start != end
        end = member.end
        if member.kind != "folder":
            number, counts = _collect(collector, member.name, tars=False)
            collector.add(number, member.start, member.end - member.start, counts=counts)
    return replace(collector.listing(), joined=joined)


def _collect(collector: Collector, name: str, *, tars: bool = True) -> tuple[int, bool]:
    """Return the number of a member's group, and whether the member counts.

    The group is the member's folder, or the member itself if it is a tar. Junk does not count.
    """
    folder, base, _ = place(name)
    if is_junk_member(folder, base):
        return collector.number(folder, ""), False
    if tars and base.lower().endswith(_TARS):
        number = collector.number(joined_path(folder, base), name)
        collector.mark_movie(number, folder=False)
        return number, True
    number = collector.number(folder, name)
    if is_image(base):
        collector.mark_movie(number, folder=True)
    return number, True
