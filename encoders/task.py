"""One encoding task from start to end: plan, this rank's shards, encode, seal."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from configs.errors import DataError, Interrupted
from configs.runtime.attempt import TaskAttempt
from configs.runtime.launch import World, start, world_from_environment
from configs.runtime.signals import StopRequest
from configs.schema import Config
from encoders.encode_plan import PLAN, EncodePlan, assigned_shards, make_plan, resume
from encoders.extract import EncodeStats, Extractor, timed
from encoders.frame_source import FrameSource, open_frame_source
from encoders.progress_report import Tally, reporting, task_dir
from encoders.registry import Tower, make_tower, resolve_precision
from encoders.seal import missing_shards, read_plan, seal, sealed_as, sealed_manifest
from sharding.assign import task_shards
from sharding.features import open_index
from sharding.format.manifest import Manifest
from sharding.format.names import MANIFEST, array_list
from sharding.format.tar import RECORD
from sharding.label_files import labels_reader, warn_of_other_labels
from sharding.shard import clear_beyond
from sharding.storage.base import Storage
from sharding.storage.open import open_storage
from sharding.storage.space import Space

logger = logging.getLogger(__name__)

_MOVIE_BYTES = 4096
"""Of a feature shard, beside the rows: headers and padding of three members."""

_SHARD_BYTES = RECORD + 4096
"""The end of the tar, and the sidecar."""

_LATE_S = 5.0
"""After the time for the shard in hand: whoever still waits for a read or a device is ended."""


@dataclass(frozen=True)
class Stage:
    """What a configuration says about encoding, opened."""

    config: Config
    frames: FrameSource
    features: Storage
    device: torch.device
    tower: Tower
    plan: EncodePlan


@dataclass(frozen=True)
class EncodeJob:
    """The arguments of ``run_task``."""

    config: Config
    task: tuple[int, int]
    only: tuple[str, ...]
    stop: StopRequest
    replace: bool


@dataclass(frozen=True)
class Outcome:
    """What a rank did."""

    encoded: EncodeStats
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
    features = open_storage(config.features_dir, config.storage)
    # Before the plan: whoever adds a part writes the plan first, and then removes the manifest.
    sealed = sealed_manifest(features)
    old = None if replace else read_plan(features)
    frames = open_frame_source(config)
    precision = _precision(config, device, old)
    tower = make_tower(config.encoder, device, precision)
    plan = make_plan(config.encoder, tower, precision, frames)
    if old is not None:
        plan = resume(
            old,
            plan,
            before=frames.before(old.n_shards),
            sealed=sealed.digest if sealed else None,
            where=f"{features.location}/{PLAN}",
        )
    stands = features.size(PLAN) is not None and features.read(PLAN) == plan.to_bytes()
    if not stands:
        # Asked before anything is written: a refusal leaves the set as it was.
        missing_shards(features, plan, frames, replace=replace)
        if old is None:
            features.remove(MANIFEST)  # what was sealed, was sealed for the old plan
        features.publish(PLAN, plan.to_bytes(), replace=True)
        features.remove(MANIFEST)
    return Stage(config, frames, features, device, tower, plan)


def run_task(
    config: Config,
    *,
    task: tuple[int, int] = (0, 1),
    only: Sequence[str] = (),
    replace: bool = False,
    stop: StopRequest | None = None,
    end_late: bool = False,
) -> Outcome:
    """Encode this rank's part of a share; seal if that makes the set complete.

    Args:
        config: Of the run.
        task: ``(i, n)``: the i-th of n shares, from 0.
        only: Names or numbers of the shards it is about; none means all of the share.
        replace: Plan anew, and encode again what was made otherwise.
        stop: Asked for by signals, if somebody listens.
        end_late: End the process where a stop that was asked for takes too long.

    Raises:
        Interrupted: a stop was asked for; what is done stays done: run again.
        MovieNetError: something expected is wrong.
    """
    job = EncodeJob(config, task, tuple(only), stop or StopRequest(), replace=replace)
    world = world_from_environment()
    with _on_record(job, world.rank) as record, _in_time(job, record, on=end_late):
        labels_reader(job.config.data)  # complain before the work, not after it
        device = _meet(job.config, record)
        return _run(job, world, device, record)


@dataclass
class _Record:
    """This rank's hold on ``attempt-N.json``; ranks but 0 learn of it when they meet."""

    folder: Path
    attempt: TaskAttempt | None
    step: int | None = None
    """Images of the share that are done."""

    def tell(
        self, outcome: Literal["running", "done", "interrupted", "failed"], message: str = ""
    ) -> None:
        if self.attempt:
            self.attempt.tell(outcome, self.step, message, ended=outcome != "running")


