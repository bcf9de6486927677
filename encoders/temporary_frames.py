"""Straight from the dump: a frame shard is built in scratch, encoded, and dropped.

What stays of it is its sidecar, in ``features/NAME/frames``: it names the tar by its sha256, and
`movienet-shard build --only` makes the same bytes again. So the features, and the manifest that
names the frames they were made from, are those of a set that was kept.
"""

from __future__ import annotations

import fcntl
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
from configs.units import format_bytes
from sharding.build import plan_for_build
from sharding.dump.scan import dump_of
from sharding.format.encoding import sha256_hex
from sharding.format.manifest import ManifestShard
from sharding.format.names import array_list, index_name, sidecar_name, tar_name
from sharding.frame_space import needed
from sharding.frames import FrameShards
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
_LOCK = ".lock"
_LOOK_S = 0.2
"""Time between two looks whether a stop was asked for, while a shard is built."""


def temporary_frames(config: Config) -> TemporaryFrames:
    """Return the frames of a dump as its plan cuts them; without a plan, make it.

    Raises:
        ConfigError: there is no dump.
        DataError: the plan was made with other options.
    """
    dump_of(config)
    kept = open_storage(config.frames_dir, config.storage)
    records = open_storage(f"{config.features_dir}/frames", config.storage)
    return TemporaryFrames(config, plan_for_build(kept, config), records, kept)


@dataclass(frozen=True, eq=False)
class TemporaryFrames:
    """Frame shards of which only the sidecars are kept."""

    config: Config
    plan: Plan
    records: Storage
    """Where the sidecars lie, and in the end their manifest."""

    cache: Storage
    """Where the plan lies, and the listings of large archives."""

    is_temporary = True

    @property
    def location(self) -> str:
        """Where the sidecars lie, for messages."""
        return self.records.location

    @cached_property
    def digest(self) -> str:
        """The digest of the plan."""
        return sha256_hex(self.plan.to_bytes())

    @cached_property
    def costs(self) -> tuple[int, ...]:
        """The source bytes of each shard."""
        return tuple(sum(movie.n_bytes for movie in shard) for shard in self.plan.shards)

    @cached_property
    def images(self) -> tuple[int, ...]:
        """Images of each shard as planned; 0 for tars that are read by ranges."""
        return tuple(sum(movie.images or 0 for movie in shard) for shard in self.plan.shards)

    def before(self, n_shards: int) -> str | None:
        """Return the digest of the plan from when there were so many shards."""
        for k, part in enumerate(self.plan.extensions):
            if part.first == n_shards:
                movies = tuple(m for m in self.plan.movies if m.shard < n_shards)
                old = replace(self.plan, movies=movies, extensions=self.plan.extensions[:k])
                return sha256_hex(old.to_bytes())
        return None

    def sha256(self, number: int) -> str | None:
        """Return the digest of a shard's tar, if it has been built once."""
        sidecar = self._record(number)
        return sidecar.sha256 if sidecar else None

    @contextmanager
    def reading(self, stop: StopRequest) -> Iterator[TemporaryShards]:
        """Open a folder of this process's own in scratch; it goes with the block."""
        parent = Path(self.config.encoder.scratch_dir or tempfile.gettempdir())
        with scratch_folder(parent) as folder:
            yield TemporaryShards(self, DiskStorage(folder), stop)

    def manifest(self) -> Manifest:
        """Write the manifest of the frames beside their sidecars, and return it.

        Raises:
            DataError: a shard has not been built yet, or too many images are bad.
        """
        sidecars = [self._record(number) for number in range(len(self.plan.shards))]
        missing = [number for number, sidecar in enumerate(sidecars) if sidecar is None]
        if missing:
            raise DataError(
                f"{self.location}: sidecars of frame shards {array_list(missing)} are missing; "
                "run `movienet-encode run` again"
            )
        made = [sidecar for sidecar in sidecars if sidecar]
        most = self.config.sharding.max_bad_fraction
        return publish_manifest(self.records, self.plan, made, max_bad_fraction=most)

    def _record(self, number: int) -> Sidecar | None:
        sidecar = sidecar_alone(self.records, "frames", number)
        fits = sidecar is not None and sidecar.input_digest == self.plan.input_digest(number)
        return sidecar if fits else None


