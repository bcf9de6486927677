"""Which movies a dump contains: names, sizes and fingerprints; no image is read."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from configs.errors import ConfigError, DataError, error_text
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
from sharding.dump.junk import is_junk
from sharding.dump.key_frames import estimated_bytes, video_fingerprint
from sharding.dump.listing import Listing, place
from sharding.dump.readers import Inflated, Readable
from sharding.dump.remote import RemoteDump
from sharding.dump.sources import MovieSource, is_image, lost_images
from sharding.dump.video import is_video
from sharding.dump.zip import End, find_end, several_disks
from sharding.format import tar
from sharding.format.names import movie_id
from sharding.plan import Movie, choose, ids_by_name, unreadable_movies
from sharding.storage.base import Storage, is_url

logger = logging.getLogger(__name__)
_UNSUPPORTED = (".tar.xz", ".tar.bz2", ".tar.zst", ".7z", ".rar")
_MAX_DEPTH = 8
_FIRST_MEMBERS = 100
_MANY_ARCHIVES = 200


class Sources(NamedTuple):
    """Result of the search of a dump."""

    by_name: dict[str, tuple[str, ...]]
    """The sources of each movie, relative to the dump, by the movie's name in the dump."""

    unreadable: dict[str, str]
    """Reason for each of these sources that could not be searched: its movie is named after it."""

    unsupported: tuple[str, ...]
    """Archives of formats that are not read; the movies in them are unknown."""


def find_sources(
    dump: Dump, cache: Storage | None = None, exclude: Collection[str] = ()
) -> Sources:
    """Return the sources of all movies.

    A folder or archive that cannot be read does not stop the search: it counts as a source of the
    movie of its name.

    Args:
        dump: Folder, zip, tar or URLs.
        cache: Storage for the listings of large archives; None: they are not cached.
        exclude: Names or ids. Sources with these names are found, but not opened.

    Raises:
        ConfigError: the dump does not exist.
        DataError: the dump contains no movie, or it is a single archive that is truncated or lacks
            a part.
        OSError: the dump itself cannot be read.
    """
    search = _Search(cache, exclude)
    if isinstance(dump, RemoteDump):
        search.urls(dump)
    elif dump.is_dir():
        search.dump(dump)
    elif (archive := whole_archive(dump)) is not None:
        search.archive(archive, "")
    else:
        raise ConfigError(f"data.dump: no folder {dump}, and no zip or tar of this name")
    search.report_skipped()
    sources = search.sources
    if not sources:
        names = search.examples
        got = f" (e.g. {names[0]}; want images named shot_0000_img_0.jpg)" if names else ""
        raise DataError(
            f"{dump}: no movie{got}, want MOVIE.tar files, folders of JPEGs, videos, or a zip"
        )
    by_name = {name: tuple(sorted(sources[name])) for name in sorted(sources)}
    return Sources(by_name, search.unreadable, tuple(search.unsupported))


def read_movies(
    dump: Dump,
    limit: int | tuple[str, ...] | None = None,
    *,
    exclude: tuple[str, ...] = (),
    on_movie: Callable[[], None] = lambda: None,
    cache: Storage | None = None,
) -> list[Movie]:
    """Return names, sizes and fingerprints of a dump's movies; no image is read.

    Args:
        dump: Folder, zip, tar or URLs.
        limit: Only the first N movies in order of id, or only the movies with these ids.
        exclude: Ids of movies to leave out; their sources are not opened.
        on_movie: Called after each movie.
        cache: Storage for the listings of large archives; None: they are not cached.

    Raises:
        ConfigError: the dump does not exist.
        DataError: no movie has an image, sources cannot be read, or a movie of ``limit`` or
            ``exclude`` does not exist. All sources are tried, so that the error names all movies.
        OSError: the dump itself cannot be read.
    """
    sources = find_sources(dump, cache, exclude)
    names = {movie: name for name, movie in ids_by_name(sources.by_name).items()}
    ids = choose(tuple(names), limit, exclude)
    movies: list[Movie] = []
    empty: list[str] = []
    unreadable: dict[str, str] = {}
    for movie in ids:
        if isinstance(limit, int) and len(movies) == limit:
            break
        try:
            candidate = _read_movie(dump, movie, names[movie], sources, cache)
        except (DataError, OSError) as error:
            unreadable[movie] = error_text(error)
            continue
        if candidate.images != 0:
            movies.append(candidate)
        else:
            empty.append(movie)
        on_movie()
    if unreadable:
        raise unreadable_movies(unreadable)
    if empty:
        logger.warning("movies without an image are left out: %s", _summary(empty, len(empty)))
    if not movies:
        raise DataError(f"{dump}: got no image in any movie, want images named shot_0000_img_0.jpg")
    return movies


