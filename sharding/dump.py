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

import logging
import os
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from configs.errors import ConfigError, DataError
from sharding import parts, tar
from sharding.files import GZIP, RAW_DEFLATE, Inflated, LocalFile, Readable, Section
from sharding.forms import sha256_hex
from sharding.listing import Collector, Listing, place
from sharding.plan import Movie, choose, ids_by_name
from sharding.remote import RemoteDump
from sharding.sources import FolderSource, Image, Odd, Source, TarSource, ZipSource, is_image
from sharding.storage import Storage
from sharding.zip import (
    STORED,
    End,
    Entry,
    content_at,
    find_end,
    read_entries,
    read_names,
    several_disks,
    text,
)

__all__ = ["Dump", "Image", "Odd", "Source", "find_sources", "flaw", "open_source", "read_movies"]

logger = logging.getLogger(__name__)

Dump = Path | RemoteDump
"""A folder, zip or tar; or URLs."""

INSIDE = "::"
"""Stands between an archive and what lies in it."""

_JPEG_START = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
_TAIL_BYTES = 1024  # some writers leave a few bytes behind the end marker
_GZIPPED = (".tar.gz", ".tgz")
_TARS = (".tar", *_GZIPPED)
_RAW_TARS = tuple(suffix.encode("ascii") for suffix in _TARS)
_ARCHIVES = (".zip", *_TARS)
_FOREIGN = (".tar.xz", ".tar.bz2", ".tar.zst", ".7z", ".rar")
_DEPTH = 8
_PEEKED = 100
_KEPT_LISTINGS = 4
_CACHED_MEMBERS = 10_000
"""A smaller listing is read again as fast as it is read back."""


def flaw(jpeg: memoryview) -> str | None:
    """Say why bytes are no whole JPEG; None if they look like one. Nothing is decoded."""
    if not len(jpeg):
        return "empty"
    if jpeg[:3] != _JPEG_START:
        return "no JPEG start marker"
    if _JPEG_END not in bytes(jpeg[-_TAIL_BYTES:]):
        return "no JPEG end marker, cut"
    return None


# --- movies ---------------------------------------------------------------------------------------


def find_sources(dump: Dump, cache: Storage | None = None) -> dict[str, tuple[str, ...]]:
    """Return the sources of each movie of a dump, relative to it, by the dump's own name.

    Args:
        dump: Folder, zip, tar or URLs.
        cache: Where the listing of a large archive is kept; None means it is not.

    Raises:
        ConfigError: there is no such dump.
        DataError: there is no movie in it, or an archive is cut or lacks a part.
    """
    search = _Search(cache)
    if isinstance(dump, RemoteDump):
        search.urls(dump)
    elif dump.is_dir():
        search.folder(dump, "", _DEPTH)
    elif (whole := _whole(dump)) is not None:
        search.archive(whole, "")
    else:
        raise ConfigError(f"data.dump: no folder {dump}, and no zip or tar of this name")
    search.tell()
    found = search.found
    if not found:
        raise DataError(f"{dump}: no movie, want MOVIE.tar files or folders of JPEGs, or a zip")
    return {name: tuple(sorted(found[name])) for name in sorted(found)}


def read_movies(
    dump: Dump,
    limit: int | tuple[str, ...] | None = None,
    *,
    exclude: tuple[str, ...] = (),
    on_movie: Callable[[], None] = lambda: None,
    cache: Storage | None = None,
) -> list[Movie]:
    """Scan a dump: names, sizes and stamps of its movies, without reading an image.

    Args:
        dump: Folder, zip, tar or URLs.
        limit: Only the first n movies in order of id, or only these.
        exclude: Not these; their sources are not opened.
        on_movie: Called after each movie.
        cache: Where the listing of a large archive is kept; None means it is not.

    Raises:
        ConfigError: there is no such dump.
        DataError: no movie has an image, an archive is damaged, or a movie of ``limit`` or
            ``exclude`` is not there.
    """
    sources = find_sources(dump, cache)
    names = {movie: name for name, movie in ids_by_name(sources).items()}
    ids = choose(tuple(names), limit, exclude)
    movies: list[Movie] = []
    empty: list[str] = []
    for movie in ids:
        if isinstance(limit, int) and len(movies) == limit:
            break
        found = _read_movie(dump, movie, names[movie], sources[names[movie]], cache)
        if found.images != 0:
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
def open_source(dump: Dump, path: str, cache: Storage | None = None) -> Iterator[Source]:
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


