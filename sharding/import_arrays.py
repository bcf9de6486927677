"""Import of external feature arrays as a feature set, with validation and conversion to float16.

Every array is read twice: once to validate it, before the first byte is written, and once to copy
it.

N = rows of an array, D = feature size
"""

from __future__ import annotations

import hashlib
import logging
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from configs.errors import ConfigError, DataError, error_text
from configs.runtime.files import open_file
from configs.runtime.progress import Progress, progress
from configs.schema import Config, DataConfig
from sharding.features import (
    MovieFeatures,
    feature_shard_done,
    publish_feature_shard,
    seal_features,
)
from sharding.format.encoding import (
    FORMAT,
    NpyHeader,
    canonical_json,
    read_npy_header,
    rows_shape,
    sha256_hex,
)
from sharding.format.manifest import Manifest
from sharding.format.names import movie_id
from sharding.label_files import read_labels, read_split_file, require_labels
from sharding.labels import SPLITS, Findings
from sharding.plan import Movie, choose, plan_shards, unreadable_movies
from sharding.shard import clear_beyond
from sharding.storage.base import Storage
from sharding.storage.open import open_storage
from sharding.storage.space import Space

logger = logging.getLogger(__name__)

REPORT = "import.json"
"""Report of the import, stored with the set; part of no digest."""

MANY_REPEATS = 8
"""A run of more than this many equal rows is reported as repeated."""

_OTHER_FORMATS = (".npz", ".pt", ".pth")
"""Formats of arrays that are refused by name, so that no movie is left out without a message."""

_MAX_NAMES = 5
_WIDTH = 80
_EXPECTED = "float16, float32 or float64 [N, D], N and D at least 1"


@dataclass(frozen=True)
class Array:
    """One array of the folder, according to its name and header."""

    movie: str
    original: str
    """Name of the file without ``.npy``."""

    path: Path
    header: NpyHeader

    @property
    def rows(self) -> int:
        """N."""
        return rows_shape(self.header.shape)[0]

    @property
    def dim(self) -> int:
        """D."""
        return rows_shape(self.header.shape)[1]

    def read(self) -> npt.NDArray[np.floating]:
        """Return the rows ``[N, D]`` of the file, read on demand."""
        # Not by numpy.load, which warns of files that Python 2 wrote.
        stored = np.memmap(
            self.path,
            self.header.dtype,
            "r",
            self.header.n_bytes,
            self.header.shape,
            "F" if self.header.fortran_order else "C",
        )
        return stored.reshape(self.rows, self.dim)


@dataclass(frozen=True)
class ValidatedArray:
    """One array with the counts of its validation."""

    array: Array
    sha256: str
    """Digest of the file."""

    not_finite: int
    """Count of NaN and infinite numbers."""

    too_large: int
    """Count of finite numbers beyond the range of float16."""

    zero_rows: int
    longest_run: int
    """Length of the longest run of equal rows other than zero rows."""

    kept: int
    """Number of rows to be written."""

    @property
    def n_bytes(self) -> int:
        """Size of the rows to be written."""
        return self.kept * self.array.dim * 2


