"""Other people's feature arrays become a feature set: checked, counted, converted, never trusted.

Every array is read twice: once to judge it, before the first byte is written, and once to copy it.

N = rows of an array, D = feature size
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from configs.errors import ConfigError, DataError
from configs.runtime.progress import Progress, progress
from configs.schema import Config, DataConfig
from sharding.features import (
    MovieFeatures,
    feature_shard_done,
    publish_feature_shard,
    seal_features,
)
from sharding.format.encoding import FORMAT, canonical_json, read_npy_header, sha256_hex
from sharding.format.manifest import Manifest
from sharding.format.names import movie_id
from sharding.label_files import read_labels, read_split_file
from sharding.labels import SPLITS, Findings
from sharding.plan import Movie, choose, plan_shards
from sharding.shard import clear_beyond
from sharding.storage.base import Storage
from sharding.storage.open import open_storage
from sharding.storage.space import Space

logger = logging.getLogger(__name__)

REPORT = "import.json"
"""Written beside the set; part of no digest."""

MANY_REPEATS = 8
"""A row that stands more often than this in one run is reported as repeated."""

_NAMED = 5
_WANTED = "float16, float32 or float64 [N, D], N and D at least 1"


@dataclass(frozen=True)
class Array:
    """One array of the folder, as far as its name and header tell."""

    movie: str
    original: str
    """What the folder calls it, without ``.npy``."""

    path: Path
    rows: int
    dim: int


@dataclass(frozen=True)
class Judged:
    """One array after it was read."""

    array: Array
    sha256: str
    """Of the file."""

    not_finite: int
    """Numbers that are NaN or infinite."""

    too_large: int
    """Finite numbers that float16 cannot hold."""

    zero_rows: int
    longest_run: int
    """How often the most repeated row stands in one run; zero rows not counted."""

    kept: int
    """Rows that will be written."""

    @property
    def n_bytes(self) -> int:
        """Bytes of the rows that will be written."""
        return self.kept * self.array.dim * 2


@dataclass(frozen=True)
class ImportReport:
    """What was imported, and what is odd about it, by name."""

    location: str
    """Where the feature set lies."""

    data: str
    """Data digest."""

    built: int
    """Shards that were not there before."""

    shards: int
    movies: int
    dim: int
    rows: int
    """Rows of the arrays."""

    kept: int
    """Rows of the feature set."""

    dedup: bool
    zero_rows: Mapping[str, int]
    """Movies with zero rows, which are padding, and how many."""

    repeated: Mapping[str, int]
    """Movies with a run of more than ``MANY_REPEATS`` equal rows, and the longest run."""

    unlabelled: tuple[str, ...]
    """Movies without a genre of the vocabulary; they are in no split."""

    unsplit: tuple[str, ...]
    """Labelled movies that the split file does not name."""

    unknown_genres: Mapping[str, int]
    """Genres outside the vocabulary, and how many movies have them."""

    labels_without_movie: tuple[str, ...]
    """Movies of the metadata that the folder has no array of."""

    split_without_movie: Mapping[str, str]
    """Movies of the split file that the folder has no array of, and their split."""

    renamed: Mapping[str, str]
    """Ids that are not the folder's own names, and these names."""

    def to_bytes(self) -> bytes:
        """Return ``import.json``, the same for every run over the same arrays."""
        of_this_run = {"built", "location"}
        told = {name: value for name, value in vars(self).items() if name not in of_this_run}
        return canonical_json(told)

    def lines(self) -> list[str]:
        """Return a short table: what was found, how often, and the first names."""
        found = [(what, names) for what, names in self._findings() if names]
        width = max((len(what) for what, _ in found), default=0)
        return [
            f"movies {self.movies:,}   rows {self.rows:,}, kept {self.kept:,}   dim {self.dim}   "
            f"shards {self.shards:,}, written now {self.built:,}",
            *(f"{what:<{width}}  {len(names):>5,}  {_first(names)}" for what, names in found),
            f"every name: {self.location}/{REPORT}   data {self.data[:12]}",
        ]

    def _findings(self) -> Iterator[tuple[str, Sequence[str]]]:
        longest_first = sorted(self.repeated.items(), key=lambda item: (-item[1], item[0]))
        yield "zero rows (padding)", [f"{movie} ({n})" for movie, n in self.zero_rows.items()]
        yield (
            f"runs of more than {MANY_REPEATS} equal rows",
            [f"{m} ({n})" for m, n in longest_first],
        )
        yield "movies without labels", self.unlabelled
        yield "labels without a movie", self.labels_without_movie
        for split in SPLITS:
            missing = [movie for movie, of in self.split_without_movie.items() if of == split]
            yield f"{split} movies without features", missing
        yield "labelled movies in no split", self.unsplit
        yield (
            "genres outside the vocabulary",
            [f"{g} ({n})" for g, n in self.unknown_genres.items()],
        )
        yield "movies renamed", [f"{name!r} to {movie}" for movie, name in self.renamed.items()]


