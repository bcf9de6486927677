"""Reads metadata and split files where the configuration says; ``labels`` makes sense of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from configs.errors import ConfigError, DataError
from configs.schema import DataConfig
from sharding.features import open_index
from sharding.format.names import LABELS, movie_id
from sharding.labels import (
    Findings,
    Fold,
    Labels,
    make_labels,
    parse_fold,
    read_genres,
    read_metadata,
    read_split,
)
from sharding.storage.base import Storage

logger = logging.getLogger(__name__)

_NAMED = 5
_TABLES = (".json", ".pkl", ".pickle")


def labels_reader(data: DataConfig) -> Callable[[Sequence[str]], Labels]:
    """Return what gives the labels of a feature set's movies, for ``seal_features``.

    The files are read when it is called. What was odd about them is logged.

    Raises:
        ConfigError: ``data.metadata`` or the split file is missing, or ``data.split`` is no fold.
        DataError: the split file is damaged, or names a movie in two splits.
    """
    if data.split is not None:
        read_split_at(data.split)  # told now, and not when the set is complete
    if data.metadata is None:
        raise ConfigError(
            "data.metadata: got null, want a folder of JSON files, a .json or a .pkl; "
            "labels are made from it"
        )
    _check_metadata(Path(data.metadata))

    def labels_for(movies: Sequence[str]) -> Labels:
        labels, findings = read_labels(data, movies)
        log_findings(findings)
        return labels

    return labels_for


def warn_of_other_labels(data: DataConfig, storage: Storage) -> None:
    """Say so where a sealed set has other labels than ``data`` gives today.

    That may be meant, after ``relabel``; so nothing is refused, and nothing is replaced.
    """
    if storage.size(LABELS) is None:
        return
    where = f"{storage.location}/{LABELS}"
    stored = Labels.from_bytes(storage.read(LABELS), where)
    today, _ = read_labels(data, open_index(storage)[1].movies)
    if stored.digest != today.digest:
        logger.warning(
            "%s: differs from what data.metadata, data.split and data.genres give today; the set "
            "keeps its own until `movienet-shard relabel --features %s`",
            where, storage.location,
        )  # fmt: skip


def read_labels(data: DataConfig, movies: Sequence[str]) -> tuple[Labels, Findings]:
    """Read metadata and split and put them into the order of ``movies``.

    Raises:
        ConfigError: a file or folder is missing, or ``data.split`` is no fold.
        DataError: a file is damaged, a movie is in two splits, or there are too few for folds.
    """
    metadata = read_metadata_at(Path(data.metadata or ""), data.genres, movies)
    split = None if data.split is None else read_split_at(data.split)
    return make_labels(movies, data.genres, metadata, split)


def read_metadata_at(
    path: Path,
    genres: Sequence[str],
    movies: Iterable[str],
    *,
    damaged: dict[str, str] | None = None,
) -> Mapping[str, Sequence[str]]:
    """Return the genres of each movie, by id, from a folder of JSON files or from one table.

    Args:
        path: Folder with ``MOVIE.json`` files, of which only those of ``movies`` are read; or a
            ``.json`` or ``.pkl`` file that maps movies to genres.
        genres: Vocabulary of multi-hot lists.
        movies: Ids of the set's movies.
        damaged: Takes the movies whose own file is damaged, and why; None: that is an error.

    Raises:
        ConfigError: there is no such file or folder.
        DataError: a file is damaged.
    """
    _check_metadata(path)
    if path.is_dir():
        return _read_folder(path, set(movies), damaged)
    return read_metadata(path.read_bytes(), str(path), genres)


def _check_metadata(path: Path) -> None:
    if not path.is_dir() and not (path.is_file() and path.suffix in _TABLES):
        raise ConfigError(f"data.metadata: got {path}, want a folder, or a .json or .pkl file")


def read_split_at(place: str) -> dict[str, str] | Fold:
    """Return the split of each movie from a file, or the fold that ``fold:2/5`` names.

    Raises:
        ConfigError: there is no such file, or no such fold.
        DataError: the file is damaged, or a movie is in two splits.
    """
    return parse_fold(place) or read_split_file(Path(place))


def read_split_file(path: Path) -> dict[str, str]:
    """Return the split of each movie, by id.

    Raises:
        ConfigError: there is no such file.
        DataError: it is damaged, or a movie is in two splits.
    """
    if not path.is_file():
        raise ConfigError(f"data.split: no file {path}")
    return read_split(path.read_bytes(), str(path))


def relabel(storage: Storage, data: DataConfig) -> Labels:
    """Write new labels beside a sealed feature set; no tar is touched.

    Raises:
        ConfigError: ``data.metadata`` is missing.
        DataError: the set is not sealed, or a file is damaged.
    """
    labels = labels_reader(data)(open_index(storage)[1].movies)
    storage.publish(LABELS, labels.to_bytes(), replace=True)
    return labels


def log_findings(findings: Findings) -> None:
    """Log what was odd about metadata and split, by count and by name."""
    for what, names in (
        ("movies without a genre of the vocabulary", findings.unlabelled),
        ("labelled movies that the split file does not name", findings.unsplit),
        ("movies of the split file without data", findings.split_absent),
        ("movies of the metadata without data", findings.absent),
        ("genres outside the vocabulary", _counted(findings.unknown_genres)),
    ):
        if names:
            more = ", …" if len(names) > _NAMED else ""
            logger.warning("%d %s: %s%s", len(names), what, ", ".join(names[:_NAMED]), more)


def _counted(genres: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(f"{genre} ({n} movies)" for genre, n in genres.items())


def _read_folder(
    path: Path, wanted: set[str], damaged: dict[str, str] | None
) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    with os.scandir(path) as entries:
        names = sorted(entry.name for entry in entries if entry.name.endswith(".json"))
    if not names:
        raise DataError(f"{path}: no .json file, want one for each movie")
    for name in names:
        try:
            movie = movie_id(name.removesuffix(".json"))
        except DataError:
            continue  # no movie of a set can bear this name
        if movie in found:
            raise DataError(f"{path}: two files give the movie id {movie}; rename one")
        # A folder of all of MovieNet's metadata holds hundreds of thousands of other movies.
        file = path / name
        try:
            found[movie] = read_genres(file.read_bytes(), str(file)) if movie in wanted else ()
        except DataError as error:
            if damaged is None:
                raise
            damaged[movie] = str(error).removeprefix(f"{path}/")
    return found
