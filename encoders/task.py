"""One encoding task from start to end: plan, assign shards to this rank, encode, seal."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from configs.errors import DataError, Interrupted, MovieNetError
from configs.runtime.attempt import TaskAttempt, task_dir
from configs.runtime.launch import start
from configs.runtime.signals import StopRequest
from configs.runtime.world import World, world_from_environment
from configs.schema import Config
from encoders.encode_plan import PLAN, EncodePlan, assigned_shards, make_plan, resume
from encoders.extract import EncodeStats, Extractor, timed
from encoders.frame_source import FrameSource, open_frame_source
from encoders.input_pipeline import Batch
from encoders.progress_report import Tally, reporting
from encoders.registry import Tower, make_tower, resolve_precision
from encoders.seal import missing_shards, read_plan, seal, sealed_as
from sharding.assign import task_shards
from sharding.features import keep_parent, open_index
from sharding.format.manifest import Manifest
from sharding.format.names import MANIFEST, array_list, sidecar_name
from sharding.format.tar import RECORD
from sharding.label_files import labels_reader, warn_of_other_labels
from sharding.shard import clear_beyond, read_manifest
from sharding.storage.base import Storage
from sharding.storage.open import open_storage
from sharding.storage.space import Space

logger = logging.getLogger(__name__)

_MOVIE_BYTES = 4096
"""Bytes per movie of a feature shard in addition to its rows: headers and padding of 3 members."""

_SHARD_BYTES = RECORD + 4096
"""Bytes per feature shard in addition to its movies: the end of the tar, and the sidecar."""

_LATE_S = 5.0
"""Time after ``encoder.shutdown_grace`` until a process that hangs in a read is ended."""


_QUIET_S = 900.0
"""Time without a new shard after which a failed rank no longer waits for the others."""

_LOOK_S = 1.0
"""Time between two looks at the other ranks."""


@dataclass(frozen=True)
class Stage:
    """The opened inputs and outputs of a configuration: frames, features, tower and plan."""

    config: Config
    frames: FrameSource
    features: Storage
    device: torch.device
    tower: Tower
    plan: EncodePlan


@dataclass(frozen=True)
class EncodeJob:
    """Arguments of ``run_task``."""

    config: Config
    task: tuple[int, int]
    only: tuple[str, ...]
    stop: StopRequest
    replace: bool
    expected_world_size: int | None


@dataclass(frozen=True)
class Outcome:
    """Result of one rank."""

    encoded: EncodeStats
    skipped: int
    """Shards of this rank that were complete at the start."""

    missing: tuple[int, ...]
    """Shards of the set that are still missing."""

    manifest: Manifest | None
    """Manifest of the set; None while shards are missing."""


def open_stage(config: Config, device: torch.device, *, replace: bool = False) -> Stage:
    """Open the frames, build the tower, and publish the plan or check the existing one.

    Raises:
        ConfigError: the configuration contradicts the existing plan, and ``replace`` is off.
        DataError: the frames are not sealed, or weights are missing; or there is no plan, existing
            shards were encoded from other inputs, and ``replace`` is off.
    """
    features = open_storage(config.features_dir, config.storage)
    # Read before the plan: a process that extends the set writes the plan first and removes the
    # manifest afterwards.
    sealed = read_manifest(features)
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
    is_published = features.size(PLAN) is not None and features.read(PLAN) == plan.to_bytes()
    if not is_published:
        # May raise, so it runs before anything is written: a refusal leaves the set as it was.
        missing_shards(features, plan, frames, replace=replace)
        if sealed is not None and plan.parent == sealed.digest:
            keep_parent(features, sealed)
        if old is None:
            features.remove(MANIFEST)  # it belongs to the old plan
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
    expected_world_size: int | None = None,
) -> Outcome:
    """Encode this rank's shards of a task, and seal the set if it is complete then.

    Args:
        config: Of the run.
        task: ``(i, n)``: the i-th of n tasks, from 0.
        only: Names or numbers of the shards to encode; empty for all shards of the task.
        replace: Overwrite the plan, and encode again the shards that no longer match it.
        stop: Stop request to obey, usually set by signals.
        end_late: Terminate the process if it has not stopped in time after a stop request.
        expected_world_size: Refuse another number of ranks; None accepts any.

    Raises:
        Interrupted: the task was stopped; completed shards are kept, a rerun resumes.
        MovieNetError: an expected failure, e.g. of configuration, data or machine.
    """
    job = EncodeJob(
        config,
        task,
        tuple(only),
        stop or StopRequest(),
        replace=replace,
        expected_world_size=expected_world_size,
    )
    world = world_from_environment()
    with _on_record(job, world.rank) as record, _in_time(job, record, on=end_late):
        labels_reader(job.config.data)  # raises before the work, not after it
        device = _meet(job, world, record)
        return _run(job, world, device, record)


@dataclass
class _Record:
    """Handle on ``attempt-N.json``; ranks other than 0 get its number when the ranks meet."""

    folder: Path
    attempt: TaskAttempt | None
    step: int | None = None
    """Completed images of the task."""

    def write(
        self, outcome: Literal["running", "done", "interrupted", "failed"], message: str = ""
    ) -> None:
        if self.attempt:
            self.attempt.report(outcome, self.step, message, ended=outcome != "running")


@contextmanager
def _on_record(job: EncodeJob, rank: int) -> Iterator[_Record]:
    folder = task_dir(job.config, "encode", job.task, job.only)
    task = f"{job.task[0]}/{job.task[1]}"
    record = _Record(folder, TaskAttempt.begin(folder, task=task) if rank == 0 else None)
    try:
        yield record
    except BaseException as error:
        interrupted = isinstance(error, Interrupted | KeyboardInterrupt)
        record.write("interrupted" if interrupted else "failed", str(error) or repr(error))
        raise


@contextmanager
def _in_time(job: EncodeJob, record: _Record, *, on: bool) -> Iterator[None]:
    """Terminate the process if a stop takes too long, e.g. in a read that hangs.

    Published shards are complete at any time. After ``Interrupted`` the deadline stays active when
    the block ends, because the interpreter waits for its threads at exit.
    """
    ended = threading.Event()
    # The loop itself ends within shutdown_grace (carry_on). Only a hang lasts _LATE_S longer.
    limit_s = job.config.encoder.shutdown_grace + _LATE_S

    def enforce() -> None:
        while not ended.wait(0.2):
            if job.stop.seconds > limit_s:
                message = (
                    f"{job.stop.reason}: terminated after {limit_s:g} s, the current shard is "
                    "dropped; rerun the command to resume"
                )
                logger.warning("%s", message)
                record.write("interrupted", message)
                # Not sys.exit: that would join the threads, one of which hangs in a read. Shards
                # are published atomically, so an exit at any point leaves no partial one.
                os._exit(Interrupted.exit_code)

    # A thread, because the main thread may wait for a read or a device without end. A daemon, so
    # that it never delays an exit itself.
    if on:
        threading.Thread(target=enforce, name="in-time", daemon=True).start()
    try:
        yield
    except BaseException as error:
        # Any other error must keep its own exit code, so the deadline ends with it.
        if not isinstance(error, Interrupted):
            ended.set()
        raise
    ended.set()


def _meet(job: EncodeJob, world: World, record: _Record) -> torch.device:
    """Wait once for the other ranks, agree on the attempt, and return this rank's device."""
    if world.size > 1:
        logger.info("waiting for %d ranks", world.size)
    context = start(
        device=job.config.encoder.device,
        precision="fp32",  # for models wrapped by the launcher; a tower is not
        accumulation=1,
        expected_world_size=job.expected_world_size,
        threads=job.config.encoder.threads,
        section="encoder",
    )
    try:
        # Only rank 0 contributes a number above 0, so the sum broadcasts it.
        contribution = record.attempt.number if record.attempt else 0
        number = int(context.all_reduce_sum(torch.tensor(contribution)).item())
        record.attempt = record.attempt or TaskAttempt(record.folder, number)
        return context.device
    finally:
        context.close()