def _read_movie(
    dump: Dump, movie: str, name: str, sources: Sources, cache: Storage | None
) -> Movie:
    paths = sources.by_name[name]
    if reasons := [sources.unreadable[path] for path in paths if path in sources.unreadable]:
        raise DataError(reasons[0])
    candidates = [_scan(dump, movie, name, path, cache) for path in paths]
    counted = all(candidate.images is not None for candidate in candidates)
    # Key frames before a video; then more images; then an archive, read faster than a folder.
    best = max(
        candidates,
        key=lambda candidate: (
            not is_video(candidate.source),
            (candidate.images or 0) if counted else candidate.n_bytes,
            is_archive(candidate.source),
        ),
    )
    for other in candidates:
        if other is not best:
            logger.warning(
                "movie %s has two sources: using %s (%s), not %s (%s)",
                movie, best.source, _amount(best, " images"), other.source, _amount(other),
            )  # fmt: skip
    return best


def _scan(dump: Dump, movie: str, name: str, path: str, cache: Storage | None) -> Movie:
    if isinstance(dump, RemoteDump) and INSIDE not in path:
        # Headers of a tar are spread over the file: listing them would download all of it.
        with closing(dump.open(path)) as file:
            return Movie(movie, name, path, file.fingerprint(), None, file.end())
    if isinstance(dump, Path) and is_video(path):
        # Its images are known after decoding all of it.
        video = dump / path
        return Movie(movie, name, path, video_fingerprint(video), None, estimated_bytes(video))
    with open_source(dump, path, cache) as source:
        _check_images(source, f"{dump / path}".replace(f"/{INSIDE}", INSIDE), path)
        n_bytes = sum(image.size for image in source.images)
        return Movie(movie, name, path, source.fingerprint, len(source.images), n_bytes)


def _check_images(source: MovieSource, where: str, path: str) -> None:
    """Raise ``DataError`` if a movie has images, but none that can be read."""
    n_lost = lost_images(source)
    if n_lost and not source.images:
        reason = next(member.reason for member in source.skipped if member.is_lost)
        archive = "unpack the archive, and set data.dump to its folder"
        remedy = archive if is_archive(path) else "repair it"
        raise DataError(f"{where}: none of its {n_lost} images can be read ({reason}); {remedy}")


def _amount(movie: Movie, unit: str = "") -> str:
    return f"{movie.n_bytes} bytes" if movie.images is None else f"{movie.images}{unit}"


