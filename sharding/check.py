"""Check of a dump before the build: reads listings and headers, with ``decode`` every image.

This module reads; ``check_report`` judges.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from configs.errors import ConfigError, DataError, MovieNetError, error_text
from configs.runtime.progress import progress
from configs.schema import Config, DataConfig
from sharding.check_report import (
    CheckedMovie,
    Contents,
    Facts,
    Report,
    choose_source,
    contents,
    judge,
)
from sharding.dump.archives import Dump, open_source
from sharding.dump.jpeg import MAX_IMAGE_BYTES, jpeg_defect, undecodable
from sharding.dump.scan import Sources, dump_of, find_sources
from sharding.dump.sources import Image, MovieSource
from sharding.format.names import movie_id
from sharding.label_files import read_metadata_at, read_split_at
from sharding.labels import Fold, make_labels
from sharding.plan import choose, ids_by_name
from sharding.storage.base import Storage

logger = logging.getLogger(__name__)

CHECK = "check.json"
THREADS = 4
"""Decoding threads; decoding releases the interpreter lock."""

BATCH = 64
"""Images in memory at the same time, unless they are so large that fewer fill a buffer."""


def check_dump(config: Config, *, decode: bool = False, cache: Storage | None = None) -> Report:
    """Check a dump and return the report; writes no report.

    Args:
        config: Locations of dump, metadata and split. ``data.limit`` and ``data.exclude`` select
            the movies.
        decode: Read and decode every image.
        cache: Storage that caches the listing of a large archive; None disables the cache.

    Raises:
        ConfigError: ``data.dump`` is not set.
    """
    dump, data = dump_of(config), config.data
    movies: list[CheckedMovie] = []
    unusable: list[str] = []
    unsupported: tuple[str, ...] = ()
    try:
        logger.info("listing %s", dump)
        sources = find_sources(dump, cache, data.exclude)
        unsupported = sources.unsupported
        movies = _movies(_Dump(dump, cache, sources), data, decode=decode)
    except (ConfigError, DataError, OSError) as error:  # no such folder, or nothing in it
        unusable.append(error_text(error))
    facts = _facts(data, [movie.movie for movie in movies if movie.chosen.images], unusable)
    return judge(
        movies,
        facts,
        unusable=unusable,
        unsupported=unsupported,
        decoded=decode,
        max_bad_fraction=config.sharding.max_bad_fraction,
    )


def publish_report(storage: Storage, report: Report) -> None:
    """Write ``check.json``, replacing an existing one."""
    storage.publish(CHECK, report.to_bytes(), replace=True)


# --- images ---------------------------------------------------------------------------------------


class _Dump(NamedTuple):
    location: Dump
    cache: Storage | None
    sources: Sources

    def open(self, path: str) -> AbstractContextManager[MovieSource]:
        return open_source(self.location, path, self.cache)

    def reason(self, text: str, path: str) -> str:
        """Return the message of an error without the location of the dump."""
        return text.removeprefix(f"{self.location / path}: ").replace(f"{self.location}/", "")


def _movies(dump: _Dump, data: DataConfig, *, decode: bool) -> list[CheckedMovie]:
    sources = dump.sources.by_name
    names = {movie: name for name, movie in ids_by_name(sources).items()}
    ids = choose(tuple(names), data.limit, data.exclude)
    limit = data.limit if isinstance(data.limit, int) else len(ids)
    movies: list[CheckedMovie] = []
    n_with_images = 0
    with progress(min(limit, len(ids)), label="check", unit="movies") as bar, _pool() as pool:
        for movie in ids:
            # A numeric limit counts movies with images only, as in a plan.
            if n_with_images == data.limit:
                break
            checked = _movie(dump, movie, sources[names[movie]], pool if decode else None)
            movies.append(checked)
            n_with_images += checked.chosen.images > 0
            bar.advance(int(checked.chosen.images > 0 or limit >= len(ids)))
    return movies


@contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="decode")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _movie(
    dump: _Dump, movie: str, paths: Sequence[str], decoders: ThreadPoolExecutor | None
) -> CheckedMovie:
    """List a movie's sources; decode the images of the one that a build uses."""
    # A remote source is downloaded by each pass: list and decode a single one in the same pass.
    if decoders and len(paths) == 1:
        return choose_source(movie, [_contents(dump, paths[0], decoders)])
    checked = choose_source(movie, [_contents(dump, path) for path in paths])
    if not decoders:
        return checked
    return replace(checked, chosen=_contents(dump, checked.chosen.source, decoders))