def _run(job: EncodeJob, world: World, device: torch.device, record: _Record) -> Outcome:
    stage = open_stage(job.config, device, replace=job.replace)
    frames, features, plan = stage.frames, stage.features, stage.plan
    logger.info("%s", stage.tower.description)
    features.sweep()
    # Reads one sidecar per shard, which takes a while on an object store.
    precision = plan.encoder["precision"]
    logger.info(
        "precision %s; checking %d feature shards for completeness", precision, plan.n_shards
    )
    task = frozenset(task_shards(frames.costs, "features", task=job.task, only=job.only))
    assigned = assigned_shards(frames.costs, job.task, world.rank, world.size)
    mine = [number for number in assigned if number in task]
    missing = missing_shards(features, plan, frames, replace=job.replace)
    clear_beyond(features, plan.n_shards, replace=job.replace)
    todo = [number for number in mine if number in set(missing)]
    _check_space(features, plan, frames, todo)
    record.step = _images(frames, task, missing)
    if world.rank == 0:
        record.write("running")
    try:
        encoded = _encode(stage, job, world, todo, task)
    except BaseException:
        with suppress(MovieNetError, OSError):  # the first error is the one to report
            missing = missing_shards(features, plan, frames, replace=job.replace)
            record.step = _images(frames, task, missing)
        raise
    missing = missing_shards(features, plan, frames, replace=job.replace)
    record.step = _images(frames, task, missing)
    if record.attempt:
        record.attempt.rank_ended(world.rank)
    if encoded.failed and not job.stop.requested:
        _log_lines(encoded)
        _wait_for_others(record, world, features, job.stop)
        raise _failure(encoded.failed, len(todo))
    if job.stop.requested:
        _check_stopped(job.stop, world, mine, missing, encoded)
    manifest = None if missing else _sealed(stage, job.stop)
    if task.isdisjoint(missing):
        record.write("done")
    return Outcome(encoded, len(mine) - len(todo), tuple(missing), manifest)


