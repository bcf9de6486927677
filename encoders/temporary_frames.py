"""Temporary frame shards: each is built in scratch, encoded, and deleted.

Only its sidecar is stored, in ``features/NAME/frames``. It records the sha256 of the tar, which
``movienet-shard build --only`` reproduces. So features and manifests are the same as with
persistent frames.
"""

from __future__ import annotations

import fcntl
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from configs.errors import ConfigError, DataError, Interrupted
from configs.runtime.hints import hint
from configs.runtime.launch import node_disk
from configs.units import format_bytes
from sharding.build import plan_for_build
from sharding.dump.scan import dump_of
from sharding.format.encoding import sha256_hex
from sharding.format.manifest import ManifestShard
from sharding.format.names import array_list, index_name, sidecar_name, tar_name
from sharding.frame_space import needed
from sharding.frames import FrameShards, open_records
from sharding.pack import build_shard
from sharding.seal import publish_manifest
from sharding.shard import sidecar_alone
from sharding.storage.base import Storage
from sharding.storage.local import DiskStorage
from sharding.storage.open import open_storage
from sharding.storage.space import Space

if TYPE_CHECKING:
    from configs.runtime.signals import StopRequest
    from configs.schema import Config
    from encoders.input_pipeline import Fail
    from sharding.format.manifest import Manifest, Sidecar
    from sharding.format.plan import Plan

PREFIX = "movienet-scratch-"
_FOLDER = re.compile(PREFIX + "[a-z0-9_]{8}")
"""Names that ``tempfile.mkdtemp`` gives; similar ones are the user's."""

_LOCK = ".lock"
_CHECK_S = 0.2
"""Interval of checks for a stop request while a shard is being built."""


def temporary_frames(config: Config) -> TemporaryFrames:
    """Return the frames of a dump according to its plan; make the plan if there is none.

    Raises:
        ConfigError: the configuration has no dump.
        DataError: the existing plan was made with other options.
    """
    dump_of(config)
    cache = open_storage(config.frames_dir, config.storage)
    return TemporaryFrames(config, plan_for_build(cache, config), open_records(config), cache)


@dataclass(frozen=True, eq=False)
class TemporaryFrames:
    """Frame shards of which only the sidecars are stored."""

    config: Config
    plan: Plan
    records: Storage
    """Storage of the sidecars and, once complete, their manifest."""

    cache: Storage
    """Storage of the frame plan and the listings of large archives."""

    is_temporary = True

    @property
    def location(self) -> str:
        """Location of the sidecars, for messages."""
        return self.records.location

    @cached_property
    def digest(self) -> str:
        """Digest of the frame plan."""
        return sha256_hex(self.plan.to_bytes())

    @cached_property
    def costs(self) -> tuple[int, ...]:
        """Source bytes of each shard."""
        return tuple(sum(movie.n_bytes for movie in shard) for shard in self.plan.shards)

    @cached_property
    def images(self) -> tuple[int, ...]:
        """Planned images of each shard; 0 for tars read by ranges, which are not listed."""
        return tuple(sum(movie.images or 0 for movie in shard) for shard in self.plan.shards)

    def before(self, n_shards: int) -> str | None:
        """Return the digest of the plan when it had ``n_shards``; None if it never had."""
        for k, extension in enumerate(self.plan.extensions):
            if extension.first == n_shards:
                movies = tuple(m for m in self.plan.movies if m.shard < n_shards)
                old = replace(self.plan, movies=movies, extensions=self.plan.extensions[:k])
                return sha256_hex(old.to_bytes())
        return None

    def sha256(self, number: int) -> str | None:
        """Return the digest of a shard's tar; None if it was never built."""
        sidecar = self._record(number)
        return sidecar.sha256 if sidecar else None

    @contextmanager
    def reading(self, stop: StopRequest) -> Iterator[TemporaryShards]:
        """Open a folder in scratch for this process; it is deleted when the block ends."""
        parent = Path(self.config.encoder.scratch_dir or node_disk())
        with scratch_folder(parent) as folder:
            yield TemporaryShards(self, DiskStorage(folder), stop)

    def manifest(self) -> Manifest:
        """Write the manifest of the frames next to their sidecars, and return it.

        Raises:
            DataError: a shard has not been built yet, or too many images are bad.
        """
        sidecars = [self._record(number) for number in range(len(self.plan.shards))]
        missing = [number for number, sidecar in enumerate(sidecars) if sidecar is None]
        if missing:
            raise DataError(
                f"{self.location}: sidecars of frame shards {array_list(missing)} are missing; "
                f"run {hint('movienet-encode run')}"
            )
        return publish_manifest(
            self.records,
            self.plan,
            [sidecar for sidecar in sidecars if sidecar],
            max_bad_fraction=self.config.sharding.max_bad_fraction,
        )

    def _record(self, number: int) -> Sidecar | None:
        sidecar = sidecar_alone(self.records, "frames", number)
        matches = sidecar is not None and sidecar.input_digest == self.plan.input_digest(number)
        return sidecar if matches else None