def _read_movie(
    dump: Dump, movie: str, name: str, paths: Iterable[str], cache: Storage | None
) -> Movie:
    try:
        found = [_scan(dump, movie, name, path, cache) for path in paths]
    except DataError as error:
        raise DataError(f"{error}, or go on without it: data.exclude=[{name}]") from None
    counted = all(made.images is not None for made in found)
    # More images win; then an archive, which is read faster than a folder.
    best = max(
        found,
        key=lambda made: (made.images or 0 if counted else made.n_bytes, _is_archive(made.source)),
    )
    for other in found:
        if other is not best:
            logger.warning(
                "movie %s is there twice: taking %s (%s), not %s (%s)",
                movie, best.source, _amount(best, " images"), other.source, _amount(other),
            )  # fmt: skip
    return best


def _scan(dump: Dump, movie: str, name: str, path: str, cache: Storage | None) -> Movie:
    if isinstance(dump, RemoteDump) and INSIDE not in path:
        # Its headers stand among all the bytes: only building tells the images.
        with closing(dump.open(path)) as file:
            return Movie(movie, name, path, file.stamp(), None, file.end())
    with open_source(dump, path, cache) as source:
        n_bytes = sum(image.size for image in source.images)
        return Movie(movie, name, path, source.stamp, len(source.images), n_bytes)


def _amount(movie: Movie, unit: str = "") -> str:
    return f"{movie.n_bytes} bytes" if movie.images is None else f"{movie.images}{unit}"


# --- search ---------------------------------------------------------------------------------------


class _Search:
    """Walks over folders and archives and collects the sources of movies."""

    def __init__(self, cache: Storage | None) -> None:
        self.found: defaultdict[str, list[str]] = defaultdict(list)
        self._cache = cache
        self._foreign: list[str] = []
        self._others = 0
        self._shown: list[str] = []

    def folder(self, folder: Path, prefix: str, depth: int) -> None:
        """Take the movies of a folder that is no movie itself."""
        with os.scandir(folder) as entries:
            there = sorted(
                (entry for entry in entries if not entry.name.startswith(".")),
                key=lambda entry: entry.name,
            )
        files = [entry.name for entry in there if entry.is_file()]
        _check_disks(folder, files)
        for entry in there:
            if entry.is_dir():
                if _is_movie(entry.path, depth):
                    self.found[entry.name].append(prefix + entry.name)
                else:
                    self.folder(Path(entry.path), f"{prefix}{entry.name}/", depth - 1)
        for name in sorted({parts.whole_name(name) for name in files}):
            if name.lower().endswith(_ARCHIVES):
                self.archive(folder / name, prefix + name)
            elif name.lower().endswith(_FOREIGN):
                self._foreign.append(prefix + name)

    def urls(self, dump: RemoteDump) -> None:
        """Take the movies of archives that are read by ranges."""
        for url in dump.urls(_ARCHIVES):
            with closing(dump.open(url)) as file:
                self._archive(file, url.rpartition("/")[2], url)

    def archive(self, path: Path, prefix: str) -> None:
        """Take the movies of a zip or tar on disk; ``prefix`` names it in the dump."""
        with closing(_local(path)) as file:
            self._archive(file, path.name, prefix)

    def tell(self) -> None:
        """Say what was left out."""
        if self._foreign:
            logger.warning(
                "%d packed files of the dump are not read (%s, …): unpack them or make plain tars",
                len(self._foreign),
                self._foreign[0],
            )
        if self._others:
            logger.warning(
                "%d members of the dump's archives belong to no movie and are left out (%s, …)",
                self._others,
                self._shown[0],
            )

    def _archive(self, file: Readable, name: str, prefix: str) -> None:
        if _is_zip(name):
            end = find_end(file, file.where)
            listing = _zip_listing(file, end, self._cache)
            for group in listing.tars:
                inner = _member(file, end, listing, group)
                if inner is None:
                    self._others += 1
                    self._shown.append(group)
                else:
                    self._archive(inner, group, f"{prefix}{INSIDE}{group}")
        elif _is_one_movie(opened := _unpacked(file, name), stem := _stem(name)):
            self.found[stem].append(prefix)
            return
        else:
            listing = _tar_listing(opened, self._cache)
            if len(listing.folders) < 2 and prefix:
                self.found[stem].append(prefix)
                return
            if isinstance(opened, Inflated):
                raise DataError(
                    f"{file.where}: a gzip of {len(listing.folders)} movies can only be read from "
                    f"its start; say `gzip -dk` (or `cat PARTS | gzip -d > {stem}.tar`), "
                    f"{opened.end()} bytes, and use the tar"
                )
        for group in listing.folders:
            movie = group.rpartition("/")[2] or _stem(name)
            self.found[movie].append(f"{prefix}{INSIDE}{group}")
        self._others += listing.others
        self._shown += listing.shown


