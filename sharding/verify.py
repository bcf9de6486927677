"""Reads a sealed set from end to end, reports problems, and marks damaged shards as missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from configs.errors import DataError
from configs.schema import StorageConfig
from sharding.features import FeatureSet, open_feature_storage, stored_movies
from sharding.format import tar
from sharding.format.index import FrameIndex
from sharding.format.manifest import ManifestShard, Sidecar
from sharding.format.names import (
    FEATURES,
    INDEX,
    INFO,
    MANIFEST,
    SHOTS,
    Kind,
    frame_name,
    sidecar_name,
    tar_name,
)
from sharding.frames import FrameSet, open_frame_storage
from sharding.shard import files_beyond, read_sidecar, tar_digest
from sharding.storage.base import Storage
from sharding.storage.open import open_storage
from sharding.workers import OnProgress, Task, run_tasks


@dataclass(frozen=True)
class Problem:
    """What is wrong with a set."""

    text: str
    """One line."""

    shard: int | None = None
    """Number of the shard, if rebuilding the shard solves the problem."""


def verify_frames(
    storage: Storage,
    *,
    workers: int = 1,
    config: StorageConfig | None = None,
    on_shard: Callable[[], None] = lambda: None,
) -> list[Problem]:
    """Return what is wrong with a sealed frame set.

    Checks sizes, digests, counts, order and headers, and the index against the tars.

    Args:
        storage: Where it lies.
        workers: Processes that read shards; each opens the storage anew.
        config: How workers reach an object store.
        on_shard: Called after each shard.

    Raises:
        DataError: it is not sealed, or its plan or manifest are damaged.
        MachineError: a worker was killed.
    """
    frames = open_frame_storage(storage)
    task: Task[list[str]] = _VerifyFrames(frames)
    if workers > 1:
        task = _VerifyAnew("frames", storage.location, config)
    return _verify(storage, task, frames.n_shards, workers, on_shard)


def verify_features(
    storage: Storage,
    *,
    workers: int = 1,
    config: StorageConfig | None = None,
    on_shard: Callable[[], None] = lambda: None,
) -> list[Problem]:
    """Return what is wrong with a sealed feature set.

    Checks sizes, digests, counts, order, headers and arrays, and the index against the tars.

    Args:
        storage: Where it lies.
        workers: Processes that read shards; each opens the storage anew.
        config: How workers reach an object store.
        on_shard: Called after each shard.

    Of tars that somebody else wrote only size and ETag or time are looked at.

    Raises:
        DataError: it is not sealed, or its index, labels or manifest are damaged; or a tar of
            somebody else has changed.
        MachineError: a worker was killed.
    """
    features = open_feature_storage(storage, config)
    if "tars" in features.manifest.provenance:
        return []  # nobody knows their sha256; that none has changed is seen when they are opened
    task: Task[list[str]] = _VerifyFeatures(features)
    if workers > 1:
        task = _VerifyAnew("features", storage.location, config)
    problems = _verify(storage, task, len(features.manifest.shards), workers, on_shard)
    if len(features.index) != features.manifest.movies:
        got = f"got {len(features.index)} movies, want {features.manifest.movies}"
        problems.append(Problem(f"{storage.location}/{INDEX}: {got}"))
    return problems


def mark_missing(storage: Storage, kind: Kind, problems: Sequence[Problem]) -> tuple[int, ...]:
    """Mark the shards with problems as missing; return their numbers, rising.

    Their sidecars are removed, then the manifest of the set. Tars stay: the command that makes the
    set replaces them, and seals it again.
    """
    numbers = tuple(sorted({problem.shard for problem in problems if problem.shard is not None}))
    # The manifest is removed last: without it a rerun could not find the shards that a killed
    # repair left, and sealing compares the sizes of frame tars, not their digests.
    for number in numbers:
        storage.remove(sidecar_name(kind, number))
    if numbers:
        storage.remove(MANIFEST)
    return numbers


def _verify(
    storage: Storage,
    task: Task[list[str]],
    n_shards: int,
    workers: int,
    on_shard: Callable[[], None],
) -> list[Problem]:
    found = run_tasks(task, range(n_shards), workers=workers, on_progress=lambda _: on_shard())
    strangers = [
        Problem(f"{storage.location}/{name}: belongs to no shard of {MANIFEST}; delete it")
        for name in files_beyond(storage, n_shards)
    ]
    return strangers + [
        Problem(text, number) for number, texts in enumerate(found) for text in texts
    ]


@dataclass(frozen=True, eq=False)
class _VerifyFrames:
    frames: FrameSet

    def __call__(self, number: int, on_progress: OnProgress) -> list[str]:
        sealed = self.frames.manifest.shards[number]
        problems = _collect(partial(_frame_shard, self.frames, number, sealed))
        on_progress({"shards": 1})
        return problems


@dataclass(frozen=True, eq=False)
class _VerifyFeatures:
    features: FeatureSet

    def __call__(self, number: int, on_progress: OnProgress) -> list[str]:
        sealed = self.features.manifest.shards[number]
        problems = _collect(partial(_feature_shard, self.features, number, sealed))
        on_progress({"shards": 1})
        return problems


@dataclass(frozen=True, eq=False)
class _VerifyAnew:
    """The same for another process, which opens the set itself, once."""

    kind: Kind
    location: str
    config: StorageConfig | None

    def __call__(self, number: int, on_progress: OnProgress) -> list[str]:
        return self._task(number, on_progress)

    @cached_property
    def _task(self) -> Task[list[str]]:
        storage = open_storage(self.location, self.config)
        if self.kind == "frames":
            return _VerifyFrames(open_frame_storage(storage))
        return _VerifyFeatures(open_feature_storage(storage))


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
    if sidecar.input_digest != frames.plan.input_digest(number):
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