class _Search:
    """A search through folders and archives that collects the sources of movies."""

    def __init__(self, cache: Storage | None, exclude: Collection[str]) -> None:
        self.sources: defaultdict[str, list[str]] = defaultdict(list)
        self.unreadable: dict[str, str] = {}
        self.unsupported: list[str] = []
        self._cache = cache
        self._excluded = set(map(movie_id, exclude))
        self._searched: set[str] = set()
        self._repeated: list[str] = []
        self._others = 0
        self.examples: list[str] = []

    def dump(self, folder: Path) -> None:
        """Add the movies of a dump that is a folder."""
        real = folder.resolve()
        # A link to a folder above the dump would lead back into it.
        self._searched.update(map(str, [real, *real.parents]))
        self._folder(folder, "", _MAX_DEPTH)

    def urls(self, dump: RemoteDump) -> None:
        """Add the movies of remote archives."""
        urls = dump.urls(ARCHIVE_SUFFIXES)
        _announce(urls, dump)
        for url in urls:
            name = url.rpartition("/")[2]
            with self._source(archive_stem(name), url) as is_wanted:
                if is_wanted:
                    with closing(dump.open(url)) as file:
                        self._archive(file, name, url)

    def archive(self, path: Path, prefix: str) -> None:
        """Add the movies of a zip or tar on disk; ``prefix`` is its path in the dump."""
        with closing(local_archive(path)) as file:
            self._archive(file, path.name, prefix)

    def report_skipped(self) -> None:
        """Warn about skipped files, folders and members."""
        if self._repeated:
            logger.warning(
                "folders that are read already, by another name or link, are skipped: %s",
                _summary(self._repeated, len(self._repeated)),
            )
        if self.unsupported:
            logger.warning(
                "compressed files of the dump are not read: %s; unpack them, or repack them as "
                "plain tars",
                _summary(self.unsupported, len(self.unsupported)),
            )
        if self._others:
            logger.warning(
                "members of the dump's archives that belong to no movie are skipped: %s",
                _summary(self.examples, self._others),
            )

    @contextmanager
    def _source(self, name: str, path: str) -> Iterator[bool]:
        """Record a source that is excluded or fails under its own name; yield whether to open it.

        Args:
            name: Name of the movie, if the source is one.
            path: Path of the source in the dump.
        """
        if self._excluded and _id_of(name) in self._excluded:
            self.sources[name].append(path)
            yield False
            return
        try:
            yield True
        except (DataError, OSError) as error:
            self.sources[name].append(path)
            self.unreadable[path] = error_text(error)

    def _folder(self, folder: Path, prefix: str, depth: int) -> None:
        """Add the movies of a folder that is not a movie itself."""
        with os.scandir(folder) as entries:
            visible = sorted(
                (entry for entry in entries if not is_junk(entry.name)),
                key=lambda entry: entry.name,
            )
        real = os.path.realpath(folder)
        folders = {entry.name: entry for entry in visible if _is_folder(entry)}
        for entry in folders.values():
            with self._source(entry.name, prefix + entry.name) as is_wanted:
                if is_wanted:
                    self._subfolder(entry, real, prefix, depth)
        # Broken links and pipes included, which opening reports.
        self._files(folder, prefix, [entry.name for entry in visible if entry.name not in folders])

    def _subfolder(self, entry: os.DirEntry[str], parent: str, prefix: str, depth: int) -> None:
        real = os.path.realpath(entry.path) if entry.is_symlink() else f"{parent}/{entry.name}"
        if real in self._searched:
            self._repeated.append(prefix + entry.name)
        elif _is_movie(entry.path, depth):
            self._searched.add(real)
            self.sources[entry.name].append(prefix + entry.name)
        else:
            self._searched.add(real)
            self._folder(Path(entry.path), f"{prefix}{entry.name}/", depth - 1)

    def _files(self, folder: Path, prefix: str, files: list[str]) -> None:
        names = sorted({multipart.whole_name(name) for name in files})
        archives = [name for name in names if name.lower().endswith(ARCHIVE_SUFFIXES)]
        disks = multipart.disks(files)
        _announce(archives, folder)
        for name in sorted({*archives, *disks}):
            with self._source(archive_stem(name), prefix + name) as is_wanted:
                if is_wanted and name in disks:
                    raise _split_zip(folder, name, files)
                if is_wanted:
                    self.archive(folder / name, prefix + name)
        for name in filter(is_video, names):
            self.sources[name.rpartition(".")[0]].append(prefix + name)
        self.unsupported += [prefix + name for name in names if name.lower().endswith(_UNSUPPORTED)]

    def _archive(self, file: Readable, name: str, prefix: str) -> None:
        if is_zip(name):
            end = find_end(file, file.where)
            listing = zip_listing(file, end, self._cache)
            for group in listing.tars:
                path = f"{prefix}{INSIDE}{group}"
                with self._source(archive_stem(group), path) as is_wanted:
                    if is_wanted:
                        self._tar_in_zip(file, end, listing, group, path)
        elif _is_one_movie(opened := decompressed(file, name), stem := archive_stem(name)):
            self.sources[stem].append(prefix)
            return
        else:
            listing = tar_listing(opened, self._cache)
            if len(listing.folders) < 2 and prefix:
                self.sources[stem].append(prefix)
                return
            if isinstance(opened, Inflated):
                raise DataError(
                    f"{file.where}: got a .tar.gz of {len(listing.folders)} movies, but gzip "
                    f"allows no random access; decompress it ({opened.end()} bytes) with "
                    f"`gzip -dk` (parts: `cat PARTS | gzip -d > {stem}.tar`), then use the tar"
                )
        for group in listing.folders:
            movie = group.rpartition("/")[2] or archive_stem(name)
            self.sources[movie].append(f"{prefix}{INSIDE}{group}")
        self._others += listing.others
        self.examples += listing.shown

    def _tar_in_zip(
        self, file: Readable, end: End, listing: Listing, group: str, path: str
    ) -> None:
        inner = open_member(file, end, listing, group)
        if inner is None:
            self._others += 1
            self.examples.append(group)
        else:
            self._archive(inner, group, path)