@dataclass(frozen=True)
class ImportReport:
    """Totals of an import, and its anomalies by name."""

    location: str
    """Location of the feature set."""

    data: str
    """Data digest."""

    built: int
    """Number of shards written by this run."""

    shards: int
    movies: int
    dim: int
    rows: int
    """Rows of the arrays."""

    kept: int
    """Rows of the feature set."""

    dedup: bool
    zero_rows: Mapping[str, int]
    """Number of zero rows, which are padding, per movie."""

    repeated: Mapping[str, int]
    """Longest run of equal rows per movie, if longer than ``MANY_REPEATS``."""

    unlabelled: tuple[str, ...]
    """Movies without a genre of the vocabulary; they are in no split."""

    unsplit: tuple[str, ...]
    """Labelled movies that the split file does not contain."""

    unknown_genres: Mapping[str, int]
    """Number of movies per genre outside the vocabulary."""

    labels_without_movie: tuple[str, ...]
    """Movies of the metadata without an array in the folder."""

    split_without_movie: Mapping[str, str]
    """Split of each movie of the split file without an array in the folder."""

    renamed: Mapping[str, str]
    """Original name of each movie whose id differs from it."""

    reshaped: Mapping[str, str]
    """Shape of each array of other than two axes, e.g. ``3x1x512``, which is read as ``[N, D]``."""

    def to_bytes(self) -> bytes:
        """Return ``import.json``, identical for every run over the same arrays."""
        of_this_run = {"built", "location"}
        fields = {name: value for name, value in vars(self).items() if name not in of_this_run}
        return canonical_json(fields)

    def lines(self) -> list[str]:
        """Return a summary of 80 columns: totals, then count and first names of each anomaly."""
        findings = [(what, names) for what, names in self._findings() if names]
        width = max((len(what) for what, _ in findings), default=0)
        rows = [
            row
            for what, names in findings
            for row in _wrapped(f"{what:<{width}}  {len(names):>5,}  ", _first(names))
        ]
        return [
            f"movies {self.movies:,}   rows {self.rows:,}, kept {self.kept:,}   dim {self.dim}   "
            f"shards {self.shards:,}, new {self.built:,}",
            *rows,
            f"all names: {self.location}/{REPORT}",
            f"data {self.data[:12]}",
        ]

    def _findings(self) -> Iterator[tuple[str, Sequence[str]]]:
        longest_first = sorted(self.repeated.items(), key=lambda item: (-item[1], item[0]))
        yield "zero rows (padding)", [f"{movie} ({n})" for movie, n in self.zero_rows.items()]
        yield (
            f"runs of more than {MANY_REPEATS} equal rows",
            [f"{m} ({n})" for m, n in longest_first],
        )
        yield "arrays read as [N, D]", [f"{m} ({shape})" for m, shape in self.reshaped.items()]
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
    """Convert a folder of ``[N, D]`` arrays to a sealed feature set at ``config.features_dir``.

    Complete shards with the same input digest are skipped.

    Args:
        config: ``data`` contains the inputs and options, ``encoder.name`` the name of the set.
        replace: Rebuild shards whose arrays or options changed.

    Raises:
        ConfigError: a path is missing or wrong.
        DataError: an array has another shape or type, or a number beyond float16; no movie has a
            label; or an existing shard has another input digest, and ``replace`` is off.
    """
    listed = list_arrays(config.data)
    arrays = _limited(listed, config.data)
    movies = [array.movie for array in arrays]
    labels, findings = read_labels(config.data, movies)
    require_labels(labels, movies, config.data)
    validated = validate_arrays(arrays, dedup=config.data.dedup)
    shards = _shards(validated, shard_bytes=config.sharding.shard_bytes)
    storage = open_storage(config.features_dir, config.storage)
    built = _write(storage, shards, dedup=config.data.dedup, replace=replace)
    options = {"name": config.encoder.name, "dedup": config.data.dedup}
    manifest = seal_features(
        storage,
        n_shards=len(shards),
        provenance={"import": options, "dim": arrays[0].dim},
        labels_for=lambda _: labels,
        renamed={a.movie: a.original for a in arrays if a.movie != a.original},
    )
    # Movies excluded on purpose are not missing.
    present = {array.movie for array in listed} | set(map(movie_id, config.data.exclude))
    report = _report(validated, findings, config.data, present, storage, manifest, built)
    storage.publish(REPORT, report.to_bytes(), replace=True)
    return report


# --- the folder -----------------------------------------------------------------------------------


def list_arrays(data: DataConfig) -> list[Array]:
    """Return the arrays of ``data.feature_arrays`` in order of movie id; reads only headers.

    Arrays of ``data.exclude`` are not opened.

    Raises:
        ConfigError: the folder is missing.
        DataError: there is no array, two have the same id, or some cannot be read or have another
            shape, type or format. All are tried, so that the error names them all.
    """
    if data.feature_arrays is None or not Path(data.feature_arrays).is_dir():
        raise ConfigError(
            f"data.feature_arrays: got {data.feature_arrays or 'null'}, want a folder of .npy files"
        )
    by_movie: dict[str, Array] = {}
    unreadable: dict[str, str] = {}
    paths = _array_files(Path(data.feature_arrays))
    selected = set(choose([movie_id(path.stem) for path in paths], None, data.exclude))
    for path in paths:
        if movie_id(path.stem) not in selected:
            continue
        try:
            array = _read_header(path)
        except (DataError, OSError) as error:
            unreadable[movie_id(path.stem)] = error_text(error)
            continue
        other = by_movie.setdefault(array.movie, array)
        if other is not array:
            raise DataError(
                f"{path}: has the movie id {array.movie}, as has {other.path}; rename one"
            )
    if unreadable:
        raise unreadable_movies(unreadable)
    if not by_movie:
        raise DataError(f"{data.feature_arrays}: no .npy file, want one [N, D] array per movie")
    arrays = [by_movie[movie] for movie in sorted(by_movie)]
    first = arrays[0]
    for array in arrays:
        if array.dim != first.dim:
            raise DataError(
                f"{array.path}: got rows of {array.dim} numbers, want {first.dim} as in "
                f"{first.path.name}"
            )
    return arrays