def import_features(config: Config, *, replace: bool = False) -> ImportReport:
    """Turn a folder of ``[N, D]`` arrays into a sealed feature set at ``config.features_dir``.

    Shards that are there and were made from the same arrays are skipped.

    Args:
        config: ``data`` says what is read and how, ``encoder.name`` what the set is called.
        replace: Build shards again that were made from other arrays or options.

    Raises:
        ConfigError: a path is missing or wrong.
        DataError: an array has another form or holds a number that float16 cannot; or there are
            shards that were made from something else.
    """
    everything = list_arrays(config.data)
    arrays = _limited(everything, config.data)
    labels, findings = read_labels(config.data, [array.movie for array in arrays])
    judged = judge_arrays(arrays, dedup=config.data.dedup)
    shards = _shards(judged, shard_bytes=config.sharding.shard_bytes)
    storage = open_storage(config.features_dir, config.storage)
    built = _write(storage, shards, dedup=config.data.dedup, replace=replace)
    told = {"name": config.encoder.name, "dedup": config.data.dedup}
    manifest = seal_features(
        storage,
        n_shards=len(shards),
        provenance={"import": told, "dim": arrays[0].dim},
        labels_for=lambda _: labels,
        renamed={a.movie: a.original for a in arrays if a.movie != a.original},
    )
    there = {array.movie for array in everything} | set(map(movie_id, config.data.exclude))
    report = _report(judged, findings, config.data, there, storage, manifest, built)
    storage.publish(REPORT, report.to_bytes(), replace=True)
    return report


# --- the folder -----------------------------------------------------------------------------------


def list_arrays(data: DataConfig) -> list[Array]:
    """Return the arrays of ``data.feature_arrays`` in order of movie id, judged by their headers.

    Those of ``data.exclude`` are not opened.

    Raises:
        ConfigError: the folder is missing.
        DataError: there is no array, two give the same id, or one has another form.
    """
    if data.feature_arrays is None or not Path(data.feature_arrays).is_dir():
        raise ConfigError(
            f"data.feature_arrays: got {data.feature_arrays or 'null'}, want a folder of .npy files"
        )
    found: dict[str, Array] = {}
    paths = sorted(Path(data.feature_arrays).glob("*.npy"))
    wanted = set(choose([movie_id(path.stem) for path in paths], None, data.exclude))
    for path in paths:
        if movie_id(path.stem) not in wanted:
            continue
        array = _read_header(path)
        other = found.setdefault(array.movie, array)
        if other is not array:
            raise DataError(f"{path}: gives the id {array.movie}, as {other.path}; rename one")
    if not found:
        raise DataError(f"{data.feature_arrays}: no .npy file, want one [N, D] array a movie")
    arrays = [found[movie] for movie in sorted(found)]
    odd = next((array for array in arrays if array.dim != arrays[0].dim), None)
    if odd:
        first = arrays[0]
        raise DataError(
            f"{odd.path}: got rows of {odd.dim} numbers, want {first.dim} as in {first.path.name}"
        )
    return arrays