class TemporaryShards:
    """Frame shards on their way through scratch; the next one is built while one is encoded."""

    def __init__(self, frames: TemporaryFrames, storage: DiskStorage, stop: StopRequest) -> None:
        self._frames, self._storage, self._stop = frames, storage, stop
        self._limit = frames.config.encoder.scratch_bytes
        self._built: dict[int, ManifestShard] = {}
        self.shards = _TemporarySet(storage, frames.plan, self._built)

    def ready(self, numbers: Iterable[int], fail: Fail) -> Iterator[Iterable[int]]:
        """Yield the shards one by one, each as soon as it is built; drop it after its turn.

        ``fail`` hears of one that cannot be built: a source changed, is damaged or cannot be read,
        or a movie has too many bad images.

        Raises:
            ConfigError: a shard is larger than ``encoder.scratch_bytes``.
            Interrupted: a stop was asked for before a shard was built.
            MachineError: scratch has no room.
        """
        builder = ThreadPoolExecutor(1, "build")
        under_way: deque[tuple[int, Future[None]]] = deque()
        try:
            for number in numbers:
                # Two at most: one is encoded while the next is built. If both do not fit into
                # encoder.scratch_bytes, the first is encoded and dropped before the next begins.
                while under_way and (len(under_way) == 2 or not self._fits(under_way, number)):
                    yield from self._turn(under_way, fail)
                self._check_room(number)
                under_way.append((number, builder.submit(self._build, number)))
            while under_way:
                yield from self._turn(under_way, fail)
        finally:
            # Not waited for: after a stop, a build may hang in a read until the deadline ends it.
            builder.shutdown(wait=False, cancel_futures=True)

    def _turn(
        self, under_way: deque[tuple[int, Future[None]]], fail: Fail
    ) -> Iterator[Iterable[int]]:
        number, building = under_way[0]
        while not wait([building], _LOOK_S).done:
            if self._stop.requested:
                raise _given_up(number)
        error = building.exception()
        # A damaged source or a failed read is reported for this shard, and the task continues.
        # Any other error, e.g. a stop or a dead network, would recur for the shards after it.
        if error is None:
            yield (number,)
        elif isinstance(error, DataError | OSError):
            fail(number, error)
        else:
            raise error
        self._drop(number)
        under_way.popleft()

    def _fits(self, under_way: Iterable[tuple[int, object]], number: int) -> bool:
        held = sum(self._need(there) for there, _ in under_way)
        return held + self._need(number) <= self._limit

    def _need(self, number: int) -> int:
        return needed(self._frames.plan.shards[number]).n_bytes or 0

    def _check_room(self, number: int) -> None:
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
            "or set encoder.scratch_dir elsewhere",
        )

    def _build(self, number: int) -> None:
        """Build a shard in scratch, and keep its sidecar."""
        frames = self._frames
        sidecar = build_shard(
            self._storage,
            dump_of(frames.config),
            frames.plan,
            number,
            max_bad_fraction=frames.config.sharding.max_bad_fraction,
            cache=frames.cache,
            on_progress=lambda news: self._go_on(number, news),
        )
        name = sidecar_name("frames", number)
        frames.records.publish(name, sidecar.to_bytes(), replace=True)
        self._built[number] = ManifestShard.of(sidecar)

    def _go_on(self, number: int, _update: Mapping[str, int]) -> None:
        if self._stop.requested:
            raise _given_up(number)

    def _drop(self, number: int) -> None:
        for name in (sidecar_name, index_name, tar_name):
            self._storage.remove(name("frames", number))


@dataclass(frozen=True, eq=False)
class _TemporarySet(FrameShards):
    built: Mapping[int, ManifestShard] = field(default_factory=dict)

    def sealed(self, number: int) -> ManifestShard:
        """Return what was built."""
        return self.built[number]


def _given_up(number: int) -> Interrupted:
    return Interrupted(f"asked to stop while frame shard {number} was built")


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Make a folder that goes with the block, and remove those whose owners were killed.

    An owner holds a lock in its folder, which the system takes from it when it dies.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for left in sorted(parent.glob(f"{PREFIX}*")):
        _remove_if_left(left)
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
        except FileNotFoundError:  # whoever cleans up was faster
            continue
        if _try_lock(lock) is not False and (folder / _LOCK).exists():
            return folder, lock
        lock.close()


def _remove_if_left(folder: Path) -> None:
    try:
        with (folder / _LOCK).open("ab") as lock:
            if _try_lock(lock):
                shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # somebody else's, or gone by now
        return


def _try_lock(file: BinaryIO) -> bool | None:
    """Return whether the lock was free; None on a file system without locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
