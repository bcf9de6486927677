"""Feature sets: one row per key frame, written by encoders and imports, read by training.

N = images of a movie, D = feature size
KEY.features.npy  float16 [N, D], C order: consecutive rows are one range of bytes
KEY.shots.npy     int32 [N], the shot of each row; -1 if unknown
KEY.json          {"id", "images", "rejected"}; rejected: names of images, as in the frame shard
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from configs.errors import DataError
from configs.runtime.hints import hint
from configs.schema import StorageConfig
from sharding.external_tars import OutOfRangeError, open_tars
from sharding.format import tar
from sharding.format.encoding import (
    NpyHeader,
    canonical_json,
    npy_header,
    read_npy_header,
    sha256_hex,
)
from sharding.format.index import FeatureIndex
from sharding.format.manifest import Manifest, ManifestShard, Rejected, Sidecar
from sharding.format.names import (
    FEATURES,
    INDEX,
    INFO,
    LABELS,
    MANIFEST,
    SHOTS,
    array_list,
    movies_digest,
    sidecar_name,
    tar_name,
)
from sharding.labels import Labels
from sharding.shard import Content, commit_shard, read_sidecar, shard_done, tar_digest, tar_writer
from sharding.storage.base import Range, RangeReader, Storage
from sharding.storage.open import open_storage

logger = logging.getLogger(__name__)
_DIGITS = 12
"""Digits of a digest that identify it, in names and messages."""

_AT_DIGEST = re.compile(r"(.+)@([0-9a-f]{12,64})")
_KEPT_MANIFEST = re.compile(r"manifest-([0-9a-f]{12})\.json")
_MOVIES_PER_READ = 256
_PIECE_BYTES = 16 * 1024**2


@dataclass(frozen=True, eq=False)
class MovieFeatures:
    """Features of one movie, to be written to a feature shard."""

    movie: str
    """Id of the movie."""

    features_ND: npt.NDArray[np.float16]
    """float16 ``[N, D]``, C order, in order of (shot, image)."""

    shots_N: npt.NDArray[np.int32]
    """int32 ``[N]``, the shot of each row; -1 if unknown."""

    images: int
    """Number of images, or rows, of the source."""

    rejected: Mapping[str, str] = field(default_factory=dict)
    """Reason for each image that could not be encoded, by its name in the frame shard."""


def publish_feature_shard(
    storage: Storage,
    number: int,
    movies: Iterable[MovieFeatures],
    *,
    input_digest: str,
    information: Mapping[str, object] | None = None,
) -> Sidecar:
    """Write one feature shard: the tar, then its sidecar. An existing shard is replaced.

    Args:
        storage: Storage of the feature set.
        number: Shard number.
        movies: Movies in order of id; consumed one by one, so only one needs to be in memory.
        input_digest: Digest of everything the bytes depend on.
        information: Further entries of the sidecar, e.g. library versions; part of no digest.

    Raises:
        ValueError: an array has another type or shape, or movies are out of order.
    """
    written: list[MovieSummary] = []
    with tar_writer(storage, "features", number) as (writer, digest):
        for movie in movies:
            _check(movie, written)
            writer.add(movie.movie + FEATURES, npy_header(movie.features_ND), _raw(movie))
            shots = movie.shots_N
            writer.add(movie.movie + SHOTS, npy_header(shots), shots.astype("<i4").tobytes())
            # Reasons are texts of a library and vary with its version: only the sidecar has them.
            info = {"id": movie.movie, "images": movie.images, "rejected": list(movie.rejected)}
            writer.add(movie.movie + INFO, canonical_json(info))
            written.append(MovieSummary(movie.movie, len(shots), movie.images, movie.rejected))
    content = Content(
        samples=len(written),
        movies=tuple(movie.movie for movie in written),
        input_digest=input_digest,
        statistics={
            "rows": [movie.rows for movie in written],
            "images": [movie.images for movie in written],
        },
        rejected=tuple(
            Rejected(movie.movie, member, reason)
            for movie in written
            for member, reason in movie.rejected.items()
        ),
        information=information or {},
    )
    return commit_shard(storage, "features", number, digest, content)


@dataclass(frozen=True)
class MovieSummary:
    """Counts of a movie that was written."""

    movie: str
    rows: int
    images: int
    rejected: Mapping[str, str]


def feature_shard_done(
    storage: Storage, number: int, input_digest: str, *, replace: bool = False
) -> bool:
    """Return whether a feature shard is complete and has this input digest.

    Raises:
        DataError: it has another input digest, and ``replace`` is off.
    """
    return shard_done(storage, "features", number, input_digest, replace=replace)


def seal_features(
    storage: Storage,
    *,
    n_shards: int,
    provenance: Mapping[str, object],
    labels_for: Callable[[Sequence[str]], Labels],
    renamed: Mapping[str, str] | None = None,
    parent: str | None = None,
) -> Manifest:
    """Write index, labels and, last, the manifest of a complete feature set.

    Every tar is hashed. A shard whose tar does not match its sidecar is marked as missing.

    Args:
        storage: Storage of the feature set.
        n_shards: Number of shards of the complete set.
        provenance: ``{"encoder": {…}, "dim": D}`` or ``{"import": {…}, "dim": D}``.
        labels_for: Returns the labels of the given movies, in their order.
        renamed: Original name of each movie whose id differs from it.
        parent: Digest of the manifest that this one extends.

    Raises:
        DataError: a shard is missing or corrupt, or its rows have another dimension.
    """
    logger.info("hashing the shards before sealing: %d", n_shards)
    sidecars = [_intact_sidecar(storage, number) for number in range(n_shards)]
    missing = [number for number, sidecar in enumerate(sidecars) if sidecar is None]
    if missing or not n_shards:
        raise DataError(
            f"{storage.location}: {len(missing)} of {n_shards} feature shards are missing; "
            f"run {_maker()} again, on Slurm with --array={array_list(missing)}"
        )
    index = _index(storage, n_shards, dim=provenance["dim"])
    index_data = index.to_bytes()
    manifest = Manifest(
        kind="features",
        provenance=provenance,
        shards=tuple(ManifestShard.of(sidecar) for sidecar in sidecars if sidecar),
        index=sha256_hex(index_data),
        parent=parent,
        renamed=renamed or {},
    )
    # Readers must not combine an old manifest with the new index.
    if storage.size(MANIFEST) is not None and storage.read(MANIFEST) != manifest.to_bytes():
        storage.remove(MANIFEST)
    storage.publish(INDEX, index_data, replace=True)
    storage.publish(LABELS, labels_for(index.movies).to_bytes(), replace=True)
    storage.publish(MANIFEST, manifest.to_bytes(), replace=True)
    logger.info("sealed %s: %d movies, data %s", storage.location, len(index), manifest.digest[:12])
    return manifest


class UnknownMovieError(DataError, KeyError):
    """Access to a movie that the set does not contain."""

    def __str__(self) -> str:
        """Return the message unchanged; ``KeyError`` would quote it."""
        return str(self.args[0])


@dataclass(frozen=True, eq=False)
class MovieRows:
    """Rows of one movie in memory."""

    movie: str
    """Id of the movie."""

    features_ND: npt.NDArray[np.float16]
    """float16 ``[N, D]``, in order of (shot, image)."""

    shots_N: npt.NDArray[np.int32]
    """int32 ``[N]``, the shot of each row; -1 if the set does not contain shots."""


@dataclass(frozen=True, eq=False, repr=False)
class FeatureSet:
    """Sealed feature set: a read-only mapping from movie id to rows, ``features["tt0032138"]``.

    Opening a set reads its index and labels; rows are read when a movie is accessed.
    """

    storage: Storage
    """Storage of its tars."""

    manifest: Manifest
    index: FeatureIndex
    labels: Labels

    @property
    def dim(self) -> int:
        """Numbers per row (D)."""
        return _dim(self.manifest.provenance, self.storage.location)

    @property
    def digest(self) -> str:
        """The data digest: sha256 of the manifest."""
        return self.manifest.digest

    @cached_property
    def movie_ids(self) -> tuple[str, ...]:
        """Movie ids in the order of the index."""
        return self.index.movies

    def shard_file(self, movie: int) -> str:
        """Return the name of the tar that contains the movie at this position in the index."""
        return self.manifest.shards[int(self.index.shard[movie])].name

    def __getitem__(self, movie_id: str) -> MovieRows:
        """Read the rows and shots of a movie.

        Raises:
            UnknownMovieError: the set does not contain the movie; a ``DataError`` and ``KeyError``.
            DataError: a shard is missing or truncated.
        """
        position = self._positions.get(movie_id)
        if position is None:
            near = difflib.get_close_matches(str(movie_id), self.movie_ids, n=1)
            advice = f"did you mean {near[0]!r}?" if near else "want one of features.movie_ids"
            raise UnknownMovieError(f"{self.storage.location}: no movie {movie_id!r}; {advice}")
        features_ND = read_rows(self, position)
        # Other tools write no shots next to the rows.
        if "tars" in self.manifest.provenance:
            return MovieRows(movie_id, features_ND, np.full(len(features_ND), -1, np.int32))
        return MovieRows(movie_id, features_ND, next(read_shots(self, [position])))

    def __contains__(self, movie_id: object) -> bool:
        return movie_id in self._positions

    def __iter__(self) -> Iterator[str]:
        return iter(self.movie_ids)

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        return (
            f"<FeatureSet {self._name!r}: {len(self):,} movies, {int(self.index.rows.sum()):,} "
            f"rows of {self.dim}, digest {self.digest[:12]}, {self.storage.location}>"
        )

    @cached_property
    def _positions(self) -> Mapping[str, int]:
        return {movie_id: position for position, movie_id in enumerate(self.movie_ids)}

    @property
    def _name(self) -> str:
        """Name of the encoder, or of imported arrays or tars."""
        provenance = self.manifest.provenance
        origin = provenance.get("encoder") or provenance.get("import")
        return str(origin.get("name", "")) if isinstance(origin, Mapping) else ""


def read_rows(
    features: FeatureSet, movie: int, first: int = 0, count: int | None = None
) -> npt.NDArray[np.float16]:
    """Return rows of a movie, float16 ``[N, D]``; by default all.

    Args:
        features: The feature set.
        movie: Position of the movie in the index.
        first: First row.
        count: Number of rows (N).

    Raises:
        DataError: the shard of the movie is missing or truncated.
    """
    n_rows = int(features.index.rows[movie]) - first if count is None else count
    rows_ND = np.zeros((n_rows, features.dim), np.float16)
    begin = int(features.index.offset[movie]) + first * 2 * features.dim
    start = Range(features.shard_file(movie), begin)
    features.storage.read_into([start], [rows_ND.reshape(-1).view(np.uint8).data])
    return rows_ND


def not_finite(features: FeatureSet, movie: int) -> str | None:
    """Read the rows of a movie, by its position in the index; return what is wrong with them.

    Returns:
        None if all numbers are finite and in the range of float16; else one line with movie, tar
        and reason.

    Raises:
        DataError: the shard of the movie is missing or truncated.
    """
    name, tar_file = features.movie_ids[movie], features.shard_file(movie)
    where = f"{features.storage.location}/{tar_file}: movie {name}"
    rows, step = int(features.index.rows[movie]), max(1, _PIECE_BYTES // (2 * features.dim))
    bad = 0
    try:
        for first in range(0, rows, step):
            rows_ND = read_rows(features, movie, first, min(step, rows - first))
            bad += int((~np.isfinite(rows_ND)).any(axis=1).sum())
    except OutOfRangeError as error:
        return f"movie {name}: {error}"
    return f"{where}: got NaN or infinite numbers in {bad} of {rows} rows" if bad else None


def read_shots(
    features: FeatureSet, movies: Sequence[int], source: RangeReader | None = None
) -> Iterator[npt.NDArray[np.int32]]:
    """Yield the shot of each row, int32 ``[N]``, of movies by their position in the index.

    Args:
        features: The feature set; its index determines the positions of the shots.
        movies: Positions of movies in the index.
        source: Reader of the tars; default: the storage of the set.

    Raises:
        DataError: the shots do not follow the rows, for example in an external tar.
    """
    index, row_bytes = features.index, 2 * features.dim
    for first in range(0, len(movies), _MOVIES_PER_READ):
        batch = movies[first : first + _MOVIES_PER_READ]
        empty = [np.empty(int(index.rows[movie]), np.dtype("<i4")) for movie in batch]
        # The shots are the next member after the rows: tar header, array header, numbers.
        begins = [int(index.offset[m]) + int(index.rows[m]) * row_bytes for m in batch]
        buffers = [bytearray(tar.BLOCK + len(npy_header(each)) + each.nbytes) for each in empty]
        (source or features.storage).read_into(
            [
                Range(features.shard_file(movie), begin + tar.padding(begin))
                for movie, begin in zip(batch, begins, strict=True)
            ],
            [memoryview(buffer) for buffer in buffers],
        )
        for movie, each, buffer in zip(batch, empty, buffers, strict=True):
            header, name = npy_header(each), features.movie_ids[movie] + SHOTS
            content = buffer[tar.BLOCK :]
            if not tar.is_header(bytes(buffer[: tar.BLOCK]), name, len(content)) or (
                not content.startswith(header)
            ):
                where = f"{features.storage.location}/{features.shard_file(movie)}"
                raise DataError(
                    f"{where}: {name} does not follow the rows; another tool wrote this tar"
                )
            yield np.frombuffer(content, each.dtype, offset=len(header))


def open_features(location: str, storage: StorageConfig | None = None) -> FeatureSet:
    """Open a sealed feature set.

    Args:
        location: Folder or URL. ``FOLDER@DIGEST`` opens the set as it was when it had this digest,
            before its extensions; at least the first 12 digits.
        storage: The object store options.

    Raises:
        DataError: the set is not sealed or corrupt, its labels belong to another index, or it never
            had this digest.
    """
    folder, digest = split_digest(location)
    features = open_feature_storage(open_storage(folder, storage), storage)
    if digest is None:
        return features
    selected = before_extension(features, digest)
    if selected is None:
        known = ", ".join([features.digest[:_DIGITS], *_parents(features.storage)])
        raise DataError(f"{location}: got digest {digest[:_DIGITS]}, want one of {known}")
    return selected


def split_digest(location: str) -> tuple[str, str | None]:
    """Return folder and digest of ``FOLDER@DIGEST``; the digest is None if there is none."""
    match = _AT_DIGEST.fullmatch(location)
    return (match[1], match[2]) if match else (location, None)


def keep_parent(storage: Storage, manifest: Manifest) -> None:
    """Keep manifest, index and labels of a sealed set that is about to be extended.

    Its tars stay as they are, so that ``before_extension`` can open the set as it is now. The
    manifest is not read again: another task may have removed it.
    """
    for name in (INDEX, LABELS):
        storage.publish(_kept(name, manifest.digest), storage.read(name), replace=True)
    storage.publish(_kept(MANIFEST, manifest.digest), manifest.to_bytes(), replace=True)


def before_extension(features: FeatureSet, digest: str) -> FeatureSet | None:
    """Return a set as it was when it had a digest.

    Args:
        features: The set as it is now; it counts as well.
        digest: At least the first 12 digits of the digest of its manifest.

    Returns:
        None if the set never had this digest, or its shards were encoded again since.

    Raises:
        DataError: the kept files are corrupt.
    """
    if features.digest.startswith(digest):
        return features
    storage = features.storage
    if storage.size(_kept(MANIFEST, digest)) is None:
        return None
    manifest, index = _read_index(storage, digest)
    unchanged = features.manifest.shards[: len(manifest.shards)] == manifest.shards
    if not manifest.digest.startswith(digest) or not unchanged:
        return None
    return FeatureSet(storage, manifest, index, _read_labels(storage, index, digest))


def _kept(name: str, digest: str) -> str:
    """Return the name under which a file of a set with this digest is kept."""
    stem, _, suffix = name.partition(".")
    return f"{stem}-{digest[:_DIGITS]}.{suffix}" if digest else name


def _parents(storage: Storage) -> list[str]:
    matches = map(_KEPT_MANIFEST.fullmatch, storage.names())
    return [match[1] for match in matches if match]


def open_feature_storage(storage: Storage, config: StorageConfig | None = None) -> FeatureSet:
    """Open a sealed feature set; see ``open_features``.

    Args:
        storage: Storage of the set.
        config: Object store options for external tars.
    """
    manifest, index = open_index(storage)
    labels = _read_labels(storage, index)
    if "tars" in manifest.provenance:
        storage = open_tars(manifest, config)
    return FeatureSet(storage, manifest, index, labels)


def open_index(storage: Storage) -> tuple[Manifest, FeatureIndex]:
    """Open a sealed feature set without its labels, which may be missing or outdated.

    Raises:
        DataError: the set is not sealed, or corrupt.
    """
    where = storage.location
    if storage.size(MANIFEST) is None:
        raise DataError(
            f"{where}: no {MANIFEST}; the feature set is missing or not sealed yet: run {_maker()}"
        )
    try:
        return _read_index(storage)
    except DataError as error:
        raise DataError(f"{error}; seal the set again: run {_maker('seal')}") from None


def _maker(encode: str = "run") -> str:
    """Return the commands that make a feature set; which of them made this one is unknown."""
    imported = hint("movienet-shard import-features")
    return f"{hint(f'movienet-encode {encode}')} or, for imported arrays, {imported}"


def _read_index(storage: Storage, digest: str = "") -> tuple[Manifest, FeatureIndex]:
    where, name, index = storage.location, _kept(MANIFEST, digest), _kept(INDEX, digest)
    manifest = Manifest.from_bytes(storage.read(name), f"{where}/{name}")
    if manifest.kind != "features":
        raise DataError(f"{where}: got a set of {manifest.kind}, want features")
    data = storage.read(index)
    if sha256_hex(data) != manifest.index:
        raise DataError(f"{where}/{index}: does not match {name}")
    _dim(manifest.provenance, where)
    return manifest, FeatureIndex.from_bytes(data, f"{where}/{index}")


def _read_labels(storage: Storage, index: FeatureIndex, digest: str = "") -> Labels:
    name = _kept(LABELS, digest)
    where = f"{storage.location}/{name}"
    labels = Labels.from_bytes(storage.read(name), where)
    if labels.movies_sha256 != movies_digest(index.movies):
        raise DataError(f"{where}: made for other movies; run {hint('movienet-shard relabel')}")
    return labels


@dataclass(frozen=True)
class StoredMovie:
    """Position of a movie in the tar of a feature shard."""

    movie: str
    rows: int
    dim: int
    offset: int
    """First byte of the first row, counted from the start of the tar."""


def stored_movies(storage: Storage, number: int) -> Iterator[StoredMovie]:
    """Yield the movies of a feature shard; reads only its tar headers and array headers.

    Raises:
        DataError: the tar is corrupt, or an array is not float16 ``[N, D]`` in C order.
    """
    name = tar_name("features", number)
    where = f"{storage.location}/{name}"
    with storage.open(name) as file:
        for member in tar.members(file, where):
            if member.name.endswith(FEATURES):
                movie = member.name.removesuffix(FEATURES)
                header = _feature_header(file, member, f"{where}: {member.name}")
                rows, dim = header.shape
                yield StoredMovie(movie, rows, dim, member.offset + header.n_bytes)


def _feature_header(file: BinaryIO, member: tar.Member, where: str) -> NpyHeader:
    file.seek(member.offset)
    header = read_npy_header(file, member.size, where)
    is_plain = header.dtype == np.dtype("<f2") and not header.fortran_order
    if not is_plain or len(header.shape) != 2 or member.size != header.file_bytes:
        order = "Fortran order" if header.fortran_order else "C order"
        got = f"{header.dtype} {list(header.shape)}, {order}, in {member.size} bytes"
        raise DataError(f"{where}: got {got}, want float16 [N, D], C order")
    return header


def _index(storage: Storage, n_shards: int, *, dim: object) -> FeatureIndex:
    numbered = [
        (number, movie) for number in range(n_shards) for movie in stored_movies(storage, number)
    ]
    other = next((movie for _, movie in numbered if movie.dim != dim), None)
    if other is not None:
        raise DataError(
            f"{storage.location}: {other.movie}: got rows of {other.dim} numbers, want {dim}"
        )
    ids = [movie.movie for _, movie in numbered]
    if len(set(ids)) != len(ids):
        twice = next(movie for movie in ids if ids.count(movie) > 1)
        raise DataError(
            f"{storage.location}: movie {twice} is stored twice, want once; rebuild the set with "
            "`--replace`"
        )
    return FeatureIndex(
        movie_id=np.array([movie.encode() for movie in ids], dtype=np.bytes_),
        shard=np.array([number for number, _ in numbered], np.uint32),
        offset=np.array([movie.offset for _, movie in numbered], np.uint64),
        rows=np.array([movie.rows for _, movie in numbered], np.uint32),
    )


def _intact_sidecar(storage: Storage, number: int) -> Sidecar | None:
    sidecar = read_sidecar(storage, "features", number)
    if sidecar is None:
        return None
    if tar_digest(storage, sidecar.name).sha256 != sidecar.sha256:
        # Without its sidecar a rerun rebuilds the shard; a skip compares sizes only.
        storage.remove(sidecar_name("features", number))
        logger.warning(
            "%s/%s: does not match its sidecar; marked as missing", storage.location, sidecar.name
        )
        return None
    return sidecar


def _dim(provenance: Mapping[str, object], where: str) -> int:
    dim = provenance.get("dim")
    if not isinstance(dim, int):
        raise DataError(f"{where}/{MANIFEST}: provenance dim: got {dim!r}, want a number")
    return dim


def _raw(movie: MovieFeatures) -> memoryview:
    little = np.ascontiguousarray(movie.features_ND, dtype="<f2")
    return little.reshape(-1).view(np.uint8).data


def _check(movie: MovieFeatures, written: Sequence[MovieSummary]) -> None:
    features, shots = movie.features_ND, movie.shots_N
    if features.ndim != 2 or features.dtype != np.float16 or shots.dtype != np.int32:
        got = f"{features.dtype} {list(features.shape)} and {shots.dtype}"
        raise ValueError(f"{movie.movie}: got {got}, want float16 [N, D] and int32 [N]")
    if shots.shape != features.shape[:1]:
        raise ValueError(f"{movie.movie}: got shots {shots.shape}, want [{len(features)}]")
    if written and written[-1].movie >= movie.movie:
        raise ValueError(f"{movie.movie}: comes after {written[-1].movie}, want order of id")