@contextmanager
def _on_record(job: EncodeJob, rank: int) -> Iterator[_Record]:
    folder = task_dir(job.config, job.task)
    record = _Record(folder, TaskAttempt.begin(folder) if rank == 0 else None)
    try:
        yield record
    except BaseException as error:
        interrupted = isinstance(error, Interrupted | KeyboardInterrupt)
        with suppress(OSError):  # the first error is the one to tell
            record.tell("interrupted" if interrupted else "failed", str(error) or repr(error))
        raise


@contextmanager
def _in_time(job: EncodeJob, record: _Record, *, on: bool) -> Iterator[None]:
    """End the process when a stop takes too long: whatever it waits for, all it published is whole.

    It goes on after the block where that was interrupted: a read that hangs would hold the exit.
    """
    over = threading.Event()
    # The loop itself ends within stop_within (carry_on). Only a hang lasts _LATE_S longer.
    limit_s = job.config.encoder.shutdown_grace + _LATE_S

    def look() -> None:
        while not over.wait(0.2):
            if job.stop.seconds > limit_s:
                message = f"{job.stop.reason}: ended after {limit_s:g} s, the shard in hand lost"
                logger.warning("%s", message)
                with suppress(OSError):  # a full or read-only disk must not prevent the exit
                    record.tell("interrupted", message)
                # Not sys.exit: that would join the threads, one of which hangs in a read. Shards
                # become visible in one step, so an end at any point leaves no partial one.
                os._exit(Interrupted.exit_code)

    # On its own thread, because the main thread may wait for a read or a device without end.
    # Daemon, so that it never delays an exit itself.
    if on:
        threading.Thread(target=look, name="in-time", daemon=True).start()
    try:
        yield
    except BaseException as error:
        # After Interrupted the deadline stays on: the interpreter still joins its threads at exit.
        # Any other error must keep its own exit code.
        if not isinstance(error, Interrupted):
            over.set()
        raise
    over.set()


def _meet(config: Config, record: _Record) -> torch.device:
    """Wait for the other ranks once, and learn which attempt this is; then each is on its own."""
    launch = start(
        device=config.encoder.device,
        precision="fp32",  # of the launcher's wrapping, which a tower does not have
        accumulation=1,
        expected_world_size=None,
        threads=config.encoder.threads,
    )
    try:
        mine = record.attempt.number if record.attempt else 0
        number = int(launch.all_reduce_sum(torch.tensor(mine)).item())
        record.attempt = record.attempt or TaskAttempt(record.folder, number)
        return launch.device
    finally:
        launch.close()


def _run(job: EncodeJob, world: World, device: torch.device, record: _Record) -> Outcome:
    stage = open_stage(job.config, device, replace=job.replace)
    frames, features, plan = stage.frames, stage.features, stage.plan
    logger.info("%s   precision %s", stage.tower.description, plan.encoder["precision"])
    features.sweep()
    task = frozenset(task_shards(frames.costs, "features", task=job.task, only=job.only))
    dealt = assigned_shards(frames.costs, job.task, world.rank, world.size)
    mine = [number for number in dealt if number in task]
    missing = missing_shards(features, plan, frames, replace=job.replace)
    clear_beyond(features, plan.n_shards, replace=job.replace)
    todo = [number for number in mine if number in set(missing)]
    _check_space(features, plan, frames, todo)
    record.step = _images(frames, task, missing)
    if world.rank == 0:
        record.tell("running")
    encoded = _encode(stage, job, world, todo, task)
    if encoded.failed and not job.stop.requested:
        logger.info("%s", encoded.line())
        raise _failure(encoded.failed, len(todo))
    missing = missing_shards(features, plan, frames, replace=job.replace)
    record.step = _images(frames, task, missing)
    if job.stop.requested:
        _check_stopped(job.stop, world, mine, missing, encoded)
    manifest = None if missing else _sealed(stage, job.stop)
    if task.isdisjoint(missing):
        record.tell("done")
    return Outcome(encoded, len(mine) - len(todo), tuple(missing), manifest)


