"""A dump of key frames in MovieNet's layout, however it was delivered, read where it lies.

    DUMP/tt0032138/            a folder of shot_0000_img_0.jpg …
    DUMP/tt0032138.tar         a tar of them, also .tar.gz, also in a folder of the tar
    DUMP/movies.zip            a zip of such folders or tars; also a tar of such folders
    DUMP/movies.zip.001 …      an archive in parts
    DUMP/240P/…                the same further down: 240P/all/, frames/, tt0032138/tt0032138/

DUMP is a folder, one such zip or tar, or URLs of such archives (``remote``). A movie's source is
named by its path below DUMP, or its URL; what lies in an archive stands behind ``::``, e.g.
``movies.zip::frames/tt0032138``.

Nothing that a dump names ever becomes a path that is written. An image that is not whole is left
out and listed; a read error is an error, never a bad image.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.errors import DataError
from sharding.dump import multipart
from sharding.dump.listing import Collector, Listing, place
from sharding.dump.readers import GZIP, RAW_DEFLATE, Inflated, LocalFile, Readable, Section
from sharding.dump.remote import RemoteDump
from sharding.dump.sources import FolderSource, MovieSource, TarSource, ZipSource, is_image
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

Dump = Path | RemoteDump
"""A folder, zip or tar; or URLs."""
INSIDE = "::"
"""Stands between an archive and what lies in it."""
_GZIPPED = (".tar.gz", ".tgz")
_TARS = (".tar", *_GZIPPED)
_RAW_TARS = tuple(suffix.encode("ascii") for suffix in _TARS)
ARCHIVE_SUFFIXES = (".zip", *_TARS)
_KEPT_LISTINGS = 4
_CACHED_MEMBERS = 10_000
"""A smaller listing is read again as fast as it is read back."""


@contextmanager
def open_source(dump: Dump, path: str, cache: Storage | None = None) -> Iterator[MovieSource]:
    """Open one movie.

    Args:
        dump: The dump.
        path: Relative to it, as in the plan.
        cache: Where the listing of a large archive is kept; None means it is not.

    Raises:
        DataError: it is gone, or its archive is damaged.
    """
    source = _open(dump, path, cache)
    try:
        yield source
    finally:
        source.close()


def _open(dump: Dump, path: str, cache: Storage | None) -> MovieSource:
    outer, *inner = path.split(INSIDE)
    if isinstance(dump, RemoteDump):
        return _open_in(dump.open(outer), outer.rpartition("/")[2], inner, cache)
    full = dump / outer if outer else dump
    if not inner and full.is_dir():
        return FolderSource(full)
    whole = whole_archive(full)
    if whole is None:
        raise DataError(f"{full}: gone since it was planned; run plan --replace")
    file = local_archive(whole)
    try:
        return _open_in(file, whole.name, inner, cache)
    except BaseException:
        file.close()
        raise


def _open_in(file: Readable, name: str, inner: list[str], cache: Storage | None) -> MovieSource:
    if not is_zip(name):
        opened = decompressed(file, name)
        if not inner:
            return TarSource(opened)
        folders = tar_listing(opened, cache)
        _check_group(file, folders.folders, inner[0])
        return TarSource(opened, folders.runs(inner[0]), inner[0])
    end = find_end(file, file.where)
    listing = zip_listing(file, end, cache)
    group, *rest = inner
    if group not in listing.tars:
        _check_group(file, listing.folders, group)
        return ZipSource(file, end, listing.runs(group), group)
    member = open_member(file, end, listing, group)
    if member is None:
        raise _gone(file, group)
    return _open_in(member, group, rest, cache)


def _check_group(file: Readable, groups: Collection[str], group: str) -> None:
    if group not in groups:
        raise _gone(file, group)


def _gone(file: Readable, group: str) -> DataError:
    return DataError(f"{file.where}: no {group} in it any more; run plan --replace")


def open_member(file: Readable, end: End, listing: Listing, group: str) -> Readable | None:
    """Open a tar that is a member of a zip; None if it is no plain member of a safe name."""
    entry: Entry | None = None
    for begin, stop in listing.runs(group):
        for found in read_entries(file, end, begin, stop, file.where):
            folder, base, safe = place(found.name)
            if safe and found.kind == "file" and joined_path(folder, base) == group:
                entry = found  # of two of one name, unpacking leaves the last
    if entry is None:
        return None
    where = f"{file.where}{INSIDE}{group}"
    if why := entry.defect(end):
        raise DataError(f"{where}: {why}; unpack it beside the others")
    begin = content_at(file, entry, file.where)
    fingerprint = f"{entry.header} {entry.size} {entry.crc}"
    section = Section(where, file, begin, entry.packed, fingerprint)
    return section if entry.method == STORED else Inflated(where, section, RAW_DEFLATE)


def joined_path(folder: str, base: str) -> str:
    """Return the path of a member; ``folder`` may be empty."""
    return f"{folder}/{base}" if folder else base


def decompressed(file: Readable, name: str) -> Readable:
    """Return the tar in a gzip, or the file itself."""
    return Inflated(file.where, file, GZIP) if name.lower().endswith(_GZIPPED) else file


def local_archive(path: Path) -> LocalFile:
    """Open an archive on disk, or its volumes as one file."""
    files = [path] if path.is_file() else [path.parent / piece for piece in _pieces(path)]
    return LocalFile(str(path) if len(files) == 1 else f"{path} in {len(files)} parts", files)


def whole_archive(path: Path) -> Path | None:
    """Return the archive that ``path`` names, or that it is a part of; None if there is none."""
    whole = path.with_name(multipart.whole_name(path.name))
    if not whole.name.lower().endswith(ARCHIVE_SUFFIXES):
        return None
    return whole if whole.is_file() or _pieces(whole) else None


def _pieces(path: Path) -> tuple[str, ...]:
    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry in entries if multipart.is_piece(entry.name)]
    except (FileNotFoundError, NotADirectoryError):
        return ()
    return multipart.pieces(path.name, names, str(path.parent))


def is_zip(name: str) -> bool:
    """Return whether a file name is that of a zip."""
    return name.lower().endswith(".zip")


def is_archive(path: str) -> bool:
    """Return whether a source's path names an archive or a member of one."""
    return INSIDE in path or path.lower().endswith(ARCHIVE_SUFFIXES)


