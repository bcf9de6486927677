"""Sealing: a complete set of feature shards becomes one readable feature set."""

from __future__ import annotations

from typing import TYPE_CHECKING

from configs.errors import DataError
from configs.runtime.hints import hint
from configs.runtime.progress import progress
from encoders.encode_plan import PLAN, EncodePlan
from sharding.features import feature_shard_done, seal_features
from sharding.format.manifest import Manifest
from sharding.format.names import MANIFEST, array_list
from sharding.label_files import labels_reader
from sharding.shard import read_manifest
from sharding.verify import Problem, verify_features

if TYPE_CHECKING:
    from configs.schema import Config
    from encoders.frame_source import FrameSource
    from sharding.storage.base import Storage


def read_plan(storage: Storage) -> EncodePlan | None:
    """Return the plan of a feature set; None if there is none.

    Raises:
        DataError: the plan is corrupt.
    """
    if storage.size(PLAN) is None:
        return None
    return EncodePlan.from_bytes(storage.read(PLAN), f"{storage.location}/{PLAN}")


def wanted_plan(storage: Storage) -> EncodePlan:
    """Return the plan of a feature set.

    Raises:
        DataError: the plan is absent or corrupt.
    """
    plan = read_plan(storage)
    if plan is None:
        raise DataError(f"{storage.location}: no {PLAN}; run {hint('movienet-encode plan')} first")
    return plan


def missing_shards(
    storage: Storage, plan: EncodePlan, frames: FrameSource, *, replace: bool = False
) -> list[int]:
    """Return the numbers of the shards that are missing or do not match the plan.

    Raises:
        DataError: the frame set is not the planned one; or a shard was encoded from other inputs
            and ``replace`` is off.
    """
    if plan.frames != frames.digest:
        # An extended frame set keeps its first shards: then only the added ones are missing.
        grown = frames.before(plan.n_shards) == plan.frames
        remedy = (
            f"run {hint('movienet-encode run')} to encode the new shards"
            if grown
            else f"run {hint('movienet-encode run --replace')} to encode again what has changed"
        )
        raise DataError(
            f"{storage.location}/{PLAN}: planned for frames {plan.frames[:12]}, but "
            f"{frames.location} is {frames.digest[:12]}; {remedy}"
        )

    def done(number: int) -> bool:
        sha256 = frames.sha256(number)
        if sha256 is None:
            return False
        return feature_shard_done(storage, number, plan.input_digest(sha256), replace=replace)

    return [number for number in range(plan.n_shards) if not done(number)]


def sealed_as(storage: Storage, plan: EncodePlan) -> Manifest | None:
    """Return the manifest if the feature set is sealed according to its plan, else None.

    Raises:
        DataError: the manifest is corrupt.
    """
    manifest = read_manifest(storage)
    if manifest is None:
        return None
    matches = (len(manifest.shards), manifest.parent) == (plan.n_shards, plan.parent)
    return manifest if matches else None


def problems_of(config: Config, storage: Storage) -> list[Problem]:
    """Read every byte of a sealed feature set and return its problems.

    Raises:
        DataError: the set has no plan or is not sealed, or its index, labels or manifest are
            corrupt.
    """
    plan = wanted_plan(storage)
    with progress(plan.n_shards, label="verify", unit="shards") as bar:
        problems = verify_features(
            storage,
            workers=config.sharding.workers,
            config=config.storage,
            on_shard=bar.advance,
        )
    sealed = read_manifest(storage)
    if sealed and sealed.provenance.get("encoder") != dict(plan.encoder):
        text = f"{storage.location}/{MANIFEST}: its encoder differs from the one in {PLAN}"
        problems.append(Problem(f"{text}; run {hint('movienet-encode seal')}"))
    return problems


def seal(config: Config, storage: Storage, plan: EncodePlan, frames: FrameSource) -> Manifest:
    """Write index, labels and manifest. Idempotent: concurrent calls write the same bytes.

    Raises:
        ConfigError: ``data.metadata`` is missing.
        DataError: the frame set is not the planned one, or shards are missing or damaged.
    """
    # Raises for a different frame set, and for shards encoded from other inputs.
    missing = missing_shards(storage, plan, frames)
    if missing:
        raise DataError(
            f"{storage.location}: {len(missing)} of {plan.n_shards} feature shards are missing; "
            f"run {hint('movienet-encode run')}, or as a Slurm array, "
            f"--array={array_list(missing)}, "
            f"{hint('movienet-encode run --only $SLURM_ARRAY_TASK_ID')}"
        )
    frame_manifest = frames.manifest()
    return seal_features(
        storage,
        n_shards=plan.n_shards,
        provenance=plan.provenance(frame_manifest.digest),
        labels_for=labels_reader(config.data),
        renamed=frame_manifest.renamed,
        parent=plan.parent,
    )
