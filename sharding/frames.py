"""Frame sets as encoders read them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from configs.errors import DataError
from configs.runtime.hints import hint
from configs.schema import Config, StorageConfig
from sharding.format.encoding import sha256_hex
from sharding.format.index import FrameIndex
from sharding.format.manifest import Manifest, ManifestShard, Sidecar
from sharding.format.names import MANIFEST, PLAN, index_name, sidecar_name, tar_name
from sharding.format.plan import Plan
from sharding.shard import read_manifest, read_sidecar
from sharding.storage.base import Storage
from sharding.storage.open import open_storage


@dataclass(frozen=True, eq=False)
class FrameShards(ABC):
    """Readable frame shards, by shard number."""

    storage: Storage
    plan: Plan

    @property
    def n_shards(self) -> int:
        """Number of shards of the complete set."""
        return len(self.plan.shards)

    @abstractmethod
    def sealed(self, number: int) -> ManifestShard:
        """Return the expected size and digests of a shard."""

    def tar_name(self, number: int) -> str:
        """Return the file name of a shard."""
        return tar_name("frames", number)

    def sidecar(self, number: int) -> Sidecar:
        """Return the sidecar of a shard.

        Raises:
            DataError: the shard is missing, or differs from the sealed one.
        """
        where = f"{self.storage.location}/{sidecar_name('frames', number)}"
        # A build may have replaced the shard after this set was opened.
        sidecar = read_sidecar(self.storage, "frames", number)
        if sidecar is None or sidecar.sha256 != self.sealed(number).sha256:
            command = hint("movienet-shard build")
            raise DataError(f"{where}: missing, or differs from the sealed shard; run {command}")
        return sidecar

    def shard_movies(self, number: int) -> tuple[str, ...]:
        """Return the movie ids of a shard; ``FrameIndex.movie`` contains positions in this list."""
        return self.sidecar(number).movies

    def frame_index(self, number: int) -> FrameIndex:
        """Return the byte range of each image of a shard.

        Raises:
            DataError: the index is missing or corrupt.
        """
        name = index_name("frames", number)
        where = f"{self.storage.location}/{name}"
        data = self.storage.read(name)
        if sha256_hex(data) != self.sealed(number).index:
            command = hint("movienet-shard verify --repair")
            raise DataError(f"{where}: does not match {MANIFEST}; run {command}, then rebuild it")
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
        """Return the expected size and digests of a shard: its entry in the manifest."""
        return self.manifest.shards[number]


def read_plan(storage: Storage) -> Plan | None:
    """Return the plan of a frame set; None if there is none.

    Raises:
        DataError: the plan is corrupt.
    """
    if storage.size(PLAN) is None:
        return None
    return Plan.from_bytes(storage.read(PLAN), f"{storage.location}/{PLAN}")


def open_records(config: Config) -> Storage:
    """Open the folder of the frames' sidecars and manifest.

    Temporary frames leave these with the features, and no tars.
    """
    is_temporary = config.encoder.frame_storage == "temporary"
    location = f"{config.features_dir}/frames" if is_temporary else config.frames_dir
    return open_storage(location, config.storage)


def frame_commands(config: Config) -> tuple[str, str]:
    """Return the commands that build and seal the frame shards, temporary or persistent."""
    if config.encoder.frame_storage == "temporary":
        return "movienet-encode run", "movienet-encode seal"
    return "movienet-shard build", "movienet-shard seal"


def open_frames(location: str, storage: StorageConfig | None = None) -> FrameSet:
    """Open a sealed frame set; ``storage`` contains the object store options.

    Raises:
        DataError: the set is not sealed, or corrupt.
    """
    return open_frame_storage(open_storage(location, storage))


def open_frame_storage(storage: Storage) -> FrameSet:
    """Open a sealed frame set; see ``open_frames``."""
    where = storage.location
    plan, manifest = read_plan(storage), read_manifest(storage)
    if plan is None or manifest is None:
        raise DataError(
            f"{where}: no {MANIFEST}; the frame set is missing or not sealed yet: "
            f"run {hint('movienet-shard build')}"
        )
    if manifest.kind != "frames" or len(manifest.shards) != len(plan.shards):
        got = f"{len(manifest.shards)} shards of {manifest.kind}"
        raise DataError(
            f"{where}: got {got}, want {len(plan.shards)} of frames; "
            f"run {hint('movienet-shard seal')}"
        )
    return FrameSet(storage, plan, manifest)