def _array_files(folder: Path) -> list[Path]:
    """Return the ``.npy`` files, and those of other formats that contain a movie's only array."""
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))  # of a Mac
    arrays = [path for path in files if path.suffix.lower() == ".npy"]
    movies = {path.stem for path in arrays}
    other = (path for path in files if path.suffix.lower() in _OTHER_FORMATS)
    return arrays + [path for path in other if path.stem not in movies]


def _read_header(path: Path) -> Array:
    if path.suffix.lower() != ".npy":
        raise DataError(
            f"{path}: got a {path.suffix} file, want .npy: save its array of {_EXPECTED} with "
            "numpy.save"
        )
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            header = read_npy_header(file, size, str(path))
        except DataError as error:
            raise DataError(f"{error}, want {_EXPECTED}") from None
    shape, dtype = header.shape, header.dtype
    is_rows = len(rows_shape(shape)) == 2 and 0 not in shape
    if dtype.kind != "f" or dtype.itemsize > 8 or not is_rows:
        raise DataError(f"{path}: got {dtype} {list(shape)}, want {_EXPECTED}")
    if size < header.file_bytes:
        raise DataError(
            f"{path}: got {size} bytes, want {header.file_bytes} for {list(shape)}; copy it again"
        )
    return Array(movie_id(path.stem), path.stem, path, header)


def _limited(arrays: Sequence[Array], data: DataConfig) -> list[Array]:
    chosen = set(choose([array.movie for array in arrays], data.limit))
    first = data.limit if isinstance(data.limit, int) else None
    return [array for array in arrays if array.movie in chosen][:first]


# --- validation -----------------------------------------------------------------------------------


def validate_arrays(arrays: Sequence[Array], *, dedup: bool) -> list[ValidatedArray]:
    """Read and validate every array.

    Raises:
        DataError: numbers are not finite or too large, or no row of an array would remain.
    """
    with progress(len(arrays), label="validate", unit="arrays") as bar:
        validated = [_validate(array, bar, dedup=dedup) for array in arrays]
    _refuse(validated, "not_finite", "contain NaN or infinite numbers", "want finite numbers")
    _refuse(
        validated,
        "too_large",
        "contain numbers above 65,504",
        "want the range of float16: scale all arrays",
    )
    empty = [one.array for one in validated if not one.kept]
    if empty:
        names = _first([array.path.name for array in empty])
        raise DataError(
            f"{empty[0].path.parent}: {len(empty)} arrays contain only zero rows: {names}; set "
            f"data.dedup=false{_or_exclude(empty)}"
        )
    return validated


def _validate(array: Array, bar: Progress, *, dedup: bool) -> ValidatedArray:
    with array.path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    source_ND = array.read()
    rows_ND = _as_float16(source_ND)
    not_finite = int((~np.isfinite(source_ND)).sum())
    too_large = int(np.isinf(rows_ND).sum() - np.isinf(source_ND).sum())
    starts, lengths = _runs(rows_ND)
    real = rows_ND[starts].any(axis=1)
    bar.advance()
    return ValidatedArray(
        array=array,
        sha256=sha256,
        not_finite=not_finite,
        too_large=too_large,
        zero_rows=int(lengths[~real].sum()),
        longest_run=int(lengths[real].max(initial=0)),
        kept=int(real.sum()) if dedup else array.rows,
    )


def _as_float16(source_ND: npt.NDArray[np.floating]) -> npt.NDArray[np.float16]:
    # An overflow becomes infinity, which the validation counts and refuses.
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(source_ND, dtype=np.float16)