def _id_of(name: str) -> str | None:
    """Return the id of a movie of this name; None if it cannot be one."""
    try:
        return movie_id(name)
    except DataError:
        return None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link to itself; opening it reports any other error


def _is_movie(path: str, depth: int) -> bool:
    """Return whether a folder is a movie: it contains an image, or nothing to search."""
    inner = False
    with os.scandir(path) as entries:
        for entry in entries:
            if is_image(entry.name):
                return True
            archive = multipart.whole_name(entry.name).lower().endswith(ARCHIVE_SUFFIXES)
            searched = archive or is_video(entry.name) or _is_folder(entry)
            inner = inner or (not is_junk(entry.name) and searched)
    return not inner or depth == 0


def _is_one_movie(file: Readable, stem: str) -> bool:
    """Return whether a tar named ``stem`` is that movie, judged by its first image.

    A corrupt tar counts as a movie: opening it raises the error that names it.
    """
    try:
        for k, member in enumerate(tar.members(file, file.where)):
            folder, base, _ = place(member.name)
            if is_image(base):
                return folder.rpartition("/")[2] in ("", stem)
            if k == _FIRST_MEMBERS:
                break
    except DataError:
        return True
    return False


def _summary(names: list[str], count: int) -> str:
    """Return the first of ``count`` names, and the number of the others."""
    return names[0] if count == 1 else f"{names[0]} and {count - 1:,} more"


def _announce(archives: list[str], dump: object) -> None:
    if len(archives) > _MANY_ARCHIVES:
        logger.info("searching %d archives of %s for movies", len(archives), dump)


def _split_zip(folder: Path, last: str, files: list[str]) -> DataError:
    names = [name for name in files if name.startswith(last.removesuffix("zip"))]
    n_bytes = sum((folder / name).stat().st_size for name in names)
    n_disks = multipart.disks(files)[last] + (last in files)
    tail = "" if last in files else f" without the last one, {last}"
    return several_disks(f"{folder / last}", f"got {n_disks} disks{tail} with {n_bytes} bytes")


def dump_of(config: Config) -> Dump:
    """Return the dump of a configuration.

    Raises:
        ConfigError: ``data.dump`` is missing.
    """
    if config.data.dump is None:
        raise ConfigError("data.dump: got null, want the folder of key frames or videos")
    if is_url(config.data.dump) or config.data.dump.endswith(".txt"):
        return RemoteDump(config.data.dump, config.storage)
    return Path(config.data.dump)
