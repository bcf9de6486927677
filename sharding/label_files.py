"""Reading of the metadata and split files of a configuration; ``labels`` interprets them."""

from __future__ import annotations

import logging
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from configs.errors import ConfigError, DataError, MovieNetError
from configs.runtime.files import open_file
from configs.runtime.hints import hint
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

_MAX_NAMES = 5
_IMAGE_BATCH = re.compile(r"img_emb_[0-9]+")
_TABLES = (".csv", ".json", ".pkl", ".pickle")


def labels_reader(data: DataConfig) -> Callable[[Sequence[str]], Labels]:
    """Return a function from movies to their labels, for ``seal_features``.

    The function reads the files when it is called, and logs anomalies.

    Raises:
        ConfigError: ``data.metadata`` or the split file is missing, or ``data.split`` is no fold.
        DataError: the split file is corrupt, or contains a movie in two splits.
    """
    # Read here only to report errors before the set is built, not after hours of work.
    if data.split is not None:
        read_split_at(data.split)
    if data.metadata is None:
        raise ConfigError(
            "data.metadata: got null, want a folder of JSON files, a .csv, a .json or a .pkl file "
            "with the genres"
        )
    _check_metadata(Path(data.metadata))

    def labels_for(movies: Sequence[str]) -> Labels:
        labels, findings = read_labels(data, movies)
        log_findings(findings)
        return labels

    return labels_for


def warn_of_other_labels(data: DataConfig, storage: Storage) -> None:
    """Log what ``warn_of_differences`` finds in a sealed set that may have no labels."""
    if storage.size(LABELS) is None:
        return
    stored = Labels.from_bytes(storage.read(LABELS), f"{storage.location}/{LABELS}")
    warn_of_differences(data, stored, open_index(storage)[1].movies, storage.location)


def warn_of_differences(
    data: DataConfig, stored: Labels, movies: Sequence[str], location: str
) -> None:
    """Log a warning if labels or movies of a sealed set differ from those of ``data``.

    The difference may be intended, after ``relabel``, so it is no error and nothing is replaced.
    Metadata that cannot be read, e.g. on a machine that has only the features, is not compared.
    """
    chosen = {movie_id(name) for name in data.exclude}.intersection(movies)
    if chosen:
        logger.warning(
            "%s: contains %d movies of data.exclude (%s), which are used like the others; they are "
            "left out of sets that are built with it",
            location,
            len(chosen),
            _some(sorted(chosen)),
        )
    if data.metadata is None:
        return
    try:
        current, _ = read_labels(data, movies)
    except (MovieNetError, OSError) as error:
        logger.debug("labels are not compared: %s", error)
        return
    if stored.digest != current.digest:
        logger.warning(
            "%s/%s: differs from the current data.metadata, data.split and data.genres; the stored "
            "labels are used until %s replaces them",
            location,
            LABELS,
            hint(f"movienet-shard relabel --features {shlex.quote(location)}"),
        )


def read_labels(data: DataConfig, movies: Sequence[str]) -> tuple[Labels, Findings]:
    """Read metadata and split; return the labels in the order of ``movies``.

    Raises:
        ConfigError: a file or folder is missing, or ``data.split`` is not a fold.
        DataError: a file is corrupt, a movie is in two splits, or a fold would be empty.
    """
    metadata = read_metadata_at(Path(data.metadata or ""), data.genres, movies)
    split = None if data.split is None else read_split_at(data.split)
    return make_labels(movies, data.genres, metadata, split)


