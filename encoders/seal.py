"""A complete set of feature shards becomes one feature set."""

from __future__ import annotations

from typing import TYPE_CHECKING

from configs.errors import DataError
from configs.runtime.progress import progress
from encoders.encode_plan import PLAN, EncodePlan
from sharding.features import feature_shard_done, seal_features
from sharding.format.manifest import Manifest
from sharding.format.names import MANIFEST, array_list
from sharding.label_files import labels_reader
from sharding.verify import Problem, verify_features

if TYPE_CHECKING:
    from configs.schema import Config
    from encoders.frame_source import FrameSource
    from sharding.storage.base import Storage


def read_plan(storage: Storage) -> EncodePlan | None:
    """Return the plan of a feature set; None if there is none.

    Raises:
        DataError: it is damaged.
    """
    if storage.size(PLAN) is None:
        return None
    return EncodePlan.from_bytes(storage.read(PLAN), f"{storage.location}/{PLAN}")


def wanted_plan(storage: Storage) -> EncodePlan:
    """Return the plan of a feature set.

    Raises:
        DataError: there is none, or it is damaged.
    """
    plan = read_plan(storage)
    if plan is None:
        raise DataError(f"{storage.location}: no {PLAN}; run `movienet-encode plan` first")
    return plan


def missing_shards(
    storage: Storage, plan: EncodePlan, frames: FrameSource, *, replace: bool = False
) -> list[int]:
    """Return the numbers of the shards that are not there as planned.

    Raises:
        DataError: the frame set is another one than was planned; or a shard was made from
            something else, and ``replace`` is off.
    """
    if plan.frames != frames.digest:
        grown = frames.before(plan.n_shards) == plan.frames
        say = "run `movienet-encode run` to add what is new" if grown else "run with --replace"
        raise DataError(
            f"{storage.location}/{PLAN}: planned for frames {plan.frames[:12]}, but "
            f"{frames.location} is {frames.digest[:12]}; {say}"
        )

    def done(number: int) -> bool:
        sha256 = frames.sha256(number)
        if sha256 is None:
            return False
        return feature_shard_done(storage, number, plan.input_digest(sha256), replace=replace)

    return [number for number in range(plan.n_shards) if not done(number)]


def sealed_manifest(storage: Storage) -> Manifest | None:
    """Return the manifest of a feature set; None if it is not sealed.

    Raises:
        DataError: it is damaged.
    """
    if storage.size(MANIFEST) is None:
        return None
    return Manifest.from_bytes(storage.read(MANIFEST), f"{storage.location}/{MANIFEST}")


def sealed_as(storage: Storage, plan: EncodePlan) -> Manifest | None:
    """Return the manifest of a feature set that is sealed as planned; None if it is not.

    Raises:
        DataError: the manifest is damaged.
    """
    there = sealed_manifest(storage)
    if there is None or (len(there.shards), there.parent) != (plan.n_shards, plan.parent):
        return None
    return there


def problems_of(config: Config, storage: Storage) -> list[Problem]:
    """Read a sealed feature set from end to end and return what is wrong with it.

    Raises:
        DataError: it has no plan, it is not sealed, or its index, labels or manifest are damaged.
    """
    plan = wanted_plan(storage)
    with progress(plan.n_shards, label="verify", unit="shards") as bar:
        problems = verify_features(
            storage,
            workers=config.sharding.workers,
            config=config.storage,
            on_shard=bar.advance,
        )
    sealed = sealed_manifest(storage)
    if sealed and sealed.provenance.get("encoder") != dict(plan.encoder):
        text = f"{storage.location}/{MANIFEST}: names another encoder than {PLAN}; seal again"
        problems.append(Problem(text))
    return problems


def seal(config: Config, storage: Storage, plan: EncodePlan, frames: FrameSource) -> Manifest:
    """Write index, labels and manifest; any rank may do it, several at once give the same bytes.

    Raises:
        ConfigError: ``data.metadata`` is missing.
        DataError: the frame set is another one than was planned, or shards are missing.
    """
    # Refuses another frame set, and shards that were made from something else.
    missing = missing_shards(storage, plan, frames)
    if missing:
        raise DataError(
            f"{storage.location}: {len(missing)} of {plan.n_shards} feature shards are missing; "
            f"run the stage again, on Slurm with --array={array_list(missing)} and `run --only`"
        )
    made = frames.manifest()
    return seal_features(
        storage,
        n_shards=plan.n_shards,
        provenance=plan.provenance(made.digest),
        labels_for=labels_reader(config.data),
        renamed=made.renamed,
        parent=plan.parent,
    )
