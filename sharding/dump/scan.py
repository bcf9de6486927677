"""Which movies a dump contains: names, sizes and fingerprints, without reading an image."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

from configs.errors import ConfigError, DataError
from configs.schema import Config
from sharding.dump import multipart
from sharding.dump.archives import (
    ARCHIVE_SUFFIXES,
    INSIDE,
    Dump,
    archive_stem,
    decompressed,
    is_archive,
    is_zip,
    local_archive,
    open_member,
    open_source,
    tar_listing,
    whole_archive,
    zip_listing,
)
from sharding.dump.listing import place
from sharding.dump.readers import Inflated, Readable
from sharding.dump.remote import RemoteDump
from sharding.dump.sources import is_image
from sharding.dump.zip import find_end, several_disks
from sharding.format import tar
from sharding.plan import Movie, choose, ids_by_name
from sharding.storage.base import Storage, is_url

logger = logging.getLogger(__name__)
_FOREIGN = (".tar.xz", ".tar.bz2", ".tar.zst", ".7z", ".rar")
_DEPTH = 8
_PEEKED = 100


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
    elif (whole := whole_archive(dump)) is not None:
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
        key=lambda made: (made.images or 0 if counted else made.n_bytes, is_archive(made.source)),
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
            return Movie(movie, name, path, file.fingerprint(), None, file.end())
    with open_source(dump, path, cache) as source:
        n_bytes = sum(image.size for image in source.images)
        return Movie(movie, name, path, source.fingerprint, len(source.images), n_bytes)


def _amount(movie: Movie, unit: str = "") -> str:
    return f"{movie.n_bytes} bytes" if movie.images is None else f"{movie.images}{unit}"


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
        for name in sorted({multipart.whole_name(name) for name in files}):
            if name.lower().endswith(ARCHIVE_SUFFIXES):
                self.archive(folder / name, prefix + name)
            elif name.lower().endswith(_FOREIGN):
                self._foreign.append(prefix + name)

    def urls(self, dump: RemoteDump) -> None:
        """Take the movies of archives that are read by ranges."""
        for url in dump.urls(ARCHIVE_SUFFIXES):
            with closing(dump.open(url)) as file:
                self._archive(file, url.rpartition("/")[2], url)

    def archive(self, path: Path, prefix: str) -> None:
        """Take the movies of a zip or tar on disk; ``prefix`` names it in the dump."""
        with closing(local_archive(path)) as file:
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
        if is_zip(name):
            end = find_end(file, file.where)
            listing = zip_listing(file, end, self._cache)
            for group in listing.tars:
                inner = open_member(file, end, listing, group)
                if inner is None:
                    self._others += 1
                    self._shown.append(group)
                else:
                    self._archive(inner, group, f"{prefix}{INSIDE}{group}")
        elif _is_one_movie(opened := decompressed(file, name), stem := archive_stem(name)):
            self.found[stem].append(prefix)
            return
        else:
            listing = tar_listing(opened, self._cache)
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
            movie = group.rpartition("/")[2] or archive_stem(name)
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
            archive = multipart.whole_name(entry.name).lower().endswith(ARCHIVE_SUFFIXES)
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
    for last, count in multipart.disks(files).items():
        names = [name for name in files if name.startswith(last.removesuffix("zip"))]
        n_bytes = sum((folder / name).stat().st_size for name in names)
        tail = "" if last in files else f" without the last one, {last}"
        what = f"got {count + (last in files)} disks{tail} with {n_bytes} bytes"
        raise several_disks(f"{folder / last}", what)


def dump_of(config: Config) -> Dump:
    """Return where the dump lies.

    Raises:
        ConfigError: ``data.dump`` is missing.
    """
    if config.data.dump is None:
        raise ConfigError("data.dump: got null, want the folder of key frames")
    if is_url(config.data.dump) or config.data.dump.endswith(".txt"):
        return RemoteDump(config.data.dump, config.storage)
    return Path(config.data.dump)