def _runs(rows_ND: npt.NDArray[np.float16]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return first row and length of each run of equal rows."""
    is_start_N = np.append(True, (rows_ND[1:] != rows_ND[:-1]).any(axis=1))
    starts = np.flatnonzero(is_start_N)
    return starts, np.diff(np.append(starts, len(rows_ND)))


def _refuse(validated: Sequence[ValidatedArray], count: str, defect: str, remedy: str) -> None:
    bad = [(one.array, getattr(one, count)) for one in validated if getattr(one, count)]
    if bad:
        arrays = [array for array, _ in bad]
        names = _first([f"{array.path.name} ({n})" for array, n in bad])
        raise DataError(
            f"{arrays[0].path.parent}: {len(bad)} arrays {defect}: {names}; "
            f"{remedy}{_or_exclude(arrays)}"
        )


def _or_exclude(arrays: Sequence[Array]) -> str:
    names = ", ".join(array.movie for array in arrays[:_MAX_NAMES])
    more = ", …" if len(arrays) > _MAX_NAMES else ""
    return f", or continue without these movies: data.exclude=[{names}{more}]"


# --- writing --------------------------------------------------------------------------------------


def _shards(validated: Sequence[ValidatedArray], *, shard_bytes: int) -> list[list[ValidatedArray]]:
    by_movie = {one.array.movie: one for one in validated}
    movies = [
        Movie(a.movie, a.original, a.path.name, one.sha256, a.rows, one.n_bytes)
        for one in validated
        for a in (one.array,)
    ]
    shards = plan_shards(movies, shard_bytes=shard_bytes)
    return [[by_movie[movie.movie] for movie in shard] for shard in shards]


def _write(
    storage: Storage, shards: Sequence[Sequence[ValidatedArray]], *, dedup: bool, replace: bool
) -> int:
    digests = [_input_digest(shard, dedup=dedup) for shard in shards]
    # All shards are compared before the first is written, so an error leaves the set unchanged.
    todo = [
        number
        for number, digest in enumerate(digests)
        if not feature_shard_done(storage, number, digest, replace=replace)
    ]
    clear_beyond(storage, len(shards), replace=replace)
    storage.sweep()
    if not todo:
        logger.info("all %d shards are already complete for these arrays", len(shards))
        return 0
    _check_space(storage, [one for number in todo for one in shards[number]])
    with progress(sum(len(shards[n]) for n in todo), label="import", unit="movies") as bar:
        for number in todo:
            movies = (_movie(one, bar, dedup=dedup) for one in shards[number])
            publish_feature_shard(storage, number, movies, input_digest=digests[number])
    return len(todo)


def _check_space(storage: Storage, movies: Sequence[ValidatedArray]) -> None:
    # In addition to the rows: one shot number per row, and headers and padding of three members.
    need = sum(one.n_bytes + 4 * one.kept + 4096 for one in movies)
    storage.space().require(
        Space(need),
        storage.location,
        "the feature shards",
        "set data.root elsewhere, or try data.limit",
    )


def _input_digest(shard: Sequence[ValidatedArray], *, dedup: bool) -> str:
    sources = [[one.array.movie, one.sha256] for one in shard]
    return sha256_hex(canonical_json({"format": FORMAT, "arrays": sources, "dedup": dedup}))


def _movie(one: ValidatedArray, bar: Progress, *, dedup: bool) -> MovieFeatures:
    rows_ND = _as_float16(one.array.read())
    if dedup:
        starts, _ = _runs(rows_ND)
        rows_ND = rows_ND[starts[rows_ND[starts].any(axis=1)]]
    if len(rows_ND) != one.kept:
        raise DataError(f"{one.array.path}: changed while it was imported; rerun the command")
    bar.advance()
    unknown_N = np.full(len(rows_ND), -1, np.int32)
    return MovieFeatures(one.array.movie, rows_ND, unknown_N, images=one.array.rows)


# --- report ---------------------------------------------------------------------------------------


def _report(
    validated: Sequence[ValidatedArray],
    findings: Findings,
    data: DataConfig,
    present: set[str],
    storage: Storage,
    manifest: Manifest,
    built: int,
) -> ImportReport:
    split = read_split_file(Path(data.split)) if data.split else {}
    arrays = [one.array for one in validated]
    return ImportReport(
        location=storage.location,
        data=manifest.digest,
        built=built,
        shards=len(manifest.shards),
        movies=len(arrays),
        dim=arrays[0].dim,
        rows=sum(array.rows for array in arrays),
        kept=sum(one.kept for one in validated),
        dedup=data.dedup,
        zero_rows={one.array.movie: one.zero_rows for one in validated if one.zero_rows},
        repeated={
            one.array.movie: one.longest_run for one in validated if one.longest_run > MANY_REPEATS
        },
        unlabelled=findings.unlabelled,
        unsplit=findings.unsplit,
        unknown_genres=findings.unknown_genres,
        labels_without_movie=tuple(m for m in findings.absent if m not in present),
        split_without_movie={m: split[m] for m in findings.split_absent if m not in present},
        renamed=manifest.renamed,
        reshaped={a.movie: _shape_text(a) for a in arrays if len(a.header.shape) != 2},
    )


def _shape_text(array: Array) -> str:
    return "x".join(map(str, array.header.shape))


def _wrapped(start: str, names: str) -> list[str]:
    """Return lines of at most 80 columns with the names to the right of ``start``."""
    # A no-break space keeps a name and its count on one line.
    lines = textwrap.wrap(
        names.replace(" (", "\N{NO-BREAK SPACE}("),
        _WIDTH - len(start),
        break_long_words=False,
        break_on_hyphens=False,
    )
    indent = " " * len(start)
    return [
        (indent if number else start) + line.replace("\N{NO-BREAK SPACE}", " ")
        for number, line in enumerate(lines)
    ]


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_NAMES]) + (", …" if len(names) > _MAX_NAMES else "")
