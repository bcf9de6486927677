"""Sealing of a complete frame set: its manifest."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from configs.errors import DataError
from configs.runtime.hints import hint
from sharding.format.encoding import canonical_json
from sharding.format.manifest import Manifest, ManifestShard, Sidecar
from sharding.format.names import MANIFEST, PLAN, array_list
from sharding.format.plan import Plan
from sharding.frames import read_plan
from sharding.shard import read_sidecar, shard_done, sidecar_alone
from sharding.storage.base import Storage

logger = logging.getLogger(__name__)

REJECTED = "rejected.jsonl"


def missing_frames(storage: Storage, plan: Plan, *, replace: bool = False) -> list[int]:
    """Return the numbers of the shards that are not complete.

    Raises:
        DataError: a shard has another input digest than planned, and ``replace`` is off.
    """
    return [
        number
        for number in range(len(plan.shards))
        if not shard_done(storage, "frames", number, plan.input_digest(number), replace=replace)
    ]


def missing_records(storage: Storage, plan: Plan) -> list[int]:
    """Return the numbers of the temporary frame shards that were never built.

    Args:
        storage: Folder of the sidecars, which remain after their tars were deleted.
        plan: The current plan of the frames.
    """
    return [
        number
        for number in range(len(plan.shards))
        if (sidecar := sidecar_alone(storage, "frames", number)) is None
        or sidecar.input_digest != plan.input_digest(number)
    ]


def seal_frames(storage: Storage, *, max_bad_fraction: float) -> Manifest:
    """Write ``rejected.jsonl`` and, last, the manifest of a complete frame set.

    Raises:
        DataError: there is no plan, shards are missing, or too many images are bad.
    """
    plan = read_plan(storage)
    if plan is None:
        raise DataError(f"{storage.location}: no {PLAN}; run {hint('movienet-shard build')}")
    missing = missing_frames(storage, plan)
    if missing:
        raise DataError(
            f"{storage.location}: {len(missing)} of {len(plan.shards)} frame shards are missing; "
            f"run {hint('movienet-shard build')}, or on Slurm --array={array_list(missing)} "
            "with `--only $SLURM_ARRAY_TASK_ID`"
        )
    read = (read_sidecar(storage, "frames", number) for number in range(len(plan.shards)))
    sidecars = [sidecar for sidecar in read if sidecar is not None]
    return publish_manifest(storage, plan, sidecars, max_bad_fraction=max_bad_fraction)


def publish_manifest(
    storage: Storage, plan: Plan, sidecars: Sequence[Sidecar], *, max_bad_fraction: float
) -> Manifest:
    """Write ``rejected.jsonl`` and, last, the manifest of the shards of these sidecars.

    Raises:
        DataError: too many images are bad.
    """
    # Checked here, because a build task knows only its own shards.
    _check_bad(storage, sidecars, max_bad_fraction)
    manifest = Manifest(
        kind="frames",
        provenance={"shard_bytes": plan.shard_bytes},
        shards=tuple(ManifestShard.of(sidecar) for sidecar in sidecars),
        parent=plan.parent,
        renamed={m.movie: m.original for m in plan.movies if m.movie != m.original},
    )
    rows = [rejected.row() for sidecar in sidecars for rejected in sidecar.rejected]
    storage.publish(REJECTED, b"".join(map(canonical_json, rows)), replace=True)
    # The manifest is last: a set with a manifest has all its files.
    storage.publish(MANIFEST, manifest.to_bytes(), replace=True)
    logger.info("sealed %s: data %s", storage.location, manifest.digest[:12])
    if rows:
        logger.info("rejected %d images or members, listed in %s", len(rows), REJECTED)
    return manifest


def _check_bad(storage: Storage, sidecars: Sequence[Sidecar], max_bad_fraction: float) -> None:
    bad = sum(_bad(sidecar) for sidecar in sidecars)
    images = bad + sum(sidecar.samples for sidecar in sidecars)
    if bad > max_bad_fraction * images:
        raise DataError(
            f"{storage.location}: got {bad} bad of {images} images in total, want at most "
            f"{max_bad_fraction:.1%} (sharding.max_bad_fraction); most in {_worst(sidecars)}; "
            "repair the dump, or raise the limit"
        )


def _worst(sidecars: Sequence[Sidecar]) -> str:
    rejected = Counter(row.movie for sidecar in sidecars for row in sidecar.rejected)
    movie, count = rejected.most_common(1)[0]
    return f"movie {movie} ({count})"


def _bad(sidecar: Sidecar) -> int:
    bad = sidecar.statistics.get("bad", 0)
    return bad if isinstance(bad, int) else 0