def _contents(dump: _Dump, path: str, decoders: ThreadPoolExecutor | None = None) -> Contents:
    folder = isinstance(dump.location, Path) and (dump.location / path).is_dir()
    if reason := dump.sources.unreadable.get(path):
        return Contents(path, folder=folder, error=dump.reason(reason, path))
    try:
        with dump.open(path) as source:
            listed = contents(path, source.images, source.skipped, folder=folder)
            listed = replace(listed, joined=source.joined)
            return replace(listed, bad=_bad(source, decoders)) if decoders else listed
    except (DataError, OSError) as error:
        return Contents(path, folder=folder, error=dump.reason(error_text(error), path))


def _bad(source: MovieSource, decoders: ThreadPoolExecutor) -> dict[str, str]:
    """Return the reason for each corrupt image, by its member name."""
    bad: dict[str, str] = {}
    for batch in _batches(source.images):
        # Only this thread reads: a compressed source allows no random access.
        images = [_read(source, image) for image in batch]
        for image, reason in zip(batch, decoders.map(_defect, images), strict=True):
            if reason is not None:
                bad[image.member] = reason
    return bad


def _batches(images: Sequence[Image]) -> Iterator[Sequence[Image]]:
    """Yield images in batches of at most ``BATCH``, and of as many bytes as one image may have."""
    begin = n_bytes = 0
    for k, image in enumerate(images):
        if k - begin == BATCH or n_bytes + image.size > MAX_IMAGE_BYTES:
            yield images[begin:k]
            begin, n_bytes = k, 0
        n_bytes += image.size
    yield images[begin:]


def _read(source: MovieSource, image: Image) -> tuple[str | None, memoryview]:
    """Return the read defect of an image (None if there is none) and its bytes."""
    buffer = memoryview(bytearray(image.size))
    return source.read_into(image, buffer), buffer


def _defect(image: tuple[str | None, memoryview]) -> str | None:
    read_defect, jpeg = image
    return read_defect or jpeg_defect(jpeg) or undecodable(jpeg)


# --- metadata and split ---------------------------------------------------------------------------


def _facts(data: DataConfig, movies: Sequence[str], unusable: list[str]) -> Facts:
    """Read metadata and split; add errors that make the dump unusable to ``unusable``."""
    damaged: dict[str, str] = {}
    genres: Mapping[str, Sequence[str]] | None = None
    split: dict[str, str] | Fold | None = None
    try:
        genres = _genres(data, movies, damaged)
    except (MovieNetError, OSError) as error:
        unusable.append(error_text(error))
    excluded = {movie_id(name) for name in data.exclude}
    try:
        split = None if data.split is None else read_split_at(data.split)
        if isinstance(split, Fold) and genres is not None:
            # Raises if there are fewer labelled movies than folds.
            make_labels(movies, data.genres, genres, split)
    except (MovieNetError, OSError) as error:
        unusable.append(error_text(error))
    return Facts(
        vocabulary=data.genres,
        genres=genres,
        damaged=damaged,
        split={m: s for m, s in split.items() if m not in excluded}
        if isinstance(split, dict)
        else None,
        is_complete=data.limit is None,
    )


def _genres(
    data: DataConfig, movies: Sequence[str], damaged: dict[str, str]
) -> Mapping[str, Sequence[str]]:
    if data.metadata is None:
        raise ConfigError("data.metadata: got null, want a folder or file of genres for the labels")
    return read_metadata_at(Path(data.metadata), data.genres, movies, damaged=damaged)
