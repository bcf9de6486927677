"""Verification of a sealed set: reads it completely and marks damaged shards as missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from configs.errors import DataError
from configs.runtime.hints import hint
from configs.schema import StorageConfig
from sharding.features import FeatureSet, not_finite, open_feature_storage, stored_movies
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
from sharding.shard import files_beyond, read_manifest, read_sidecar, tar_digest
from sharding.storage.base import Storage
from sharding.storage.open import open_storage
from sharding.workers import OnProgress, Task, run_tasks


@dataclass(frozen=True)
class Problem:
    """One problem of a set."""

    text: str
    """Description in one line."""

    shard: int | None = None
    """Shard number, if rebuilding the shard solves the problem."""


def sealed_shards(storage: Storage) -> int | None:
    """Return the number of shards of a sealed set; None if the set is not sealed.

    Raises:
        DataError: the manifest is corrupt.
    """
    manifest = read_manifest(storage)
    return None if manifest is None else len(manifest.shards)


def verify_frames(
    storage: Storage,
    *,
    workers: int = 1,
    config: StorageConfig | None = None,
    on_shard: Callable[[], None] = lambda: None,
) -> list[Problem]:
    """Return the problems of a sealed frame set.

    Checks sizes, digests, counts, order and headers, and the index against the tars.

    Args:
        storage: Storage of the set.
        workers: Number of processes; each opens the storage itself.
        config: Object store options for the workers.
        on_shard: Called after each shard.

    Raises:
        DataError: the set is not sealed, or its plan or manifest is corrupt.
        MachineError: a worker was killed.
    """
    frames = open_frame_storage(storage)
    task: Task[list[str]] = _VerifyFrames(frames)
    if workers > 1:
        task = _VerifyInWorker("frames", storage.location, config)
    return _verify(storage, task, frames.n_shards, workers, on_shard)


def verify_features(
    storage: Storage,
    *,
    workers: int = 1,
    config: StorageConfig | None = None,
    on_shard: Callable[[], None] = lambda: None,
) -> list[Problem]:
    """Return the problems of a sealed feature set.

    Checks sizes, digests, counts, order, headers and arrays, and the index against the tars.

    Args:
        storage: Storage of the set.
        workers: Number of processes; each opens the storage itself.
        config: Object store options for the workers and for external tars.
        on_shard: Called after each shard.

    Of external tars, size and ETag or modification time are checked, and all numbers.

    Raises:
        DataError: the set is not sealed; its index, labels or manifest is corrupt; or an external
            tar has changed.
        MachineError: a worker was killed.
    """
    features = open_feature_storage(storage, config)
    task = _features_task(features)
    if workers > 1:
        task = _VerifyInWorker("features", storage.location, config)
    problems = _verify(storage, task, len(features.manifest.shards), workers, on_shard)
    if _is_external(features):
        return [Problem(problem.text) for problem in problems]  # not ours to rebuild
    if len(features.index) != features.manifest.movies:
        got = f"got {len(features.index)} movies, want {features.manifest.movies}"
        problems.append(Problem(f"{storage.location}/{INDEX}: {got}"))
    return problems


def mark_missing(storage: Storage, kind: Kind, problems: Sequence[Problem]) -> tuple[int, ...]:
    """Mark the shards with problems as missing; return their numbers, ascending.

    Removes their sidecars, then the manifest of the set. The tars stay; the command that makes the
    set replaces them and seals the set again.
    """
    numbers = tuple(sorted({problem.shard for problem in problems if problem.shard is not None}))
    # The manifest is removed last: after a kill, a rerun needs it to find the remaining damaged
    # shards, because sealing compares the sizes of frame tars, not their digests.
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
    per_shard = run_tasks(task, range(n_shards), workers=workers, on_progress=lambda _: on_shard())
    beyond = [
        Problem(f"{storage.location}/{name}: belongs to no shard of {MANIFEST}; delete it")
        for name in files_beyond(storage, n_shards)
    ]
    return beyond + [
        Problem(text, number) for number, texts in enumerate(per_shard) for text in texts
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
class _VerifyExternal:
    features: FeatureSet

    def __call__(self, number: int, on_progress: OnProgress) -> list[str]:
        # The sha256 is unknown; opening the set has compared size and ETag or time.
        problems = _collect(partial(_numbers, self.features, number))
        on_progress({"shards": 1})
        return problems


def _is_external(features: FeatureSet) -> bool:
    return "tars" in features.manifest.provenance


def _features_task(features: FeatureSet) -> Task[list[str]]:
    return _VerifyExternal(features) if _is_external(features) else _VerifyFeatures(features)


@dataclass(frozen=True, eq=False)
class _VerifyInWorker:
    """Task of a worker process, which opens the set itself, once."""

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
        return _features_task(open_feature_storage(storage, self.config))


def _collect(check: Callable[[], Iterator[str]]) -> list[str]:
    """Return the problems of a shard; an error that aborts the check becomes the last one."""
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
    # The digests match here. What follows finds sets that were built wrongly.
    members = _members(storage, sealed.name)
    yield from _nonstandard_headers(storage, sealed.name, members)
    if sidecar.input_digest != frames.plan.input_digest(number):
        command = hint(f"movienet-shard build --replace --only {number}")
        yield f"{where}: built for another plan; run {command}"
    if not len(members) == len(index) == sealed.samples:
        got = f"got {len(members)} images, {len(index)} in the index"
        yield f"{where}: {got}, want {sealed.samples}"
        # The comparisons below need columns of equal length.
        return
    if any(index.movie >= len(sidecar.movies)):
        yield f"{where}: its index has more movies than the {len(sidecar.movies)} of its sidecar"
        return
    ranges = [(member.offset, member.size) for member in members]
    if ranges != list(zip(index.offset.tolist(), index.size.tolist(), strict=True)):
        yield f"{where}: the byte ranges of its index differ from the tar"
    if [member.name for member in members] != _frame_names(index, sidecar):
        yield f"{where}: the members of the tar differ from its index"
    rows = list(zip(index.movie.tolist(), index.shot.tolist(), index.image.tolist(), strict=True))
    if rows != sorted(set(rows)):
        yield f"{where}: images are repeated or not in order of movie, shot and image"


def _feature_shard(features: FeatureSet, number: int, sealed: ManifestShard) -> Iterator[str]:
    storage, where = features.storage, f"{features.storage.location}/{sealed.name}"
    sidecar = _sidecar(storage, "features", number, sealed)
    members = _members(storage, sealed.name)
    yield from _nonstandard_headers(storage, sealed.name, members)
    names = [movie + suffix for movie in sidecar.movies for suffix in (FEATURES, SHOTS, INFO)]
    if [member.name for member in members] != names or len(sidecar.movies) != sealed.samples:
        yield f"{where}: its members are not three per movie for {sealed.samples} movies"
    stored = list(stored_movies(storage, number))
    index = features.index
    indexed = [
        (features.movie_ids[k], int(index.offset[k]), int(index.rows[k]))
        for k in np.flatnonzero(index.shard == number)
    ]
    if [(movie.movie, movie.offset, movie.rows) for movie in stored] != indexed:
        yield f"{where}: the rows of {INDEX} differ from the tar"
        return
    for movie in stored:
        if movie.dim != features.dim:
            yield f"{where}: {movie.movie}: got {movie.dim} numbers per row, want {features.dim}"
            return
    yield from _numbers(features, number)


def _numbers(features: FeatureSet, number: int) -> Iterator[str]:
    """Yield a problem for each movie of a shard with NaN or infinite numbers."""
    for movie in np.flatnonzero(features.index.shard == number).tolist():
        if (defect := not_finite(features, movie)) is not None:
            yield f"{defect}; encode it again, or leave it out: data.exclude"


def _sidecar(storage: Storage, kind: Kind, number: int, sealed: ManifestShard) -> Sidecar:
    """Return the sidecar of a shard after comparing its bytes with the manifest."""
    where = f"{storage.location}/{sealed.name}"
    sidecar = read_sidecar(storage, kind, number)
    if sidecar is None or sealed.name != tar_name(kind, number):
        name = sidecar_name(kind, number)
        raise DataError(f"{where}: the tar is missing or truncated, or has no {name}; rebuild it")
    if ManifestShard.of(sidecar) != sealed:
        raise DataError(f"{where}: its sidecar differs from {MANIFEST}; rebuild it")
    digest = tar_digest(storage, sealed.name)
    if (digest.n_bytes, digest.sha256) != (sealed.n_bytes, sealed.sha256):
        got = f"got {digest.n_bytes} bytes, sha256 {digest.sha256[:12]}"
        expected = f"{sealed.n_bytes}, {sealed.sha256[:12]}"
        raise DataError(f"{where}: {got}, want {expected}; rebuild it")
    return sidecar


def _members(storage: Storage, name: str) -> list[tar.Member]:
    with storage.open(name) as file:
        return list(tar.members(file, f"{storage.location}/{name}"))


def _nonstandard_headers(storage: Storage, name: str, members: list[tar.Member]) -> Iterator[str]:
    with storage.open(name) as file:
        for member in members:
            file.seek(member.offset - tar.BLOCK)
            if not tar.is_header(file.read(tar.BLOCK), member.name, member.size):
                yield f"{storage.location}/{name}: {member.name}: its header is not canonical"


def _frame_names(index: FrameIndex, sidecar: Sidecar) -> list[str]:
    columns = (index.movie.tolist(), index.shot.tolist(), index.image.tolist())
    return [
        f"{sidecar.movies[movie]}/{frame_name(shot, image)}"
        for movie, shot, image in zip(*columns, strict=True)
    ]