def _is_movie(path: str, depth: int) -> bool:
    """Tell whether a folder is a movie: it has an image, or nothing to look into."""
    inner = False
    with os.scandir(path) as entries:
        for entry in entries:
            if is_image(entry.name):
                return True
            hidden = entry.name.startswith(".")
            archive = parts.whole_name(entry.name).lower().endswith(_ARCHIVES)
            inner = inner or (not hidden and (archive or entry.is_dir()))
    return not inner or depth == 0


def _is_one_movie(file: Readable, stem: str) -> bool:
    """Tell from its first image whether a tar named ``stem`` is that movie.

    A damaged one counts as such: opening it tells.
    """
    try:
        for k, member in enumerate(tar.members(file, file.where)):
            folder, base, _ = place(member.name)
            if is_image(base):
                return folder.rpartition("/")[2] in ("", stem)
            if k == _PEEKED:
                break
    except DataError:
        return True
    return False


def _check_disks(folder: Path, files: list[str]) -> None:
    for last, count in parts.disks(files).items():
        names = [name for name in files if name.startswith(last.removesuffix("zip"))]
        n_bytes = sum((folder / name).stat().st_size for name in names)
        tail = "" if last in files else f" without the last one, {last}"
        what = f"got {count + (last in files)} disks{tail} with {n_bytes} bytes"
        raise several_disks(f"{folder / last}", what)


# --- opening --------------------------------------------------------------------------------------


def _open(dump: Dump, path: str, cache: Storage | None) -> Source:
    outer, *inner = path.split(INSIDE)
    if isinstance(dump, RemoteDump):
        return _open_in(dump.open(outer), outer.rpartition("/")[2], inner, cache)
    full = dump / outer if outer else dump
    if not inner and full.is_dir():
        return FolderSource(full)
    whole = _whole(full)
    if whole is None:
        raise DataError(f"{full}: gone since it was planned; run plan --replace")
    file = _local(whole)
    try:
        return _open_in(file, whole.name, inner, cache)
    except BaseException:
        file.close()
        raise


def _open_in(file: Readable, name: str, inner: list[str], cache: Storage | None) -> Source:
    if not _is_zip(name):
        opened = _unpacked(file, name)
        if not inner:
            return TarSource(opened)
        folders = _tar_listing(opened, cache)
        _check_group(file, folders.folders, inner[0])
        return TarSource(opened, folders.runs(inner[0]), inner[0])
    end = find_end(file, file.where)
    listing = _zip_listing(file, end, cache)
    group, *rest = inner
    if group not in listing.tars:
        _check_group(file, listing.folders, group)
        return ZipSource(file, end, listing.runs(group), group)
    member = _member(file, end, listing, group)
    if member is None:
        raise _gone(file, group)
    return _open_in(member, group, rest, cache)


