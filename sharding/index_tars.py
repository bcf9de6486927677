"""Indexing of external feature tars in place as a feature set.

Headers are read first, then all rows once: a NaN found by training would cost an epoch.

A sample is ``KEY.FIELD`` as in WebDataset, FIELD being a ``.npy`` of ``[N, D]``; other fields are
ignored. WebDataset splits at the first dot, but a movie's name may contain one; see
``with_field``.

Index, labels and manifest are written. The sha256 of an external tar is unknown, so the manifest
contains a digest of its location, size and ETag or modification time instead. This digest is
compared whenever the set is opened.

N = rows of a movie, D = feature size
"""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain, takewhile
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from configs.errors import ConfigError, DataError
from configs.redaction import has_secret
from configs.runtime.progress import progress
from configs.schema import Config, StorageConfig
from sharding.external_tars import (
    HEADER_THREADS,
    ROW_TYPES,
    ExternalTar,
    external_tar,
    float16_view,
    width_ratio,
)
from sharding.features import FeatureSet, not_finite
from sharding.format import tar
from sharding.format.encoding import read_npy_header, rows_shape, sha256_hex
from sharding.format.index import FeatureIndex
from sharding.format.manifest import Manifest, ManifestShard
from sharding.format.names import MANIFEST, movie_id
from sharding.label_files import labels_reader, require_labels
from sharding.labels import Labels
from sharding.plan import choose, exclude_override
from sharding.storage.base import RangedFile, Storage, is_url
from sharding.storage.open import open_storage

logger = logging.getLogger(__name__)

_READ_BYTES = 8 * 1024
_ROW_THREADS = 4
"""Movies in memory at the same time, while their numbers are checked."""

_EXPECTED = "float16, float32 or float64 [N, D] in C order, D at least 1"


@dataclass(frozen=True)
class Array:
    """One ``.npy`` member of a tar."""

    key: str
    field: str
    """In lower case."""

    name: str
    """``KEY.FIELD`` as in the tar, without folders."""

    shape: tuple[int, ...]
    descr: str
    offset: int
    """First byte of the first row."""

    @property
    def rows_shape(self) -> tuple[int, ...]:
        """``(N, D)``, or the shape of an array that is no table of rows."""
        return rows_shape(self.shape)

    @property
    def is_table(self) -> bool:
        """Whether the array has two axes, apart from those of length 1."""
        return len(self.shape) > 1 and len(self.rows_shape) == 2


@dataclass(frozen=True)
class Indexed:
    """Manifest, index and labels of external tars."""

    manifest: Manifest
    index: FeatureIndex
    labels: Labels
    field: str

    @property
    def text(self) -> str:
        """Totals and data digest of the set, in two lines."""
        return (
            f"movies {len(self.index):,}   rows {int(self.index.rows.sum()):,}   "
            f"dim {self.manifest.provenance['dim']}   field {self.field}   "
            f"tars {len(self.manifest.shards):,}\ndata {self.manifest.digest[:12]}"
        )


def index_tars(config: Config) -> Indexed:
    """Index the tars of ``data.feature_tars``; return what ``publish_index`` writes.

    Movies of ``data.exclude`` are left out.

    Raises:
        ConfigError: the location does not exist, or contains files of several folders.
        DataError: a tar is corrupt, its arrays differ in type or shape, a movie is stored twice,
            numbers are not finite or beyond float16, or no movie has a label.
    """
    labels_for = labels_reader(config.data)
    location, names = list_tars(config.data.feature_tars, config.storage)
    storage = open_storage(location, config.storage)
    shards, per_tar = _read_headers(storage, names)
    if not any(per_tar):
        raise _no_arrays(storage, shards[0])
    field = choose_field(chain.from_iterable(per_tar), config.data.feature_key, location)
    chosen = _without([with_field(arrays, field) for arrays in per_tar], config.data.exclude)
    descr, dim = _common_type(list(zip(names, chosen, strict=True)), location)
    arrays = list(chain.from_iterable(chosen))
    _log_reshaped(arrays)
    ids, dtype = _ids(arrays, location), ROW_TYPES[descr]
    index = _index(ids, chosen, dtype)
    manifest = Manifest(
        kind="features",
        provenance={
            "import": {"name": config.encoder.name, "field": field, "dedup": False},
            "tars": location,
            "dtype": dtype.str,
            "dim": dim,
        },
        shards=tuple(
            ManifestShard(shard.name, shard.n_bytes, shard.sha256, len(movies), len(movies), None)
            for shard, movies in zip(shards, chosen, strict=True)
        ),
        index=sha256_hex(index.to_bytes()),
        renamed={
            movie: array.key for movie, array in zip(ids, arrays, strict=True) if movie != array.key
        },
    )
    labels = labels_for(ids)
    require_labels(labels, ids, config.data)
    _check_rows(FeatureSet(float16_view(storage, dtype), manifest, index, labels))
    return Indexed(manifest, index, labels, field)