def _check_space(
    features: Storage, plan: EncodePlan, frames: FrameSource, todo: Sequence[int]
) -> None:
    """Refuse to begin what cannot end; frames in remote archives count as nothing until built."""
    rows = sum(frames.images[number] for number in todo)
    movies = sum(len(frames.plan.shards[number]) for number in todo)
    want = rows * (2 * plan.dim + 4) + movies * _MOVIE_BYTES + len(todo) * _SHARD_BYTES
    features.space().require(
        Space(want), features.location, "the features", "or set data.root elsewhere"
    )


def _failure(failed: Mapping[int, str], n_todo: int) -> DataError:
    return DataError(
        f"{len(failed)} of {n_todo} shards failed ({array_list(failed)}), the others are done; "
        f"first: {next(iter(failed.values()))}; mend what is wrong, then run the same command again"
    )


def _images(frames: FrameSource, task: frozenset[int], missing: Sequence[int]) -> int:
    """Return the images of the shards of a share that are done."""
    return sum(frames.images[number] for number in task.difference(missing))


def _check_stopped(
    stop: StopRequest,
    world: World,
    mine: Sequence[int],
    missing: Sequence[int],
    encoded: EncodeStats,
) -> None:
    left = set(mine) & set(missing)
    if left:
        logger.info("%s", encoded.line())
        raise Interrupted(
            f"{stop.reason}: rank {world.rank} of {world.size} has {len(mine) - len(left)} of its "
            f"{len(mine)} shards; run the same command again to go on"
        )


def _precision(config: Config, device: torch.device, old: EncodePlan | None) -> str:
    """Resolve ``auto`` once: what the plan says holds on every node after it."""
    wanted: str = config.encoder.precision
    if wanted == "auto" and old is not None:
        wanted = str(old.encoder["precision"])
    return resolve_precision(wanted, device)


def _encode(
    stage: Stage, job: EncodeJob, world: World, todo: Sequence[int], task: frozenset[int]
) -> EncodeStats:
    """Encode the shards one after the other; a stop ends it early, without an error."""
    images = stage.frames.images
    if not todo:
        return EncodeStats()
    with stage.frames.reading(job.stop) as reading:
        extractor = Extractor(
            stage.config.encoder,
            stage.plan,
            stage.tower,
            stage.device,
            frames=reading.shards,
            features=stage.features,
        )
        done, stop = extractor.done, job.stop
        tally = Tally(stage.features, images, task)
        n_images = sum(images[number] for number in todo)
        with reporting(
            stage.config, job.task, world, todo=n_images, done=done, tally=tally
        ) as follower:

            def watch(batch: int) -> bool:
                follower.watch(batch)
                return carry_on(done, stop, stage.config.encoder.shutdown_grace)

            def encode(numbers: Sequence[int]) -> None:
                for group, waited in timed(reading.ready(until(stop, numbers), extractor.fail)):
                    if stop.requested:
                        break
                    done.waited += waited
                    done.seconds += waited
                    extractor.run(group, watch)

            with suppress(Interrupted):
                encode(todo)
                encode(done.second_try())
        return done


def until(stop: StopRequest, numbers: Iterable[int]) -> Iterator[int]:
    """Yield shards in turn, until a stop is asked for."""
    for number in numbers:
        if stop.requested:
            return
        yield number


def carry_on(done: EncodeStats, stop: StopRequest, limit_s: float) -> bool:
    """Tell, after a batch, whether there is to be another one: the shard in hand may be ended."""
    if not stop.requested:
        return True
    left_s = done.left / max(done.rate, 1e-9)
    return done.left > 0 and stop.seconds + left_s <= limit_s


def _sealed(stage: Stage, stop: StopRequest) -> Manifest:
    """Seal, unless that was done: labels may have been changed since."""
    if sealed_as(stage.features, stage.plan) is not None:
        warn_of_other_labels(stage.config.data, stage.features)
        return open_index(stage.features)[0]
    if stop.requested:
        raise Interrupted(f"{stop.reason}: all shards are done, the set is not sealed; run again")
    return seal(stage.config, stage.features, stage.plan, stage.frames)