def _check_group(file: Readable, groups: Collection[str], group: str) -> None:
    if group not in groups:
        raise _gone(file, group)


def _gone(file: Readable, group: str) -> DataError:
    return DataError(f"{file.where}: no {group} in it any more; run plan --replace")


def _member(file: Readable, end: End, listing: Listing, group: str) -> Readable | None:
    """Open a tar that is a member of a zip; None if it is no plain member of a safe name."""
    entry: Entry | None = None
    for begin, stop in listing.runs(group):
        for found in read_entries(file, end, begin, stop, file.where):
            folder, base, safe = place(found.name)
            if safe and found.kind == "file" and _joined(folder, base) == group:
                entry = found  # of two of one name, unpacking leaves the last
    if entry is None:
        return None
    where = f"{file.where}{INSIDE}{group}"
    if why := entry.flaw(end):
        raise DataError(f"{where}: {why}; unpack it beside the others")
    begin = content_at(file, entry, file.where)
    stamp = f"{entry.header} {entry.size} {entry.crc}"
    section = Section(where, file, begin, entry.packed, stamp)
    return section if entry.method == STORED else Inflated(where, section, RAW_DEFLATE)


def _joined(folder: str, base: str) -> str:
    return f"{folder}/{base}" if folder else base


def _unpacked(file: Readable, name: str) -> Readable:
    return Inflated(file.where, file, GZIP) if name.lower().endswith(_GZIPPED) else file


def _local(path: Path) -> LocalFile:
    files = [path] if path.is_file() else [path.parent / piece for piece in _pieces(path)]
    return LocalFile(str(path) if len(files) == 1 else f"{path} in {len(files)} parts", files)


def _whole(path: Path) -> Path | None:
    """Return the archive that ``path`` names, or that it is a part of; None if there is none."""
    whole = path.with_name(parts.whole_name(path.name))
    if not whole.name.lower().endswith(_ARCHIVES):
        return None
    return whole if whole.is_file() or _pieces(whole) else None


def _pieces(path: Path) -> tuple[str, ...]:
    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry in entries if parts.is_piece(entry.name)]
    except (FileNotFoundError, NotADirectoryError):
        return ()
    return parts.pieces(path.name, names, str(path.parent))


def _is_zip(name: str) -> bool:
    return name.lower().endswith(".zip")


def _is_archive(path: str) -> bool:
    return INSIDE in path or path.lower().endswith(_ARCHIVES)


def _stem(name: str) -> str:
    """Return the base of an archive's name without its suffix."""
    base = name.rpartition("/")[2]
    suffix = next((s for s in (".zip", *_GZIPPED, ".tar") if base.lower().endswith(s)), "")
    return base[: len(base) - len(suffix)]


# --- listings -------------------------------------------------------------------------------------

_listings: OrderedDict[str, Listing] = OrderedDict()


def _zip_listing(file: Readable, end: End, cache: Storage | None) -> Listing:
    return _listing(file, cache, lambda: _list_zip(file, end))


def _tar_listing(file: Readable, cache: Storage | None) -> Listing:
    return _listing(file, cache, lambda: _list_tar(file))


def _listing(file: Readable, cache: Storage | None, make: Callable[[], Listing]) -> Listing:
    """Return the listing of an archive: from this process, the cache, or the archive."""
    digest = sha256_hex(f"{file.where}\n{file.stamp()}".encode("utf-8", "surrogateescape"))
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
        number = collector.number(_joined(folder, base), name)
        collector.want(number, folder=False)
        return number
    number = collector.number(folder, name)
    if is_image(base):
        collector.want(number, folder=True)
    return number
