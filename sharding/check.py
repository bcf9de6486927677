"""Looks a dump over before anything is built: listings and headers, with ``decode`` every image.

What is found is judged in ``findings``; this is where it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from configs.errors import ConfigError, DataError, MovieNetError
from configs.runtime.progress import progress
from configs.schema import Config, DataConfig
from sharding.check_report import Contents, Facts, Film, Report, choose_taken, contents, judge
from sharding.dump.archives import Dump, open_source
from sharding.dump.jpeg import jpeg_defect, undecodable
from sharding.dump.scan import dump_of, find_sources
from sharding.dump.sources import Image, MovieSource
from sharding.format.names import movie_id
from sharding.label_files import read_metadata_at, read_split_at
from sharding.labels import Fold, make_labels
from sharding.plan import choose, ids_by_name
from sharding.storage.base import Storage

CHECK = "check.json"
THREADS = 4
"""Decoding frees the interpreter lock."""

BATCH = 64
"""Images that are in memory at once."""


def check_dump(config: Config, *, decode: bool = False, cache: Storage | None = None) -> Report:
    """Look a dump over; no report is written.

    Args:
        config: Says where dump, metadata and split lie. Looks at the movies that ``data.limit`` and
            ``data.exclude`` leave.
        decode: Read and decode every image.
        cache: Where the listing of a large archive is kept; None means it is not.

    Raises:
        ConfigError: there is no dump.
    """
    dump, data = dump_of(config), config.data
    films: list[Film] = []
    unusable: list[str] = []
    try:
        films = _films(_Dump(dump, cache), data, decode=decode)
    except DataError as error:
        unusable.append(str(error))
    facts = _facts(data, [film.movie for film in films if film.taken.images], unusable)
    return judge(
        films,
        facts,
        unusable=unusable,
        decoded=decode,
        max_bad_fraction=config.sharding.max_bad_fraction,
    )


def publish_report(storage: Storage, report: Report) -> None:
    """Write ``check.json``; one that stands there is replaced."""
    storage.publish(CHECK, report.to_bytes(), replace=True)


# --- images ---------------------------------------------------------------------------------------


class _Dump(NamedTuple):
    place: Dump
    cache: Storage | None

    def open(self, path: str) -> AbstractContextManager[MovieSource]:
        return open_source(self.place, path, self.cache)

    def reason(self, error: DataError | OSError, path: str) -> str:
        """Return an error's words without the place of the dump."""
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return text.removeprefix(f"{self.place / path}: ").replace(f"{self.place}/", "")


def _films(dump: _Dump, data: DataConfig, *, decode: bool) -> list[Film]:
    sources = find_sources(dump.place, dump.cache)
    names = {movie: name for name, movie in ids_by_name(sources).items()}
    ids = choose(tuple(names), data.limit, data.exclude)
    films: list[Film] = []
    found = 0
    with progress(None, label="check", unit="movies") as bar, _pool() as pool:
        for movie in ids:
            if found == data.limit:  # as a plan does: the first so many movies that have images
                break
            film = _film(dump, movie, sources[names[movie]], pool if decode else None)
            films.append(film)
            found += film.taken.images > 0
            bar.advance()
    return films


@contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="decode")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _film(
    dump: _Dump, movie: str, paths: Sequence[str], decoders: ThreadPoolExecutor | None
) -> Film:
    """Look at a movie's sources; decode the one that is taken, while it is open."""
    if decoders and len(paths) == 1:
        return choose_taken(movie, [_contents(dump, paths[0], decoders)])
    film = choose_taken(movie, [_contents(dump, path) for path in paths])
    if not decoders:
        return film
    return replace(film, taken=_contents(dump, film.taken.source, decoders))


def _contents(dump: _Dump, path: str, decoders: ThreadPoolExecutor | None = None) -> Contents:
    folder = isinstance(dump.place, Path) and (dump.place / path).is_dir()
    try:
        with dump.open(path) as source:
            found = contents(path, source.images, source.odd, folder=folder)
            return replace(found, bad=_bad(source, decoders)) if decoders else found
    except (DataError, OSError) as error:
        return Contents(path, folder=folder, error=dump.reason(error, path))


def _bad(source: MovieSource, decoders: ThreadPoolExecutor) -> dict[str, str]:
    """Return every image that is not whole, and why."""
    bad: dict[str, str] = {}
    for some in _batches(source.images):
        # One thread reads: a packed source can only be read from its start.
        read = [_read(source, image) for image in some]
        for image, why in zip(some, decoders.map(_why_bad, read), strict=True):
            if why is not None:
                bad[image.member] = why
    return bad


def _batches(images: Sequence[Image]) -> Iterator[Sequence[Image]]:
    return (images[k : k + BATCH] for k in range(0, len(images), BATCH))


def _read(source: MovieSource, image: Image) -> tuple[str | None, memoryview]:
    room = memoryview(bytearray(image.size))
    return source.read_into(image, room), room


def _why_bad(read: tuple[str | None, memoryview]) -> str | None:
    why, jpeg = read
    return why or jpeg_defect(jpeg) or undecodable(jpeg)


# --- metadata and split ---------------------------------------------------------------------------


def _facts(data: DataConfig, movies: Sequence[str], unusable: list[str]) -> Facts:
    """Read metadata and split; what stops the road is added to ``unusable``."""
    damaged: dict[str, str] = {}
    genres: Mapping[str, Sequence[str]] | None = None
    split: dict[str, str] | Fold | None = None
    try:
        genres = _genres(data, movies, damaged)
    except MovieNetError as error:
        unusable.append(str(error))
    left_out = {movie_id(name) for name in data.exclude}
    try:
        split = None if data.split is None else read_split_at(data.split)
        if isinstance(split, Fold) and genres is not None:
            make_labels(movies, data.genres, genres, split)  # tells whether there are enough
    except MovieNetError as error:
        unusable.append(str(error))
    return Facts(
        vocabulary=data.genres,
        genres=genres,
        damaged=damaged,
        split={m: s for m, s in split.items() if m not in left_out}
        if isinstance(split, dict)
        else None,
        whole=data.limit is None,
    )


def _genres(
    data: DataConfig, movies: Sequence[str], damaged: dict[str, str]
) -> Mapping[str, Sequence[str]]:
    if data.metadata is None:
        raise ConfigError("data.metadata: got null, labels are made from it")
    return read_metadata_at(Path(data.metadata), data.genres, movies, damaged=damaged)