def _wait_for_others(record: _Record, world: World, features: Storage, stop: StopRequest) -> None:
    """Let the other ranks finish their shards: a launcher stops all ranks when one fails.

    A rank that was killed never ends. So the wait is over when nothing was published for long.
    """
    quiet_since, published = time.monotonic(), -1
    while record.attempt and record.attempt.ranks_ended() < world.size and not stop.requested:
        now_published = len(features.names())
        if now_published != published:
            quiet_since, published = time.monotonic(), now_published
        if time.monotonic() - quiet_since > _QUIET_S:
            logger.warning("rank %d: other ranks published nothing for long", world.rank)
            return
        time.sleep(_LOOK_S)


def _check_space(
    features: Storage, plan: EncodePlan, frames: FrameSource, todo: Sequence[int]
) -> None:
    """Raise if the features will not fit; images in remote archives count as 0 until built."""
    rows = sum(frames.images[number] for number in todo)
    movies = sum(len(frames.plan.shards[number]) for number in todo)
    want = rows * (2 * plan.dim + 4) + movies * _MOVIE_BYTES + len(todo) * _SHARD_BYTES
    features.space().require(
        Space(want), features.location, "the features", "or set data.root to another disk"
    )


def _failure(failed: Mapping[int, str], n_todo: int) -> DataError:
    return DataError(
        f"{len(failed)} of {n_todo} shards failed ({array_list(failed)}), the others are done; "
        f"first: {next(iter(failed.values()))}; fix the cause and rerun the command"
    )


def _images(frames: FrameSource, task: frozenset[int], missing: Sequence[int]) -> int:
    """Return the number of images in the completed shards of a task."""
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
        _log_lines(encoded)
        raise Interrupted(
            f"{stop.reason}: rank {world.rank} of {world.size} has {len(mine) - len(left)} of its "
            f"{len(mine)} shards; rerun the command to resume"
        )


def _log_lines(encoded: EncodeStats) -> None:
    for line in encoded.lines():
        logger.info("%s", line)


def _precision(config: Config, device: torch.device, old: EncodePlan | None) -> str:
    """Return the precision; ``auto`` is resolved once and recorded in the plan for all nodes."""
    precision: str = config.encoder.precision
    if precision == "auto" and old is not None:
        precision = str(old.encoder["precision"])
    return resolve_precision(precision, device)


def _encode(
    stage: Stage, job: EncodeJob, world: World, todo: Sequence[int], task: frozenset[int]
) -> EncodeStats:
    """Encode the shards in order; a stop request ends the loop early, without an error."""
    images = stage.frames.images
    if not todo:
        return EncodeStats()
    before = frozenset(stage.features.names())
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
        n_images = _planned_images(stage.frames, todo)
        with reporting(
            stage.config,
            job.task,
            world,
            todo=n_images,
            done=done,
            tally=tally,
            only=job.only,
        ) as reporter:

            def watch(batch: Batch) -> bool:
                reporter.watch(batch)
                return carry_on(done, stop, stage.config.encoder.shutdown_grace)

            def encode(numbers: Sequence[int]) -> None:
                still = _unpublished(stage.features, until(stop, numbers), before)
                for group, waited in timed(reading.ready(still, extractor.fail)):
                    if stop.requested:
                        break
                    done.waited += waited
                    done.seconds += waited
                    extractor.run(group, watch)

            with suppress(Interrupted):
                encode(todo)
                encode(done.second_try())
        return done


def _planned_images(frames: FrameSource, todo: Sequence[int]) -> int | None:
    """Return the images of some shards; None if one is known only once its shard is built."""
    planned = [frames.images[number] for number in todo]
    return None if frames.is_temporary and 0 in planned else sum(planned)


def _unpublished(
    features: Storage, numbers: Iterable[int], before: frozenset[str]
) -> Iterator[int]:
    """Leave out shards that another attempt at this task has published since ``before``."""
    for number in numbers:
        name = sidecar_name("features", number)
        if name in before or features.size(name) is None:
            yield number
        else:
            logger.info("shard %d: published by another attempt, skipped", number)


def until(stop: StopRequest, numbers: Iterable[int]) -> Iterator[int]:
    """Yield the shards in order until a stop is requested."""
    for number in numbers:
        if stop.requested:
            return
        yield number


def carry_on(done: EncodeStats, stop: StopRequest, limit_s: float) -> bool:
    """Return whether to encode another batch: after a stop, if the shard can end in time.

    Args:
        done: Work of this rank so far; its rate predicts the time left of the current shard.
        stop: Stop request.
        limit_s: Longest time between the request and the end of the current shard.
    """
    if not stop.requested:
        return True
    left_s = done.left / max(done.rate, 1e-9)
    return done.left > 0 and stop.seconds + left_s <= limit_s


def _sealed(stage: Stage, stop: StopRequest) -> Manifest:
    """Seal the set unless it is sealed; then warn if the label files have changed since."""
    if sealed_as(stage.features, stage.plan) is not None:
        warn_of_other_labels(stage.config.data, stage.features)
        return open_index(stage.features)[0]
    if stop.requested:
        raise Interrupted(
            f"{stop.reason}: all shards are done, the set is not sealed; rerun the command"
        )
    return seal(stage.config, stage.features, stage.plan, stage.frames)