def _read_header(path: Path) -> Array:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            header = read_npy_header(file, size, str(path))
    except DataError as error:
        raise DataError(f"{error}, want {_WANTED}") from None
    shape, dtype = header.shape, header.dtype
    if dtype.kind != "f" or dtype.itemsize > 8 or len(shape) != 2 or 0 in shape:
        raise DataError(f"{path}: got {dtype} {list(shape)}, want {_WANTED}")
    if size < header.file_bytes:
        raise DataError(f"{path}: the file ends before its array {list(shape)} does; copy it again")
    return Array(movie_id(path.stem), path.stem, path, rows=shape[0], dim=shape[1])


def _limited(arrays: Sequence[Array], data: DataConfig) -> list[Array]:
    chosen = set(choose([array.movie for array in arrays], data.limit))
    first = data.limit if isinstance(data.limit, int) else None
    return [array for array in arrays if array.movie in chosen][:first]


# --- judging --------------------------------------------------------------------------------------


def judge_arrays(arrays: Sequence[Array], *, dedup: bool) -> list[Judged]:
    """Read every array once.

    Raises:
        DataError: numbers are not finite or too large, or nothing would be kept of an array.
    """
    with progress(len(arrays), label="judge", unit="arrays") as shown:
        judged = [_judge(array, shown, dedup=dedup) for array in arrays]
    _refuse(judged, "not_finite", "hold NaN or infinite numbers", "want finite ones")
    _refuse(
        judged, "too_large", "hold numbers above 65,504", "scale them: rows are kept in float16"
    )
    empty = [one.array.movie for one in judged if not one.kept]
    if empty:
        raise DataError(
            f"{len(empty)} arrays hold zero rows only: {_first(empty)}; remove them, or set "
            "data.dedup=false"
        )
    return judged


def _judge(array: Array, shown: Progress, *, dedup: bool) -> Judged:
    with array.path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    source_ND = np.load(array.path, mmap_mode="r", allow_pickle=False)
    rows_ND = _half(source_ND)
    not_finite = int((~np.isfinite(source_ND)).sum())
    too_large = int(np.isinf(rows_ND).sum() - np.isinf(source_ND).sum())
    starts, lengths = _runs(rows_ND)
    real = rows_ND[starts].any(axis=1)
    shown.advance()
    return Judged(
        array=array,
        sha256=sha256,
        not_finite=not_finite,
        too_large=too_large,
        zero_rows=int(lengths[~real].sum()),
        longest_run=int(lengths[real].max(initial=0)),
        kept=int(real.sum()) if dedup else array.rows,
    )


def _half(source_ND: npt.NDArray[np.floating]) -> npt.NDArray[np.float16]:
    with np.errstate(over="ignore"):  # counted, and refused by name
        return np.ascontiguousarray(source_ND, dtype=np.float16)


