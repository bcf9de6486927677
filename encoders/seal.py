"""A complete set of feature shards becomes one feature set."""

from __future__ import annotations

from typing import TYPE_CHECKING

from configs.errors import ConfigError, DataError
from encoders.plan import PLAN, EncodePlan
from sharding.features import feature_shard_done, seal_features
from sharding.metadata import labels_reader

if TYPE_CHECKING:
    from configs.schema import Config
    from sharding.forms import Manifest
    from sharding.frames import FrameSet
    from sharding.storage import Storage


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
        ConfigError: there is none.
        DataError: it is damaged.
    """
    plan = read_plan(storage)
    if plan is None:
        raise ConfigError(f"{storage.location}: no {PLAN}; run `python -m encoders plan` first")
    return plan


def missing_shards(
    storage: Storage, plan: EncodePlan, frames: FrameSet, *, replace: bool = False
) -> list[int]:
    """Return the numbers of the shards that are not there as planned.

    Raises:
        DataError: the frame set is another one than was planned; or a shard was made from
            something else, and ``replace`` is off.
    """
    if plan.frames != frames.digest:
        raise DataError(
            f"{storage.location}/{PLAN}: planned for frames {plan.frames[:12]}, but "
            f"{frames.storage.location} is {frames.digest[:12]}; run with --replace"
        )
    return [
        number
        for number in range(plan.n_shards)
        if not feature_shard_done(
            storage,
            number,
            plan.made_from(frames.manifest.shards[number].sha256),
            replace=replace,
        )
    ]


def seal(config: Config, storage: Storage, plan: EncodePlan, frames: FrameSet) -> Manifest:
    """Write index, labels and manifest; any rank may do it, several at once give the same bytes.

    Raises:
        ConfigError: ``data.metadata`` is missing.
        DataError: the frame set is another one than was planned, or shards are missing.
    """
    # Refuses another frame set, and shards that were made from something else.
    missing_shards(storage, plan, frames)
    return seal_features(
        storage,
        n_shards=plan.n_shards,
        provenance=plan.provenance,
        labels_for=labels_reader(config.data),
        renamed=frames.manifest.renamed,
    )