def _read_headers(
    storage: Storage, names: Sequence[str]
) -> tuple[list[ExternalTar], list[list[Array]]]:
    """Return the tars, and the arrays of each."""
    # Reading headers is bound by the latency of the storage, not by the processor.
    with ThreadPoolExecutor(HEADER_THREADS, thread_name_prefix="index") as threads:
        shards = list(threads.map(partial(external_tar, storage), names))
        per_tar = []
        with progress(len(shards), label="index", unit="tars") as bar:
            for arrays in threads.map(partial(_arrays, storage), shards):
                per_tar.append(arrays)
                bar.advance()
    return shards, per_tar


def _index(
    ids: Sequence[str], per_tar: Sequence[Sequence[Array]], dtype: np.dtype[Any]
) -> FeatureIndex:
    """Return where the rows of each movie are; offsets count in the float16 view of the tars."""
    arrays = list(chain.from_iterable(per_tar))
    n_movies = [len(movies) for movies in per_tar]
    return FeatureIndex(
        movie_id=np.array([movie.encode() for movie in ids], dtype=np.bytes_),
        shard=np.repeat(np.arange(len(per_tar)), n_movies).astype(np.uint32),
        offset=np.array([array.offset // width_ratio(dtype) for array in arrays], np.uint64),
        rows=np.array([array.rows_shape[0] for array in arrays], np.uint32),
    )


def publish_index(storage: Storage, indexed: Indexed) -> None:
    """Write index, labels and, last, the manifest.

    Raises:
        DataError: the location contains a feature set with its own tars.
    """
    from sharding.format.names import INDEX, LABELS

    if storage.size(MANIFEST) is not None:
        where = f"{storage.location}/{MANIFEST}"
        existing = Manifest.from_bytes(storage.read(MANIFEST), where)
        # An index can be rebuilt from the tars; a set with its own tars must not be lost.
        if "tars" not in existing.provenance:
            raise DataError(
                f"{where}: a feature set with its own tars already exists; set another encoder.name"
            )
        storage.remove(MANIFEST)
    storage.publish(INDEX, indexed.index.to_bytes(), replace=True)
    storage.publish(LABELS, indexed.labels.to_bytes(), replace=True)
    storage.publish(MANIFEST, indexed.manifest.to_bytes(), replace=True)


def list_tars(source: str | None, config: StorageConfig) -> tuple[str, list[str]]:
    """Return the folder or URL of the tars of ``data.feature_tars``, and their names.

    Raises:
        ConfigError: the key is not set, there is no tar, or the tars are in several folders.
    """
    if source is None:
        raise ConfigError(
            "data.feature_tars: got null, want a folder or URL of feature tars, a pattern such as "
            "https://host/features-{000..370}.tar, or a .txt of names"
        )
    if source.endswith((".tar", ".txt")) or "{" in source or has_secret(source):
        from sharding.storage.patterns import expand

        paths = expand(source, config)
        if any(map(has_secret, paths)):
            raise ConfigError(
                f"data.feature_tars: got {source}, want URLs without password and query, since "
                "the manifest of the set stores them; put the password into ~/.netrc"
            )
        folders = sorted({path.rpartition("/")[0] or "." for path in paths})
        if len(folders) > 1:
            raise ConfigError(
                f"data.feature_tars: got tars in {folders[0]} and {folders[1]}, want one folder; "
                "index each as a dataset of its own"
            )
        location, names = folders[0], [path.rpartition("/")[2] for path in paths]
    else:
        location = source.rstrip("/")
        names = [
            name
            for name in open_storage(location, config).names()
            if name.endswith(".tar") and not name.startswith(".")
        ]
    if not names:
        raise ConfigError(f"data.feature_tars: no .tar in {source}")
    return location if is_url(location) else str(Path(location).resolve()), names


def choose_field(arrays: Iterable[Array], key: str | None, where: str) -> str:
    """Return the field that contains the features.

    Args:
        arrays: All arrays of the tars.
        key: ``data.feature_key``, with or without ``.npy``; None selects ``features.npy``, or the
            only field of two axes.
        where: Location for error messages.

    Raises:
        ConfigError: the field is missing, or the choice is ambiguous.
    """
    counts = Counter(array.field for array in arrays if array.is_table)

    def exists(name: str) -> bool:
        return any(field == name or field.endswith(f".{name}") for field in counts)

    if key is not None:
        names = [name for name in (key.lower(), f"{key.lower()}.npy") if exists(name)]
    else:
        names = ["features.npy"] if exists("features.npy") else list(counts)
    if len(names) != 1:
        available = ", ".join(f"{name} ({n:,})" for name, n in counts.most_common(5)) or "none"
        end = _common_end(counts)
        dots = f"; want {end} if the dots before it belong to the movies" if end else ""
        raise ConfigError(
            f"data.feature_key: got {key or 'null'} for {where}, want the name of the field "
            f"with the features; fields of two axes: {available}{dots}"
        )
    return names[0]


def _common_end(fields: Collection[str]) -> str:
    """Return the common end of fields: ``clip.npy`` of ``a.clip.npy`` and ``b.clip.npy``."""
    parts = zip(*(reversed(field.split(".")) for field in fields), strict=False)
    common = [part[0] for part in takewhile(lambda part: len(set(part)) == 1, parts)]
    return ".".join(reversed(common)) if len(fields) > 1 else ""


def with_field(arrays: Sequence[Array], field: str) -> list[Array]:
    """Return the arrays of a field, in the order of their tar.

    ``tt1.v2.features.npy`` is an array of the movie ``tt1.v2`` if ``tt1`` has no array of the field
    itself. Otherwise it is another field of ``tt1``, as in WebDataset.
    """
    plain = {array.key for array in arrays if array.field == field}
    return [
        array if array.field == field else replace(array, key=array.name[: -len(field) - 1])
        for array in arrays
        if array.field == field
        or (array.field.endswith(f".{field}") and array.is_table and array.key not in plain)
    ]


def _no_arrays(storage: Storage, shard: ExternalTar) -> DataError:
    """Return the error for tars without any ``.npy``, with the fields of the first tar."""
    where = f"{storage.location}/{shard.name}"
    with storage.open(shard.name) as file:
        names = [member.name.rpartition("/")[2] for member in tar.members(file, where)]
    fields = Counter(name.partition(".")[2] for name in names if not name.startswith("."))
    got = ", ".join(f"{field or 'none'} ({n:,})" for field, n in fields.most_common(5))
    return DataError(
        f"{where}: got fields {got or 'none'}, want a .npy of {_EXPECTED} per movie; save the "
        "arrays with numpy.save"
    )


def _without(per_tar: list[list[Array]], exclude: Sequence[str]) -> list[list[Array]]:
    ids = [movie_id(array.key) for array in chain.from_iterable(per_tar)]
    selected = set(choose(ids, None, exclude))
    return [[array for array in arrays if movie_id(array.key) in selected] for arrays in per_tar]


def _check_rows(features: FeatureSet) -> None:
    """Read all rows; raise ``DataError`` that names each movie with unusable numbers."""
    bad: dict[str, str] = {}
    with (
        ThreadPoolExecutor(_ROW_THREADS, thread_name_prefix="rows") as threads,
        progress(len(features), label="check", unit="movies") as bar,
    ):
        defects = threads.map(partial(not_finite, features), range(len(features)))
        for movie, defect in zip(features.movie_ids, defects, strict=True):
            if defect is not None:
                bad[movie] = defect
            bar.advance()
    if bad:
        more = f", and {len(bad) - 1} more movies" if len(bad) > 1 else ""
        raise DataError(
            f"{next(iter(bad.values()))}{more}; encode them again, or continue without them: "
            f"{exclude_override(bad)}"
        )


def _common_type(per_tar: Sequence[tuple[str, Sequence[Array]]], where: str) -> tuple[str, int]:
    """Return type and dimension, which all arrays must share."""
    named = [
        (f"{where}/{name}: {array.name}", array) for name, arrays in per_tar for array in arrays
    ]
    if not named:
        raise DataError(f"{where}: got no arrays, want {_EXPECTED}")
    first = named[0][1]
    for place, array in named:
        shape = array.rows_shape
        if len(shape) != 2 or array.descr not in ROW_TYPES or not shape[1]:
            is_fortran = array.descr.startswith("Fortran")
            remedy = "; save numpy.ascontiguousarray(ARRAY)" if is_fortran else ""
            raise DataError(
                f"{place}: got {array.descr} {list(array.shape)}, want {_EXPECTED}{remedy}"
            )
        if (array.descr, shape[1]) != (first.descr, first.rows_shape[1]):
            got = f"got {array.descr} rows of {shape[1]} numbers"
            raise DataError(
                f"{place}: {got}, want {first.descr}, {first.rows_shape[1]} as in {first.key}"
            )
        # Otherwise the offset of the float16 view would be no integer.
        if array.offset % width_ratio(ROW_TYPES[array.descr]):
            raise DataError(f"{place}: its rows start at byte {array.offset}, want a multiple of 4")
    return first.descr, first.rows_shape[1]


def _log_reshaped(arrays: Iterable[Array]) -> None:
    other = [array for array in arrays if len(array.shape) != 2]
    if other:
        logger.warning(
            "%d arrays are read as [N, D], e.g. %s of shape %s",
            len(other),
            other[0].name,
            list(other[0].shape),
        )


def _ids(arrays: Iterable[Array], where: str) -> list[str]:
    ids = [movie_id(array.key) for array in arrays]
    repeated = [movie for movie, n in Counter(ids).items() if n > 1]
    if repeated:
        raise DataError(
            f"{where}: movie {repeated[0]} is stored twice, want once ({len(repeated)} such movies)"
        )
    return ids


def _arrays(storage: Storage, shard: ExternalTar) -> list[Array]:
    """Return the arrays of a tar from its headers and theirs."""
    where = f"{storage.location}/{shard.name}"
    raw = RangedFile(storage, shard.name, shard.n_bytes)
    file = cast("BinaryIO", io.BufferedReader(raw, _READ_BYTES))
    arrays = []

    @cache
    def files() -> dict[str, list[tar.Member]]:
        return tar.by_name(tar.members(file, where))

    for member in tar.follow_links(tar.members(file, where), lambda _: files()):
        folder, _, base = member.name.rpartition("/")
        key, _, field = base.partition(".")
        # webdataset reserves names that start with two underscores for its own metadata.
        is_sample = key and not folder.startswith("__")
        if member.kind == "file" and field.lower().endswith("npy") and is_sample:
            arrays.append(_array(file, member, key, field, f"{where}: {member.name}"))
    return arrays


def _array(file: BinaryIO, member: tar.Member, key: str, field: str, where: str) -> Array:
    file.seek(member.offset)
    header = read_npy_header(file, member.size, where)
    shape, descr = header.shape, header.dtype.str
    if member.size != header.file_bytes and not header.dtype.hasobject:
        raise DataError(
            f"{where}: got {member.size} bytes, want {header.file_bytes} for {list(shape)}"
        )
    if header.fortran_order and min(rows_shape(shape), default=0) > 1:
        descr = f"Fortran {descr}"
    name = f"{key}.{field}"
    return Array(key, field.lower(), name, shape, descr, member.offset + header.n_bytes)
