"""A sealed frame set, as encoders read it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from configs.errors import DataError
from configs.schema import StorageConfig
from sharding.format.encoding import sha256_hex
from sharding.format.index import FrameIndex
from sharding.format.manifest import Manifest, ManifestShard, Sidecar
from sharding.format.names import MANIFEST, PLAN, index_name, sidecar_name, tar_name
from sharding.format.plan import Plan
from sharding.shard import read_sidecar
from sharding.storage.base import Storage
from sharding.storage.open import open_storage


@dataclass(frozen=True, eq=False)
class FrameShards(ABC):
    """Frame shards that can be read, by number."""

    storage: Storage
    plan: Plan

    @property
    def n_shards(self) -> int:
        """Number of shards of the whole set."""
        return len(self.plan.shards)

    @abstractmethod
    def sealed(self, number: int) -> ManifestShard:
        """Return what a shard must be."""

    def tar_name(self, number: int) -> str:
        """Return the file name of a shard."""
        return tar_name("frames", number)

    def sidecar(self, number: int) -> Sidecar:
        """Return the sidecar of a shard.

        Raises:
            DataError: the shard is absent, or another one than was sealed.
        """
        where = f"{self.storage.location}/{sidecar_name('frames', number)}"
        sidecar = read_sidecar(self.storage, "frames", number)
        if sidecar is None or sidecar.sha256 != self.sealed(number).sha256:
            raise DataError(f"{where}: absent, or not what was sealed; build and seal again")
        return sidecar

    def shard_movies(self, number: int) -> tuple[str, ...]:
        """Return the ids of a shard's movies; ``FrameIndex.movie`` counts in this list."""
        return self.sidecar(number).movies

    def frame_index(self, number: int) -> FrameIndex:
        """Return where each image of a shard lies.

        Raises:
            DataError: the index is absent or damaged.
        """
        name = index_name("frames", number)
        where = f"{self.storage.location}/{name}"
        data = self.storage.read(name)
        if sha256_hex(data) != self.sealed(number).index:
            raise DataError(f"{where}: does not match {MANIFEST}; build the shard again")
        return FrameIndex.from_bytes(data, where)


@dataclass(frozen=True, eq=False)
class FrameSet(FrameShards):
    """A sealed frame set."""

    manifest: Manifest

    @property
    def digest(self) -> str:
        """The data digest: sha256 of the manifest."""
        return self.manifest.digest

    def sealed(self, number: int) -> ManifestShard:
        """Return what a shard must be: its line of the manifest."""
        return self.manifest.shards[number]


def read_plan(storage: Storage) -> Plan | None:
    """Return the plan of a frame set; None if there is none.

    Raises:
        DataError: it is damaged.
    """
    if storage.size(PLAN) is None:
        return None
    return Plan.from_bytes(storage.read(PLAN), f"{storage.location}/{PLAN}")


def open_frames(location: str, storage: StorageConfig | None = None) -> FrameSet:
    """Open a sealed frame set; ``storage`` tells how an object store is reached.

    Raises:
        DataError: it is not sealed, or damaged.
    """
    return open_frame_storage(open_storage(location, storage))


def open_frame_storage(storage: Storage) -> FrameSet:
    """Open a sealed frame set; see ``open_frames``."""
    where = storage.location
    plan = read_plan(storage)
    if plan is None or storage.size(MANIFEST) is None:
        raise DataError(
            f"{where}: no {MANIFEST}; the frame set is absent or not sealed yet: "
            "run `movienet-shard build`"
        )
    manifest = Manifest.from_bytes(storage.read(MANIFEST), f"{where}/{MANIFEST}")
    if manifest.kind != "frames" or len(manifest.shards) != len(plan.shards):
        got = f"{len(manifest.shards)} shards of {manifest.kind}"
        raise DataError(f"{where}: got {got}, want {len(plan.shards)} of frames; seal again")
    return FrameSet(storage, plan, manifest)