def require_labels(labels: Labels, movies: Sequence[str], data: DataConfig) -> None:
    """Raise ``DataError`` if no movie has a genre: the names of features or metadata are wrong."""
    if labels.hot_MG.any():
        return
    message = (
        f"data.metadata: got no genre of data.genres for any of {len(movies)} movies "
        f"({movies[0]}, …), want the names of the movies in {data.metadata}"
    )
    if all(_IMAGE_BATCH.fullmatch(movie) for movie in movies):
        message += (
            "; clip-retrieval wrote one array per batch of images: write one MOVIE.npy per movie, "
            "with the rows in order of image_path of its metadata/*.parquet, which is not read here"
        )
    raise DataError(message)


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
            ``.csv``, ``.json`` or ``.pkl`` file that maps movies to genres.
        genres: Vocabulary of multi-hot lists.
        movies: Ids of the set's movies.
        damaged: Receives the reason for each movie whose own file is corrupt; None raises instead.

    Raises:
        ConfigError: there is no such file or folder.
        DataError: a file is corrupt.
    """
    _check_metadata(path)
    if path.is_dir():
        return _read_folder(path, set(movies), damaged)
    return read_metadata(path.read_bytes(), str(path), genres)


def _check_metadata(path: Path) -> None:
    if not path.is_dir() and not (path.is_file() and path.suffix in _TABLES):
        raise ConfigError(
            f"data.metadata: got {path}, want a folder, or a .csv, .json or .pkl file"
        )


def read_split_at(source: str) -> dict[str, str] | Fold:
    """Return the split of each movie from a file, or the fold of a text such as ``fold:2/5``.

    Raises:
        ConfigError: there is no such file, or no such fold.
        DataError: the file is corrupt, or a movie is in two splits.
    """
    return parse_fold(source) or read_split_file(Path(source))


def read_split_file(path: Path) -> dict[str, str]:
    """Return the split of each movie, by id.

    Raises:
        ConfigError: there is no such file.
        DataError: the file is corrupt, or a movie is in two splits.
    """
    if not path.is_file():
        raise ConfigError(f"data.split: no file {path}")
    return read_split(path.read_bytes(), str(path))


def relabel(storage: Storage, data: DataConfig) -> Labels:
    """Replace the labels of a sealed feature set; its tars stay unchanged.

    Raises:
        ConfigError: ``data.metadata`` is missing.
        DataError: the set is not sealed, a file is corrupt, or no movie has a label.
    """
    movies = open_index(storage)[1].movies
    labels = labels_reader(data)(movies)
    require_labels(labels, movies, data)
    storage.publish(LABELS, labels.to_bytes(), replace=True)
    return labels


def log_findings(findings: Findings) -> None:
    """Log the anomalies of metadata and split: count and first names of each kind."""
    for what, names in (
        ("movies without a genre of the vocabulary", findings.unlabelled),
        ("labelled movies in no split", findings.unsplit),
        ("movies of the split file without data", findings.split_absent),
        ("movies of the metadata without data", findings.absent),
        ("genres outside the vocabulary", _counted(findings.unknown_genres)),
    ):
        if names:
            logger.warning("%d %s: %s", len(names), what, _some(names))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_NAMES]) + (", …" if len(names) > _MAX_NAMES else "")


def _counted(genres: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(f"{genre} ({n} movies)" for genre, n in genres.items())


def _read_folder(
    path: Path, movies: set[str], damaged: dict[str, str] | None
) -> dict[str, tuple[str, ...]]:
    genres: dict[str, tuple[str, ...]] = {}
    with os.scandir(path) as entries:
        names = sorted(entry.name for entry in entries if entry.name.endswith(".json"))
    if not names:
        raise DataError(f"{path}: no .json file, want one per movie")
    for name in names:
        try:
            movie = movie_id(name.removesuffix(".json"))
        except DataError:
            continue  # no movie of a set can have this name
        if movie in genres:
            raise DataError(f"{path}: two files have the movie id {movie}; rename one")
        # MovieNet's complete metadata contains hundreds of thousands of other movies: skip them.
        file = path / name
        try:
            genres[movie] = read_genres(_read(file), str(file)) if movie in movies else ()
        except DataError as error:
            if damaged is None:
                raise
            damaged[movie] = str(error).removeprefix(f"{path}/")
    return genres


def _read(file: Path) -> bytes:
    """Return the bytes of the metadata of one movie.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with open_file(file) as opened:
            return opened.read()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
