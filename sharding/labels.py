"""Genres and splits of a feature set, and pure parsers of their sources.

M = movies, in the order of the feature index      G = genres, in the order of the vocabulary
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from configs.corrupt import report_corrupt
from configs.errors import ConfigError, DataError
from configs.runtime.hints import hint
from sharding.format.encoding import npz_arrays, npz_bytes, sha256_hex
from sharding.format.names import movie_id, movies_digest
from sharding.format.plain_pickle import load_pickle

SPLITS = ("train", "val", "test")
"""Names of the splits; a movie in no split has ``""``."""

SHARES = (0.6, 0.2, 0.2)
"""Fractions of the splits without a split file."""

FOLD_KEY = "fold"
"""Key of the stratification into folds; folds are the same in every release."""

_FOLD = re.compile(r"fold:([0-9]{1,4})/([0-9]{1,4})")


@dataclass(frozen=True)
class Fold:
    """Fold of a cross-validation such as ``fold:2/5``: one fold is val, the others are train."""

    number: int
    """Number of the val fold, counted from 0."""

    of: int
    """Number of folds."""

    def __str__(self) -> str:
        return f"fold:{self.number}/{self.of}"


@dataclass(frozen=True, eq=False)
class Labels:
    """Genres and split of every movie of a feature set: ``labels.npz``."""

    genres: tuple[str, ...]
    """Vocabulary, in the order of the model's outputs."""

    hot_MG: npt.NDArray[np.uint8]
    """``[M, G]``, 1 if the movie has the genre."""

    split_M: npt.NDArray[np.str_]
    """``[M]``, ``train``, ``val``, ``test`` or ``""``; a movie without genres is in no split."""

    movies_sha256: str
    """``movies_digest`` of the feature index that the rows belong to."""

    def __post_init__(self) -> None:
        n = len(self.split_M)
        if self.hot_MG.shape != (n, len(self.genres)):
            got = list(self.hot_MG.shape)
            raise ValueError(f"labels: got hot_MG {got}, want [{n}, {len(self.genres)}]")

    def movies(self, split: str) -> npt.NDArray[np.int64]:
        """Return the positions of a split's movies in the feature index, ascending.

        Raises:
            DataError: the split has no movie.
        """
        positions = np.flatnonzero(self.split_M == split).astype(np.int64)
        if split not in SPLITS or not len(positions):
            counts = Counter(self.split_M.tolist())
            available = ", ".join(f"{name} {counts[name]}" for name in SPLITS)
            raise DataError(
                f"labels: split {split!r} has no labelled movie; there are: {available}"
            )
        return positions

    @cached_property
    def digest(self) -> str:
        """The labels digest: sha256 of the file's bytes."""
        return sha256_hex(self.to_bytes())

    def to_bytes(self) -> bytes:
        """Return ``labels.npz``."""
        names = [genre.encode() for genre in self.genres]
        return npz_bytes(
            {
                "genres": np.array(names, dtype=f"S{max(map(len, names), default=1)}"),
                "bits": np.packbits(self.hot_MG.astype(bool), axis=1),
                "split": self.split_M.astype("S5"),
                "movies_sha256": np.array([self.movies_sha256.encode()], dtype="S64"),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Read ``labels.npz``.

        Raises:
            DataError: the file is corrupt.
        """
        a = npz_arrays(data, where, ("genres", "bits", "split", "movies_sha256"))
        with report_corrupt(where, f"run {hint('movienet-shard relabel')}"):
            genres = tuple(name.decode() for name in a["genres"].tolist())
            bits, split = a["bits"], a["split"]
            shape = (len(split), -(-len(genres) // 8))
            if bits.dtype != np.uint8 or bits.shape != shape or split.dtype.kind != "S":
                raise ValueError(f"bits: {bits.dtype} {list(bits.shape)}, want u8 {list(shape)}")
            hot_MG = np.unpackbits(bits, axis=1, count=len(genres))
            return cls(genres, hot_MG, split.astype("U5"), a["movies_sha256"][0].decode())


@dataclass(frozen=True)
class Findings:
    """Anomalies of metadata and split; none of them is an error."""

    unlabelled: tuple[str, ...]
    """Movies of the set without a genre of the vocabulary."""

    unknown_genres: Mapping[str, int]
    """Number of movies per genre outside the vocabulary."""

    absent: tuple[str, ...]
    """Movies of the metadata that are not in the set."""

    split_absent: tuple[str, ...]
    """Movies of the split file that are not in the set."""

    unsplit: tuple[str, ...]
    """Labelled movies of the set that the split file does not contain."""


def make_labels(
    movies: Sequence[str],
    genres: Sequence[str],
    metadata: Mapping[str, Sequence[str]],
    split: Mapping[str, str] | Fold | None = None,
) -> tuple[Labels, Findings]:
    """Return the labels of a feature set, and the anomalies of their sources.

    Args:
        movies: Ids, in the order of the feature index.
        genres: Vocabulary.
        metadata: Genres per movie id; genres outside the vocabulary are ignored and counted.
        split: Split per movie id; or a fold of all labelled movies, see ``fold_split``; None
            stratifies by movie, see ``stratify``.

    Raises:
        DataError: there are fewer labelled movies than folds.
    """
    column = {genre: k for k, genre in enumerate(genres)}
    hot_MG = np.zeros((len(movies), len(genres)), np.uint8)
    unknown: Counter[str] = Counter()
    for row, movie in enumerate(movies):
        for genre in set(metadata.get(movie, ())):
            if genre in column:
                hot_MG[row, column[genre]] = 1
            else:
                unknown[genre] += 1
    labelled = {movie for movie, hot in zip(movies, hot_MG, strict=True) if hot.any()}
    split_of = _split_of(movies, hot_MG, split)
    split_M = np.array([split_of.get(m, "") if m in labelled else "" for m in movies], dtype="U5")
    in_set = set(movies)
    findings = Findings(
        unlabelled=tuple(movie for movie in movies if movie not in labelled),
        unknown_genres=dict(sorted(unknown.items())),
        absent=tuple(sorted(set(metadata) - in_set)),
        split_absent=tuple(sorted(set(split_of) - in_set)),
        unsplit=tuple(sorted(labelled - set(split_of))),
    )
    return Labels(tuple(genres), hot_MG, split_M, movies_digest(movies)), findings


def _split_of(
    movies: Sequence[str],
    hot_MG: npt.NDArray[np.uint8],
    split: Mapping[str, str] | Fold | None,
) -> Mapping[str, str]:
    if isinstance(split, Fold):
        return fold_split(movies, hot_MG, split)
    return stratify(movies, hot_MG) if split is None else split


def stratify(
    movies: Sequence[str],
    hot_MG: npt.NDArray[np.uint8],
    shares: Sequence[float] = SHARES,
    names: Sequence[str] = SPLITS,
    key: str = "",
) -> dict[str, str]:
    """Split movies with the same genre distribution in every split; unlabelled ones get no split.

    Iterative stratification: the genre with the fewest remaining movies is distributed first, each
    of its movies to the split that lacks most of this genre, then most movies; ``key`` breaks ties.

    Args:
        movies: Ids, in any order.
        hot_MG: uint8 ``[M, G]``, the genres of each movie.
        shares: Fraction of each split; they sum to 1.
        names: Names of the splits.
        key: Seed of the split.

    Source: Sechidis, Tsoumakas and Vlahavas 2011, "On the stratification of multi-label data".
    """
    # Hashes instead of a random generator: the split depends on the ids, not on their order.
    shuffled = sorted(range(len(movies)), key=lambda row: _hash(key, movies[row]))
    left = {row: set(np.flatnonzero(hot_MG[row]).tolist()) for row in shuffled if hot_MG[row].any()}
    lack_movies = [share * len(left) for share in shares]
    lack = np.outer(shares, hot_MG.sum(axis=0, dtype=np.float64))
    split: dict[str, str] = {}
    # The rarest genre first: it has the fewest movies to balance the splits with.
    while left:
        counts = Counter(genre for genres in left.values() for genre in genres)
        rarest = min(counts, key=lambda genre: (counts[genre], genre))
        for row in [row for row, genres in left.items() if rarest in genres]:
            to = max(range(len(shares)), key=lambda k: (lack[k, rarest], lack_movies[k], -k))
            split[movies[row]] = names[to]
            lack_movies[to] -= 1
            lack[to, list(left.pop(row))] -= 1
    return split


def parse_fold(text: str) -> Fold | None:
    """Return the fold of a text such as ``fold:2/5``; None without this prefix, e.g. a file name.

    Raises:
        ConfigError: ``text`` has the prefix, but is not a valid fold.
    """
    if not text.startswith("fold:"):
        return None
    match = _FOLD.fullmatch(text)
    fold = Fold(int(match[1]), int(match[2])) if match else None
    if fold is None or fold.of < 2 or fold.number >= fold.of:
        raise ConfigError(
            f"split: got {text!r}, want fold:K/N with N from 2 and K from 0 to N-1, e.g. fold:0/5"
        )
    return fold


def fold_split(movies: Sequence[str], hot_MG: npt.NDArray[np.uint8], fold: Fold) -> dict[str, str]:
    """Split labelled movies into stratified folds; one fold is val, the others are train.

    Args:
        movies: Ids, in any order.
        hot_MG: uint8 ``[M, G]``, the genres of each movie.
        fold: Number of the val fold, and number of folds. Each labelled movie is val in one fold.

    Raises:
        DataError: there are fewer labelled movies than folds.
    """
    names = [str(number) for number in range(fold.of)]
    folds = stratify(movies, hot_MG, [1 / fold.of] * fold.of, names, FOLD_KEY)
    if len(set(folds.values())) < fold.of:
        raise DataError(f"{fold}: got {len(folds)} labelled movies, want at least {fold.of}")
    return {m: "val" if name == str(fold.number) else "train" for m, name in folds.items()}


# --- parsing --------------------------------------------------------------------------------------


def read_genres(data: bytes, where: str) -> tuple[str, ...]:
    """Return the genres of one movie from ``{"genres": ["Drama", …]}``; they may be missing.

    Raises:
        DataError: ``data`` is not such a JSON object.
    """
    tree = _json(data, where)
    if not isinstance(tree, dict):
        raise DataError(f'{where}: got {type(tree).__name__}, want {{"genres": […]}}')
    return _names(tree.get("genres"), where)


def read_metadata(data: bytes, where: str, genres: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the genres per movie id from a mapping, or from a table of two columns.

    A movie's value is a list of genre names, a multi-hot list over ``genres``, or ``{"genres":
    […]}``. A table contains ``movie,genre|genre`` per line, after a header ``movie,genres`` or
    without one.

    Args:
        data: JSON, CSV, or a pickle; reading a pickle executes no code.
        where: File name, for errors; its suffix ``.csv``, ``.pkl`` or ``.pickle`` selects the
            format.
        genres: Vocabulary of multi-hot lists.

    Raises:
        DataError: ``data`` is corrupt, or contains anything else.
    """
    by_movie: dict[str, tuple[str, ...]] = {}
    for name, value in _entries(data, where):
        movie = _id(name, where)
        if movie in by_movie:
            raise DataError(f"{where}: movie {name!r}: two entries have the id {movie}; remove one")
        by_movie[movie] = _genres_of(value, f"{where}: {name}", genres)
    return by_movie


def _entries(data: bytes, where: str) -> Iterable[tuple[object, object]]:
    if where.endswith(".csv"):
        return _table(data, where)
    is_pickle = where.endswith((".pkl", ".pickle"))
    tree = load_pickle(data, where) if is_pickle else _json(data, where)
    if not isinstance(tree, dict):
        raise DataError(f"{where}: got {type(tree).__name__}, want a mapping from movie to genres")
    return tree.items()


def _table(data: bytes, where: str) -> Iterator[tuple[str, list[str]]]:
    """Yield movie and genres of each line of a CSV file."""
    with report_corrupt(where, "save it as UTF-8", problem="not CSV"):
        text = data.decode("utf-8-sig")  # Excel writes a mark at the start
        rows = list(csv.reader(text.splitlines(), strict=True))
    for number, row in enumerate(rows, 1):
        is_header = number == 1 and [cell.strip().lower() for cell in row[:1]] == ["movie"]
        if not row or is_header:
            continue
        if len(row) != 2:
            raise DataError(
                f"{where}: line {number}: got {len(row)} columns, want two: movie,genre|genre; "
                "quote names that contain a comma"
            )
        yield row[0].strip(), [genre.strip() for genre in row[1].split("|") if genre.strip()]


def read_split(data: bytes, where: str) -> dict[str, str]:
    """Return the split per movie id from ``{"train": […], "val": […], "test": […]}``.

    Raises:
        DataError: ``data`` is not such a JSON object, or a movie is in two splits.
    """
    tree = _json(data, where)
    unknown = sorted(set(tree) - set(SPLITS)) if isinstance(tree, dict) else [type(tree).__name__]
    if unknown or not tree:
        raise DataError(f"{where}: got {unknown or 'nothing'}, want lists 'train', 'val', 'test'")
    split: dict[str, str] = {}
    for name in SPLITS:
        for movie in _names(tree.get(name), f"{where}: {name}"):
            first = split.setdefault(_id(movie, where), name)
            if first != name:
                raise DataError(
                    f"{where}: movie {movie} is in {first!r} and in {name!r}; keep it in one"
                )
    return split


def _json(data: bytes, where: str) -> Any:
    with report_corrupt(where, "", problem="not JSON"):
        return json.loads(data)


def _id(name: object, where: str) -> str:
    if isinstance(name, bytes):
        name = name.decode("utf-8", "replace")
    if not isinstance(name, str):
        raise DataError(f"{where}: movie: got {name!r}, want a name")
    return movie_id(name)


def _genres_of(value: object, where: str, genres: Sequence[str]) -> tuple[str, ...]:
    if isinstance(value, dict):
        value = value.get("genres")
    numbers = isinstance(value, list | tuple) and all(isinstance(hot, int | float) for hot in value)
    # An empty list contains neither names nor numbers: it means no genres.
    if not value or not numbers or not isinstance(value, list | tuple):
        return _names(value, where)
    if len(value) != len(genres) or not set(value) <= {0, 1}:
        got = f"{len(value)} numbers"
        raise DataError(f"{where}: got {got}, want 0 or 1 for each of {len(genres)} genres")
    return tuple(genre for genre, hot in zip(genres, value, strict=True) if hot)


def _names(value: object, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple | set) or not all(isinstance(v, str) for v in value):
        raise DataError(f"{where}: got {str(value)[:60]!r}, want a list of names")
    return tuple(value)


def _hash(key: str, movie: str) -> bytes:
    return hashlib.sha256(f"{key}\n{movie}".encode()).digest()