def archive_stem(name: str) -> str:
    """Return the base of an archive's name without its suffix."""
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
    found = _listings.pop(digest, None)
    if found is None and cache is not None and cache.size(name) is not None:
        found = Listing.from_bytes(cache.read(name), f"{cache.location}/{name}")
    if found is None:
        found = make()
        if cache is not None and found.members >= _CACHED_MEMBERS:
            cache.publish(name, found.to_bytes(), replace=True)
    _listings[digest] = found
    while len(_listings) > _KEPT_LISTINGS:
        _listings.popitem(last=False)
    return found


def _list_zip(file: Readable, end: End) -> Listing:
    collector = Collector(file.where)
    known: dict[tuple[bytes, bool], int] = {}
    for at, length, raw, utf8 in read_names(file, end.begin, end.stop, file.where):
        slash = max(raw.rfind(b"/"), raw.rfind(b"\\")) + 1
        if slash == len(raw):
            continue  # a folder's own entry
        number = known.get((raw[:slash], utf8))
        is_tar = raw.lower().endswith(_RAW_TARS)
        if is_tar or number is None or not collector.wanted(number):
            number = _collect(collector, text(raw, utf8=utf8))
        if not is_tar:
            known[raw[:slash], utf8] = number
        collector.add(number, at, length)
    if collector.members > end.entries:
        raise DataError(f"{file.where}: more members than its end tells; damaged, download again")
    return collector.listing()


def _list_tar(file: Readable) -> Listing:
    collector = Collector(file.where)
    for member in tar.members(file, file.where):
        if member.kind != "folder":
            number = _collect(collector, member.name, tars=False)
            collector.add(number, member.start, member.end - member.start)
    return collector.listing()


def _collect(collector: Collector, name: str, *, tars: bool = True) -> int:
    """Return the number of a member's group: its folder, or itself if it is a tar."""
    folder, base, _ = place(name)
    if tars and base.lower().endswith(_TARS):
        number = collector.number(joined_path(folder, base), name)
        collector.want(number, folder=False)
        return number
    number = collector.number(folder, name)
    if is_image(base):
        collector.want(number, folder=True)
    return number