def _runs(rows_ND: npt.NDArray[np.float16]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return first row and length of each run of equal rows."""
    fresh_N = np.append(True, (rows_ND[1:] != rows_ND[:-1]).any(axis=1))
    starts = np.flatnonzero(fresh_N)
    return starts, np.diff(np.append(starts, len(rows_ND)))


def _refuse(judged: Sequence[Judged], count: str, what: str, wanted: str) -> None:
    bad = [(one.array.movie, getattr(one, count)) for one in judged if getattr(one, count)]
    if bad:
        names = _first([f"{movie} ({n})" for movie, n in bad])
        raise DataError(f"{len(bad)} arrays {what}: {names}; {wanted}")


# --- writing --------------------------------------------------------------------------------------


def _shards(judged: Sequence[Judged], *, shard_bytes: int) -> list[list[Judged]]:
    by_movie = {one.array.movie: one for one in judged}
    movies = [
        Movie(a.movie, a.original, a.path.name, one.sha256, a.rows, one.n_bytes)
        for one in judged
        for a in (one.array,)
    ]
    shards = plan_shards(movies, shard_bytes=shard_bytes)
    return [[by_movie[movie.movie] for movie in shard] for shard in shards]


def _write(
    storage: Storage, shards: Sequence[Sequence[Judged]], *, dedup: bool, replace: bool
) -> int:
    input_digest = [_made_from(shard, dedup=dedup) for shard in shards]
    # Asked of all before the first is written: a refusal leaves the set as it was.
    todo = [
        number
        for number, digest in enumerate(input_digest)
        if not feature_shard_done(storage, number, digest, replace=replace)
    ]
    clear_beyond(storage, len(shards), replace=replace)
    storage.sweep()
    if not todo:
        logger.info("all %d shards are there, made from these arrays", len(shards))
        return 0
    _check_space(storage, [one for number in todo for one in shards[number]])
    with progress(sum(len(shards[n]) for n in todo), label="import", unit="movies") as shown:
        for number in todo:
            movies = (_movie(one, shown, dedup=dedup) for one in shards[number])
            publish_feature_shard(storage, number, movies, input_digest=input_digest[number])
    return len(todo)


def _check_space(storage: Storage, movies: Sequence[Judged]) -> None:
    # In addition to the rows: one shot number per row, and headers and padding of three members.
    need = sum(one.n_bytes + 4 * one.kept + 4096 for one in movies)
    storage.space().require(
        Space(need),
        storage.location,
        "the feature shards",
        "set data.root elsewhere, or try data.limit",
    )


def _made_from(shard: Sequence[Judged], *, dedup: bool) -> str:
    sources = [[one.array.movie, one.sha256] for one in shard]
    return sha256_hex(canonical_json({"format": FORMAT, "arrays": sources, "dedup": dedup}))


def _movie(one: Judged, shown: Progress, *, dedup: bool) -> MovieFeatures:
    rows_ND = _half(np.load(one.array.path, mmap_mode="r", allow_pickle=False))
    if dedup:
        starts, _ = _runs(rows_ND)
        rows_ND = rows_ND[starts[rows_ND[starts].any(axis=1)]]
    if len(rows_ND) != one.kept:
        raise DataError(f"{one.array.path}: changed while it was imported; run again")
    shown.advance()
    nobody_knows_N = np.full(len(rows_ND), -1, np.int32)
    return MovieFeatures(one.array.movie, rows_ND, nobody_knows_N, images=one.array.rows)


# --- telling --------------------------------------------------------------------------------------


def _report(
    judged: Sequence[Judged],
    findings: Findings,
    data: DataConfig,
    there: set[str],
    storage: Storage,
    manifest: Manifest,
    built: int,
) -> ImportReport:
    split = read_split_file(Path(data.split)) if data.split else {}
    arrays = [one.array for one in judged]
    return ImportReport(
        location=storage.location,
        data=manifest.digest,
        built=built,
        shards=len(manifest.shards),
        movies=len(arrays),
        dim=arrays[0].dim,
        rows=sum(array.rows for array in arrays),
        kept=sum(one.kept for one in judged),
        dedup=data.dedup,
        zero_rows={one.array.movie: one.zero_rows for one in judged if one.zero_rows},
        repeated={
            one.array.movie: one.longest_run for one in judged if one.longest_run > MANY_REPEATS
        },
        unlabelled=findings.unlabelled,
        unsplit=findings.unsplit,
        unknown_genres=findings.unknown_genres,
        # Movies that were left out on purpose are not missing.
        labels_without_movie=tuple(m for m in findings.absent if m not in there),
        split_without_movie={m: split[m] for m in findings.split_absent if m not in there},
        renamed=manifest.renamed,
    )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