class TemporaryShards:
    """Frame shards in scratch: the next one is built while one is encoded."""

    def __init__(self, frames: TemporaryFrames, storage: DiskStorage, stop: StopRequest) -> None:
        self._frames, self._storage, self._stop = frames, storage, stop
        self._limit = frames.config.encoder.scratch_bytes
        self._built: dict[int, ManifestShard] = {}
        self.shards = _TemporarySet(storage, frames.plan, self._built)

    def ready(self, numbers: Iterable[int], fail: Fail) -> Iterator[Iterable[int]]:
        """Yield the shards one by one, each as soon as it is built; delete it once it is encoded.

        ``fail`` is called with a shard that cannot be built, because a source has changed, is
        damaged or unreadable, or a movie has too many bad images.

        Raises:
            ConfigError: a shard is larger than ``encoder.scratch_bytes``.
            Interrupted: a stop was requested before a shard was built.
            MachineError: the disk of scratch is too full.
        """
        builder = ThreadPoolExecutor(1, "build")
        building: deque[tuple[int, Future[None]]] = deque()
        try:
            for number in numbers:
                # Two at most: one is encoded while the next is built. If both do not fit into
                # encoder.scratch_bytes, the first is encoded and deleted before the next begins.
                while building and (len(building) == 2 or not self._fits(building, number)):
                    yield from self._first(building, fail)
                self._check_space(number)
                building.append((number, builder.submit(self._build, number)))
            while building:
                yield from self._first(building, fail)
        finally:
            # Not joined: after a stop, a build may hang in a read until the deadline ends it.
            builder.shutdown(wait=False, cancel_futures=True)

    def _first(
        self, building: deque[tuple[int, Future[None]]], fail: Fail
    ) -> Iterator[Iterable[int]]:
        """Yield the first shard once it is built, then delete it."""
        number, build = building[0]
        while not wait([build], _CHECK_S).done:
            if self._stop.requested:
                raise _interrupted(number)
        error = build.exception()
        # A damaged source or a failed read is reported for this shard, and the task continues.
        # Any other error, e.g. a stop or a dead network, would recur for the next shards.
        if error is None:
            yield (number,)
        elif isinstance(error, DataError | OSError):
            fail(number, error)
        else:
            raise error
        self._delete(number)
        building.popleft()

    def _fits(self, building: Iterable[tuple[int, object]], number: int) -> bool:
        used = sum(self._need(other) for other, _ in building)
        return used + self._need(number) <= self._limit

    def _need(self, number: int) -> int:
        return needed(self._frames.plan.shards[number]).n_bytes or 0

    def _check_space(self, number: int) -> None:
        need = self._need(number)
        if need > self._limit:
            raise ConfigError(
                f"encoder.scratch_bytes: got {format_bytes(self._limit)}, want "
                f"{format_bytes(need)} for frame shard {number}; raise it, or plan with a smaller "
                "sharding.shard_bytes"
            )
        self._storage.space().require(
            Space(need),
            self._storage.location,
            f"frame shard {number}",
            "or set encoder.scratch_dir to another disk",
        )

    def _build(self, number: int) -> None:
        """Build a shard in scratch, and store its sidecar."""
        frames = self._frames
        sidecar = build_shard(
            self._storage,
            dump_of(frames.config),
            frames.plan,
            number,
            max_bad_fraction=frames.config.sharding.max_bad_fraction,
            cache=frames.cache,
            on_progress=lambda _update: self._check_stop(number),
        )
        name = sidecar_name("frames", number)
        frames.records.publish(name, sidecar.to_bytes(), replace=True)
        self._built[number] = ManifestShard.of(sidecar)

    def _check_stop(self, number: int) -> None:
        if self._stop.requested:
            raise _interrupted(number)

    def _delete(self, number: int) -> None:
        for name in (sidecar_name, index_name, tar_name):
            self._storage.remove(name("frames", number))


@dataclass(frozen=True, eq=False)
class _TemporarySet(FrameShards):
    built: Mapping[int, ManifestShard] = field(default_factory=dict)

    def sealed(self, number: int) -> ManifestShard:
        """Return the manifest entry of a built shard."""
        return self.built[number]


def _interrupted(number: int) -> Interrupted:
    return Interrupted(f"stopped while building frame shard {number}; rerun the command to resume")


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Make a folder that is deleted when the block ends; delete folders of killed processes.

    A process holds a lock in its folder. The system releases it when the process dies.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for existing in sorted(path for path in parent.iterdir() if _FOLDER.fullmatch(path.name)):
        _remove_if_abandoned(existing)
    folder, lock = _make_folder(parent)
    with lock:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _make_folder(parent: Path) -> tuple[Path, BinaryIO]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        try:
            lock = (folder / _LOCK).open("ab")
        except FileNotFoundError:  # removed by the cleanup of another process
            continue
        # A cleanup may have locked or removed the folder between mkdtemp and the lock: retry.
        if _try_lock(lock) is not False and (folder / _LOCK).exists():
            return folder, lock
        lock.close()


def _remove_if_abandoned(folder: Path) -> None:
    try:
        with (folder / _LOCK).open("r+b") as lock:  # without a lock it is not one of ours
            if _try_lock(lock):
                shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # of another user, without a lock, or already removed
        return


def _try_lock(file: BinaryIO) -> bool | None:
    """Lock a file and return whether it was unlocked; None on a file system without locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
