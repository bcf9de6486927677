"""Planning and building of the frame shards of a dump.

A shard is a function of its plan entry and the movies' bytes. A rerun skips completed shards, and
the result is byte-identical for any number of kills, tasks and worker processes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from configs.errors import DataError, Interrupted
from configs.runtime.attempt import task_dir
from configs.runtime.hints import hint
from configs.runtime.progress import Progress, progress
from configs.runtime.signals import StopRequest
from configs.schema import Config, StorageConfig
from sharding.assign import task_shards
from sharding.dump.archives import Dump
from sharding.dump.scan import dump_of, read_movies
from sharding.format.manifest import Sidecar
from sharding.format.names import MANIFEST, PLAN
from sharding.format.plan import Plan
from sharding.frame_space import check_space
from sharding.frames import frame_commands, open_records, read_plan
from sharding.pack import build_shard
from sharding.plan import (
    Movie,
    can_extend,
    difference,
    excluded_movies,
    extend_plan,
    make_plan,
    same_movies,
)
from sharding.shard import clear_beyond, read_manifest, shard_done
from sharding.storage.base import Storage
from sharding.storage.open import open_storage
from sharding.workers import OnProgress, ProgressUpdate, run_tasks

logger = logging.getLogger(__name__)
_TRACKING_INTERVAL_S = 5.0


def plan_dump(config: Config, storage: Storage | None = None) -> Plan:
    """Scan the dump and plan its frame shards; no shard is written.

    Args:
        config: Location of the dump, and the options of the shards.
        storage: The frame set; the listing of a large archive is cached in it.

    Raises:
        ConfigError: ``data.dump`` is missing.
        DataError: the dump contains no image, or a tar is corrupt.
    """
    movies = _scan(config, storage)
    options = config.sharding
    return make_plan(movies, shard_bytes=options.shard_bytes, image_check=options.image_check)


def _scan(config: Config, storage: Storage | None) -> list[Movie]:
    dump = dump_of(config)
    logger.info("listing %s", dump)
    with progress(None, label="scan", unit="movies") as bar:
        return read_movies(
            dump,
            config.data.limit,
            exclude=config.data.exclude,
            cache=storage,
            on_movie=bar.advance,
        )


def publish_plan(storage: Storage, plan: Plan, *, replace: bool = False) -> bool:
    """Write ``plan.json`` unless it is already published; return whether it was written.

    Raises:
        DataError: another plan is published, and ``replace`` is off.
    """
    data = plan.to_bytes()
    if storage.size(PLAN) is not None and storage.read(PLAN) == data:
        return False
    old = None if replace else read_plan(storage)
    # An extended plan has other shard numbers than a new plan of the same movies; both are valid.
    if old is not None and old.extensions and same_movies(old, plan):
        return False
    if old is not None:
        remedy = f"run {hint('movienet-shard plan --replace')} to plan again"
        if can_extend(old, plan):
            remedy += f", or {hint('movienet-shard plan --extend')} to add only new movies"
        raise DataError(
            f"{storage.location}/{PLAN}: differs from the current dump and options: "
            f"{difference(old, plan)}; {remedy}"
        )
    storage.remove(MANIFEST)  # it seals the shards of the old plan
    storage.publish(PLAN, data, replace=True)
    return True


def extend_published(storage: Storage, config: Config) -> tuple[Plan, bool]:
    """Extend the plan of a sealed set by the new movies of the dump.

    Existing shards stay unchanged. The set is unsealed until the new shards are built.

    Returns:
        The plan, and whether it has grown.

    Raises:
        DataError: there is no sealed set, it was planned with other options, or one of its movies
            has changed.
    """
    old, sealed = read_plan(storage), open_records(config)
    manifest = read_manifest(sealed)
    if old is None or manifest is None or len(manifest.shards) != len(old.shards):
        raise DataError(
            f"{storage.location}: no sealed frame set to extend; run "
            f"{hint(frame_commands(config)[0])} first"
        )
    _check_options(storage, old, config)
    movies = _scan(config, storage)
    plan = extend_plan(old, movies, parent=manifest.digest)
    if plan == old:
        return old, False
    # The plan is published last: if a kill intervenes, a seal restores the same manifest.
    sealed.remove(MANIFEST)
    storage.publish(PLAN, plan.to_bytes(), replace=True)
    return plan, True


def plan_for_build(storage: Storage, config: Config) -> Plan:
    """Return the published plan; make and publish it if there is none.

    Raises:
        DataError: the published plan was made with other options, or contains excluded movies.
    """
    plan = read_plan(storage)
    if plan is None:
        plan = plan_dump(config, storage)
        publish_plan(storage, plan)
    _check_options(storage, plan, config)
    # Other tasks may be building from this plan, so it is never replaced without a command.
    if movies := excluded_movies(plan, config.data.exclude):
        raise DataError(
            f"{storage.location}/{PLAN}: contains {len(movies)} movies of data.exclude "
            f"({movies[0]}{', …' if len(movies) > 1 else ''}), want none; run "
            f"{hint('movienet-shard plan --replace')} to plan again"
        )
    return plan


def _check_options(storage: Storage, plan: Plan, config: Config) -> None:
    options = config.sharding
    for key, planned, got in (
        ("shard_bytes", plan.shard_bytes, options.shard_bytes),
        ("image_check", plan.image_check, options.image_check),
    ):
        if planned != got:
            raise DataError(
                f"{storage.location}/{PLAN}: planned for sharding.{key} {planned}, got {got}; "
                f"run {hint('movienet-shard plan --replace')} to plan again"
            )


def shard_costs(plan: Plan) -> list[int]:
    """Return the source bytes of each shard, by which tasks are assigned."""
    return [sum(movie.n_bytes for movie in shard) for shard in plan.shards]


def choose_shards(
    plan: Plan, *, task: tuple[int, int] = (0, 1), only: Sequence[str] = ()
) -> tuple[int, ...]:
    """Return the numbers of the frame shards of one task; source bytes are the cost of a shard.

    Args:
        plan: The complete plan, including completed shards.
        task: ``(i, n)``: task i of n, counted from 0.
        only: Names such as ``frames-00007``, or numbers; empty means all.

    Raises:
        ConfigError: the plan has no shard of that name.
    """
    return task_shards(shard_costs(plan), "frames", task=task, only=only)


def build_shards(
    storage: Storage,
    dump: Dump,
    plan: Plan,
    numbers: Sequence[int],
    *,
    max_bad_fraction: float,
    replace: bool = False,
    workers: int = 1,
    config: StorageConfig | None = None,
    on_figures: Callable[[dict[str, float]], None] = lambda _: None,
    stop: StopRequest | None = None,
) -> list[Sidecar]:
    """Build the shards that are not yet complete; return their sidecars.

    Args:
        storage: Storage of the frame set.
        dump: The dump.
        plan: The plan; the sources must still have its fingerprints.
        numbers: Shard numbers to consider; complete shards are skipped.
        max_bad_fraction: Fraction of a movie's images that may be rejected.
        replace: Rebuild shards whose source or options changed, and remove shards beyond the plan.
        workers: Number of processes; each opens the storage itself.
        config: Object store options for the workers.
        on_figures: Called after each movie with the totals so far.
        stop: Stop request to obey, usually set by signals; the current shard is dropped.

    Raises:
        Interrupted: a stop was requested.
        DataError: a source changed or is corrupt, a movie has too many bad images; or a shard has
            another input digest or is not in the plan, and ``replace`` is off.
        MachineError: the shards do not fit on the disk, or a worker was killed.
        OSError: a source cannot be read, or a shard cannot be written.
    """
    storage.sweep()  # temporary files of killed tasks
    todo = [
        number
        for number in numbers
        if not shard_done(storage, "frames", number, plan.input_digest(number), replace=replace)
    ]
    clear_beyond(storage, len(plan.shards), replace=replace)
    logger.info("shards: %d to build, %d already done", len(todo), len(numbers) - len(todo))
    movies = [movie for number in todo for movie in plan.shards[number]]
    check_space(storage, movies)
    task: _BuildInWorker | _Build = _Build(storage, dump, plan, max_bad_fraction)
    # An open storage has connections and threads, so it cannot be passed to another process.
    if workers > 1:
        task = _BuildInWorker(storage.location, config, dump, plan, max_bad_fraction)
    # A remote tar is planned by its size: its images are unknown, so its movies are counted.
    by_image = all(movie.images is not None for movie in movies)
    total = sum(movie.images or 0 for movie in movies) if by_image else len(movies)
    with progress(total, label="build", unit="images" if by_image else "movies") as bar:
        counts = _Counts(
            bar, len(movies), on_figures, by_image=by_image, stop=stop or StopRequest()
        )
        return run_tasks(task, todo, workers=workers, on_progress=counts.add)


@dataclass(frozen=True)
class _Build:
    """Task of this process, which has the storage open."""

    storage: Storage
    dump: Dump
    plan: Plan
    max_bad_fraction: float

    def __call__(self, number: int, on_progress: OnProgress) -> Sidecar:
        return build_shard(
            self.storage,
            self.dump,
            self.plan,
            number,
            max_bad_fraction=self.max_bad_fraction,
            on_progress=on_progress,
        )


@dataclass(frozen=True)
class _BuildInWorker:
    """Task of a worker process, which opens the storage itself."""

    location: str
    config: StorageConfig | None
    dump: Dump
    plan: Plan
    max_bad_fraction: float

    def __call__(self, number: int, on_progress: OnProgress) -> Sidecar:
        storage = open_storage(self.location, self.config)
        try:
            return _Build(storage, self.dump, self.plan, self.max_bad_fraction)(number, on_progress)
        finally:
            storage.close()


class _Counts:
    """Totals over all workers, for the progress bar and for the tracker."""

    def __init__(
        self,
        bar: Progress,
        n_movies: int,
        on_figures: Callable[[dict[str, float]], None],
        *,
        by_image: bool,
        stop: StopRequest,
    ) -> None:
        self._stop = stop
        self._bar, self._n_movies, self._on_figures = bar, n_movies, on_figures
        self._by_image = by_image
        self._movies = self._images = self._bytes = 0
        self._start = time.monotonic()

    def add(self, update: ProgressUpdate) -> None:
        """Add the counts of one update; ``images`` includes rejected ones.

        Raises:
            Interrupted: a stop was requested. It takes effect here, between two pieces.
        """
        if self._stop.requested:
            raise Interrupted(
                f"{self._stop.reason}: finished shards are kept; next: "
                f"{hint('movienet-shard build')}"
            )
        self._movies += update.get("movies", 0)
        self._images += update.get("images", 0)
        self._bytes += update.get("bytes", 0)
        rate = self._bytes / 1e6 / max(time.monotonic() - self._start, 1e-3)
        if self._by_image:
            self._bar.advance(update.get("images", 0), **{"movies": self._movies, "MB/s": rate})
        else:
            self._bar.advance(update.get("movies", 0), **{"images": self._images, "MB/s": rate})
        if "movies" in update:
            figures = {"movies": self._movies, "images": self._images, "MB/s": rate}
            self._on_figures(figures | {"movies_left": self._n_movies - self._movies})


@contextmanager
def tracked(config: Config, task: tuple[int, int]) -> Iterator[Callable[[dict[str, float]], None]]:
    """Track a build task as one run, resumed by a rerun; all tasks of a build are in one group.

    Yields:
        A function that takes the totals so far and logs them every few seconds.
    """
    from configs.runtime.tracking import start_tracking
    from configs.runtime.wandb_files import last_run_id

    folder = task_dir(config, "shard", task)

    tracker = start_tracking(
        config,
        run_dir=folder,
        job_type="shard",
        name=f"shard-{task[0]}-of-{task[1]}",
        run_id=last_run_id(folder),
        rank=0,
    )
    logged_at, last = time.monotonic(), dict[str, float]()
    # The counts of an attempt begin at 0, the steps of a run never decrease.
    first = max(0, (tracker.next_step or 0) - 1)

    def log(figures: dict[str, float]) -> None:
        nonlocal logged_at, last
        last = figures
        if time.monotonic() - logged_at >= _TRACKING_INTERVAL_S:
            logged_at = time.monotonic()
            tracker.log(figures, step=first + int(figures["movies"]))

    try:
        yield log
    finally:
        if last:
            tracker.log(last, step=first + int(last["movies"]))
        tracker.finish()
