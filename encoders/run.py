"""One encoding task from start to end: plan, this rank's shards, encode, seal."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from configs.launch import Launch, World, start
from configs.progress import progress
from configs.schema import Config
from configs.tracking import Tracker, start_tracking
from encoders.extract import Encoded, Extractor, Watcher
from encoders.plan import PLAN, EncodePlan, check_same, make_plan, my_shards
from encoders.registry import Tower, make_tower, resolve_precision
from encoders.seal import missing_shards, read_plan, seal
from sharding.features import open_index
from sharding.forms import Manifest
from sharding.frames import FrameSet, open_frames
from sharding.metadata import labels_reader, warn_of_other_labels
from sharding.shard import MANIFEST, clear_beyond
from sharding.storage import Storage, open_storage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """What a configuration says about encoding, opened."""

    config: Config
    frames: FrameSet
    features: Storage
    device: torch.device
    tower: Tower
    plan: EncodePlan


@dataclass(frozen=True)
class Outcome:
    """What a task did."""

    encoded: Encoded
    skipped: int
    """Shards of this rank that were there already."""

    missing: tuple[int, ...]
    """Shards of the set that are not there yet."""

    manifest: Manifest | None
    """The sealed set, if it is complete."""


def open_stage(config: Config, device: torch.device, *, replace: bool = False) -> Stage:
    """Open the frames, build the tower, and publish the plan or check the one that is there.

    Raises:
        ConfigError: the plan that is there says something else, and ``replace`` is off.
        DataError: the frames are not sealed, weights are missing; or without a plan there are
            shards that were made from something else, and ``replace`` is off.
    """
    frames = open_frames(config.frames_dir, config.storage)
    features = open_storage(config.features_dir, config.storage)
    old = None if replace else read_plan(features)
    precision = _precision(config, device, old)
    tower = make_tower(config.encoder, device, precision)
    plan = make_plan(config.encoder, tower, precision, frames.manifest)
    if old is not None:
        check_same(old, plan, f"{features.location}/{PLAN}")
    elif features.size(PLAN) is None or features.read(PLAN) != plan.to_bytes():
        # Asked before anything is written: a refusal leaves the set as it was.
        missing_shards(features, plan, frames, replace=replace)
        features.remove(MANIFEST)  # what was sealed, was sealed for the old plan
        features.publish(PLAN, plan.to_bytes(), replace=True)
    return Stage(config, frames, features, device, tower, plan)


def run_task(config: Config, *, share: tuple[int, int] = (0, 1), replace: bool = False) -> Outcome:
    """Encode this rank's part of a share; seal if that makes the set complete.

    Args:
        config: Of the run.
        share: ``(i, n)``: the i-th of n shares, from 0.
        replace: Plan anew, and encode again what was made otherwise.

    Raises:
        MovieNetError: something expected is wrong. What is done stays done: run again.
    """
    labels_reader(config.data)  # complain before the work, not after it
    launch = start(
        device=config.encoder.device,
        precision="fp32",  # of the launcher's wrapping, which a tower does not have
        accumulation=1,
        expect_world=None,
        threads=config.encoder.threads,
    )
    try:
        return _run(launch, config, share, replace=replace)
    finally:
        launch.close()


def _run(launch: Launch, config: Config, share: tuple[int, int], *, replace: bool) -> Outcome:
    stage = open_stage(config, launch.device, replace=replace)
    logger.info("%s   precision %s", stage.tower.description, stage.plan.encoder["precision"])
    images = [shard.samples for shard in stage.frames.manifest.shards]
    stage.features.sweep()
    mine = my_shards(images, share, launch.world.rank, launch.world.size)
    missing = missing_shards(stage.features, stage.plan, stage.frames, replace=replace)
    clear_beyond(stage.features, stage.plan.n_shards, replace=replace)
    todo = [number for number in mine if number in set(missing)]
    encoded = _encode(stage, todo, sum(images[number] for number in todo), launch.world, share)
    missing = missing_shards(stage.features, stage.plan, stage.frames, replace=replace)
    manifest = None if missing else _sealed(stage)
    return Outcome(encoded, len(mine) - len(todo), tuple(missing), manifest)


def _precision(config: Config, device: torch.device, old: EncodePlan | None) -> str:
    """Resolve ``auto`` once: what the plan says holds on every node after it."""
    wanted: str = config.encoder.precision
    if wanted == "auto" and old is not None:
        wanted = str(old.encoder["precision"])
    return resolve_precision(wanted, device)


def _encode(
    stage: Stage, todo: list[int], images: int, world: World, share: tuple[int, int]
) -> Encoded:
    extractor = Extractor(
        stage.config.encoder,
        stage.plan,
        stage.tower,
        stage.device,
        frames=stage.frames,
        features=stage.features,
    )
    if todo:
        with _tracked(stage.config, world, share, extractor, images) as watch:
            extractor.run(todo, watch)
    return extractor.done


@contextmanager
def _tracked(
    config: Config, world: World, share: tuple[int, int], extractor: Extractor, images: int
) -> Iterator[Watcher]:
    """Show progress, and log the rate and the share of time that the tower waited."""
    name = f"{config.encoder.name}-encode"
    tracker: Tracker = start_tracking(
        config,
        run_dir=config.run_dir.parent / name,
        job_type="encode",
        name=f"{name}-{share[0]}-of-{share[1]}",
        run_id=None,
        rank=world.rank,
    )
    batches = 0
    try:
        with progress(images, label="encode", unit="images") as bar:

            def watch(n_images: int, _waited: float) -> None:
                nonlocal batches
                batches += 1
                done = extractor.done
                seconds = max(done.seconds, 1e-9)
                rate, waiting = done.images / seconds, done.waited / seconds
                bar.advance(n_images, images_s=rate, waiting=waiting)
                figures = {"encode/images_s": rate, "encode/waiting_share": waiting}
                tracker.log(figures, step=batches)

            yield watch
    finally:
        tracker.finish()


def _sealed(stage: Stage) -> Manifest:
    """Seal, unless that was done: labels may have been changed since."""
    if stage.features.size(MANIFEST) is not None:
        warn_of_other_labels(stage.config.data, stage.features)
        return open_index(stage.features)[0]
    return seal(stage.config, stage.features, stage.plan, stage.frames)
