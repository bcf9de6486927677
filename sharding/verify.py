"""Reads a sealed set from end to end and says what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from configs.errors import DataError
from sharding import tar
from sharding.features import (
    FEATURES,
    INDEX,
    INFO,
    SHOTS,
    FeatureSet,
    open_feature_storage,
    stored_movies,
)
from sharding.forms import FrameIndex, Kind, ManifestShard, Sidecar, frame_name
from sharding.frames import FrameSet, open_frame_storage
from sharding.shard import (
    MANIFEST,
    files_beyond,
    read_sidecar,
    sidecar_name,
    tar_digest,
    tar_name,
)
from sharding.storage import Storage


def verify_frames(storage: Storage, *, on_shard: Callable[[], None] | None = None) -> list[str]:
    """Return what is wrong with a sealed frame set, one line each.

    Checks sizes, digests, counts, order and headers, and the index against the tars.

    Args:
        storage: Where it lies.
        on_shard: Called after each shard.

    Raises:
        DataError: it is not sealed, or its plan or manifest are damaged.
    """
    frames = open_frame_storage(storage)
    problems = _strangers(storage, frames.n_shards)
    for number, sealed in enumerate(frames.manifest.shards):
        problems += _collect(partial(_frame_shard, frames, number, sealed))
        if on_shard:
            on_shard()
    return problems


def verify_features(storage: Storage, *, on_shard: Callable[[], None] | None = None) -> list[str]:
    """Return what is wrong with a sealed feature set, one line each.

    Checks sizes, digests, counts, order, headers and arrays, and the index against the tars.

    Args:
        storage: Where it lies.
        on_shard: Called after each shard.

    Raises:
        DataError: it is not sealed, or its index, labels or manifest are damaged.
    """
    features = open_feature_storage(storage)
    shards = features.manifest.shards
    problems = _strangers(storage, len(shards))
    if len(features.index) != features.manifest.movies:
        got = f"got {len(features.index)} movies, want {features.manifest.movies}"
        problems.append(f"{storage.location}/{INDEX}: {got}")
    for number, sealed in enumerate(shards):
        problems += _collect(partial(_feature_shard, features, number, sealed))
        if on_shard:
            on_shard()
    return problems


def _collect(check: Callable[[], Iterator[str]]) -> list[str]:
    """Collect the problems of a shard; one that stops its check is the last of them."""
    problems: list[str] = []
    try:
        problems.extend(check())
    except DataError as error:
        problems.append(str(error))
    return problems


def _frame_shard(frames: FrameSet, number: int, sealed: ManifestShard) -> Iterator[str]:
    storage, where = frames.storage, f"{frames.storage.location}/{sealed.name}"
    sidecar = _sidecar(storage, "frames", number, sealed)
    index = frames.frame_index(number)
    members = _members(storage, sealed.name)
    yield from _odd_headers(storage, sealed.name, members)
    if sidecar.made_from != frames.plan.made_from(number):
        yield f"{where}: made from another plan; build --replace --only {number}"
    if not len(members) == len(index) == sealed.samples:
        got = f"got {len(members)} images, {len(index)} in the index"
        yield f"{where}: {got}, want {sealed.samples}"
        return
    if any(index.movie >= len(sidecar.movies)):
        yield f"{where}: its index counts more movies than the {len(sidecar.movies)} of the sidecar"
        return
    places = [(member.offset, member.size) for member in members]
    if places != list(zip(index.offset.tolist(), index.size.tolist(), strict=True)):
        yield f"{where}: its index tells other places than the tar"
    if [member.name for member in members] != _frame_names(index, sidecar):
        yield f"{where}: members are not those of its index"
    rows = list(zip(index.movie.tolist(), index.shot.tolist(), index.image.tolist(), strict=True))
    if rows != sorted(set(rows)):
        yield f"{where}: images are not in order of movie, shot and image, each once"


def _feature_shard(features: FeatureSet, number: int, sealed: ManifestShard) -> Iterator[str]:
    storage, where = features.storage, f"{features.storage.location}/{sealed.name}"
    sidecar = _sidecar(storage, "features", number, sealed)
    members = _members(storage, sealed.name)
    yield from _odd_headers(storage, sealed.name, members)
    wanted = [movie + end for movie in sidecar.movies for end in (FEATURES, SHOTS, INFO)]
    if [member.name for member in members] != wanted or len(sidecar.movies) != sealed.samples:
        yield f"{where}: members are not the three of each of {sealed.samples} movies"
    stored = list(stored_movies(storage, number))
    index = features.index
    indexed = [
        (features.movie_ids[k], int(index.offset[k]), int(index.rows[k]))
        for k in np.flatnonzero(index.shard == number)
    ]
    if [(movie.movie, movie.offset, movie.rows) for movie in stored] != indexed:
        yield f"{where}: {INDEX} tells other places than the tar"
    for movie in stored:
        if movie.dim != features.dim:
            yield f"{where}: {movie.movie}: got {movie.dim} numbers a row, want {features.dim}"


def _sidecar(storage: Storage, kind: Kind, number: int, sealed: ManifestShard) -> Sidecar:
    """Return the sidecar of a shard whose bytes are those of the manifest."""
    where = f"{storage.location}/{sealed.name}"
    sidecar = read_sidecar(storage, kind, number)
    if sidecar is None or sealed.name != tar_name(kind, number):
        name = sidecar_name(kind, number)
        raise DataError(f"{where}: the tar is missing or cut, or has no {name}; make it again")
    if ManifestShard.of(sidecar) != sealed:
        raise DataError(f"{where}: its sidecar and {MANIFEST} differ; seal again")
    digest = tar_digest(storage, sealed.name)
    if (digest.n_bytes, digest.sha256) != (sealed.n_bytes, sealed.sha256):
        got = f"got {digest.n_bytes} bytes, sha256 {digest.sha256[:12]}"
        wanted = f"{sealed.n_bytes}, {sealed.sha256[:12]}"
        raise DataError(f"{where}: {got}, want {wanted}; delete it and make it again")
    return sidecar


def _members(storage: Storage, name: str) -> list[tar.Member]:
    with storage.open(name) as file:
        return list(tar.members(file, f"{storage.location}/{name}"))


def _odd_headers(storage: Storage, name: str, members: list[tar.Member]) -> Iterator[str]:
    with storage.open(name) as file:
        for member in members:
            file.seek(member.offset - tar.BLOCK)
            if not tar.is_header(file.read(tar.BLOCK), member.name, member.size):
                yield f"{storage.location}/{name}: {member.name}: its header is not normalised"


def _frame_names(index: FrameIndex, sidecar: Sidecar) -> list[str]:
    columns = (index.movie.tolist(), index.shot.tolist(), index.image.tolist())
    return [
        f"{sidecar.movies[movie]}/{frame_name(shot, image)}"
        for movie, shot, image in zip(*columns, strict=True)
    ]


def _strangers(storage: Storage, n_shards: int) -> list[str]:
    return [
        f"{storage.location}/{name}: belongs to no shard of {MANIFEST}; delete it"
        for name in files_beyond(storage, n_shards)
    ]
