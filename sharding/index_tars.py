"""Feature tars that others wrote become a feature set where they lie: headers are read, rows not.

A sample is ``KEY.FIELD`` as in webdataset, FIELD a ``.npy`` of ``[N, D]``; other fields are passed
over. What is written is index, labels and manifest. The tars are not ours, so nobody knows their
sha256: in its place stands a digest of where each lies, its size and its ETag or time, which is
looked at whenever the set is opened.

N = rows of a movie, D = feature size
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from configs.errors import ConfigError, DataError
from configs.schema import Config, StorageConfig
from sharding.external_tars import HEADER_THREADS, ROW_TYPES, ExternalTar, external_tar, width_ratio
from sharding.format import tar
from sharding.format.encoding import read_npy_header, sha256_hex
from sharding.format.index import FeatureIndex
from sharding.format.manifest import Manifest, ManifestShard
from sharding.format.names import MANIFEST, movie_id
from sharding.label_files import labels_reader
from sharding.labels import Labels
from sharding.storage.base import RangedFile, Storage, is_url
from sharding.storage.open import open_storage

_READ_BYTES = 8 * 1024
_WANTED = "float16, float32 or float64 [N, D] in C order, D at least 1"


@dataclass(frozen=True)
class Array:
    """One ``.npy`` of a tar."""

    key: str
    field: str
    shape: tuple[int, ...]
    descr: str
    offset: int
    """First byte of the first row."""


@dataclass(frozen=True)
class Indexed:
    """What was found."""

    manifest: Manifest
    index: FeatureIndex
    labels: Labels
    field: str

    @property
    def text(self) -> str:
        """The set in a line."""
        return (
            f"movies {len(self.index):,}   rows {int(self.index.rows.sum()):,}   "
            f"dim {self.manifest.provenance['dim']}   field {self.field}   "
            f"tars {len(self.manifest.shards):,}   data {self.manifest.digest[:12]}"
        )


def index_tars(config: Config) -> Indexed:
    """Index the tars of ``data.feature_tars``; return what ``publish_index`` writes.

    Raises:
        ConfigError: there is no such place, or it names files of several folders.
        DataError: a tar is damaged, its arrays differ in kind, or a movie stands there twice.
    """
    labels_for = labels_reader(config.data)
    location, names = list_tars(config.data.feature_tars, config.storage)
    storage = open_storage(location, config.storage)
    with ThreadPoolExecutor(HEADER_THREADS, thread_name_prefix="index") as threads:
        shards = list(threads.map(lambda name: external_tar(storage, name), names))
        found = list(threads.map(lambda shard: _arrays(storage, shard), shards))
    field = choose_field(chain.from_iterable(found), config.data.feature_key, location)
    chosen = [[array for array in arrays if array.field == field] for arrays in found]
    kind = _one_kind(list(zip(names, chosen, strict=True)), location)
    dtype, dim = ROW_TYPES[kind[0]], kind[1]
    ids = _ids(chain.from_iterable(chosen), location)
    index = FeatureIndex(
        movie_id=np.array([movie.encode() for movie in ids], dtype=np.bytes_),
        shard=np.repeat(np.arange(len(names)), [len(some) for some in chosen]).astype(np.uint32),
        offset=np.array(
            [a.offset // width_ratio(dtype) for a in chain.from_iterable(chosen)], np.uint64
        ),
        rows=np.array([array.shape[0] for array in chain.from_iterable(chosen)], np.uint32),
    )
    manifest = Manifest(
        kind="features",
        provenance={
            "import": {"name": config.encoder.name, "field": field, "dedup": False},
            "tars": location,
            "dtype": dtype.str,
            "dim": dim,
        },
        shards=tuple(
            ManifestShard(shard.name, shard.n_bytes, shard.sha256, len(some), len(some), None)
            for shard, some in zip(shards, chosen, strict=True)
        ),
        index=sha256_hex(index.to_bytes()),
        renamed={
            movie: array.key
            for movie, array in zip(ids, chain.from_iterable(chosen), strict=True)
            if movie != array.key
        },
    )
    return Indexed(manifest, index, labels_for(ids), field)


def publish_index(storage: Storage, indexed: Indexed) -> None:
    """Write index, labels and manifest; the manifest is last.

    Raises:
        DataError: there is a feature set of our own.
    """
    from sharding.format.names import INDEX, LABELS

    if storage.size(MANIFEST) is not None:
        where = f"{storage.location}/{MANIFEST}"
        before = Manifest.from_bytes(storage.read(MANIFEST), where)
        if "tars" not in before.provenance:
            raise DataError(
                f"{where}: a feature set lies there already; give the index another encoder.name"
            )
        storage.remove(MANIFEST)
    storage.publish(INDEX, indexed.index.to_bytes(), replace=True)
    storage.publish(LABELS, indexed.labels.to_bytes(), replace=True)
    storage.publish(MANIFEST, indexed.manifest.to_bytes(), replace=True)


def list_tars(place: str | None, config: StorageConfig) -> tuple[str, list[str]]:
    """Return the folder or URL of the tars of ``data.feature_tars``, and their names.

    Raises:
        ConfigError: nothing is named, no tar is there, or they lie in several folders.
    """
    if place is None:
        raise ConfigError(
            "data.feature_tars: got null, want a folder or URL of feature tars, a pattern such as "
            "https://host/features-{000..370}.tar, or a .txt of names"
        )
    if place.endswith((".tar", ".txt")) or "{" in place:
        from sharding.storage.patterns import expand

        paths = expand(place, config)
        folders = sorted({path.rpartition("/")[0] or "." for path in paths})
        if len(folders) > 1:
            raise ConfigError(
                f"data.feature_tars: got tars in {folders[0]} and {folders[1]}, want one folder; "
                "index each as a dataset of its own"
            )
        location, names = folders[0], [path.rpartition("/")[2] for path in paths]
    else:
        location = place.rstrip("/")
        names = [n for n in open_storage(location, config).names() if n.endswith(".tar")]
    if not names:
        raise ConfigError(f"data.feature_tars: no .tar in {place}")
    return location if is_url(location) else str(Path(location).resolve()), names


def choose_field(arrays: Iterable[Array], wanted: str | None, where: str) -> str:
    """Return the field that holds the features.

    Args:
        arrays: All that were found.
        wanted: ``data.feature_key``, with or without ``.npy``; None takes
            ``features.npy``, or the only field of two axes.
        where: For messages.

    Raises:
        ConfigError: it is not there, or there are several.
    """
    counts = Counter(array.field for array in arrays if len(array.shape) == 2)
    if wanted is not None:
        names = [name for name in (wanted, f"{wanted}.npy") if name in counts]
    else:
        names = ["features.npy"] if "features.npy" in counts else list(counts)
    if len(names) != 1:
        there = ", ".join(f"{name} ({n:,})" for name, n in counts.most_common(5)) or "none"
        raise ConfigError(
            f"data.feature_key: got {wanted or 'null'} for {where}, want the name of the field "
            f"with the features; fields of two axes: {there}"
        )
    return names[0]


def _one_kind(found: Sequence[tuple[str, Sequence[Array]]], where: str) -> tuple[str, int]:
    """Return type and dimension of all arrays."""
    kinds = [
        (f"{where}/{name}: {array.key}.{array.field}", array)
        for name, some in found
        for array in some
    ]
    if not kinds:
        raise DataError(f"{where}: got no arrays, want {_WANTED}")
    first = kinds[0][1]
    for told, array in kinds:
        fits = len(array.shape) == 2 and array.descr in ROW_TYPES and array.shape[1] > 0
        if not fits:
            raise DataError(f"{told}: got {array.descr} {list(array.shape)}, want {_WANTED}")
        if (array.descr, array.shape[1]) != (first.descr, first.shape[1]):
            got = f"got {array.descr} rows of {array.shape[1]} numbers"
            raise DataError(
                f"{told}: {got}, want {first.descr}, {first.shape[1]} as in {first.key}"
            )
        if array.offset % width_ratio(ROW_TYPES[array.descr]):
            raise DataError(f"{told}: its rows begin at byte {array.offset}, want a multiple of 4")
    return first.descr, first.shape[1]


def _ids(arrays: Iterable[Array], where: str) -> list[str]:
    ids = [movie_id(array.key) for array in arrays]
    twice = [movie for movie, n in Counter(ids).items() if n > 1]
    if twice:
        raise DataError(f"{where}: movie {twice[0]} stands in two places ({len(twice)} such)")
    return ids


def _arrays(storage: Storage, shard: ExternalTar) -> list[Array]:
    """Return the arrays of a tar, by its headers and theirs."""
    where = f"{storage.location}/{shard.name}"
    raw = RangedFile(storage, shard.name, shard.n_bytes)
    file = cast("BinaryIO", io.BufferedReader(raw, _READ_BYTES))
    found = []
    for member in tar.members(file, where):
        folder, _, base = member.name.rpartition("/")
        key, _, field = base.partition(".")
        if member.kind == "file" and field.lower().endswith("npy") and not folder.startswith("__"):
            found.append(_array(file, member, key, field, f"{where}: {member.name}"))
    return found


def _array(file: BinaryIO, member: tar.Member, key: str, field: str, where: str) -> Array:
    file.seek(member.offset)
    header = read_npy_header(file, member.size, where)
    shape, descr = header.shape, header.dtype.str
    if member.size != header.file_bytes:
        raise DataError(f"{where}: got {member.size} bytes, and its header tells {list(shape)}")
    if header.fortran_order and min(shape, default=0) > 1:
        descr = f"Fortran {descr}"
    return Array(key, field.lower(), shape, descr, member.offset + header.n_bytes)
