"""Dump and plan to frame shards.

A shard is a function of its plan entry and the movies' bytes: a rerun skips what is done, and ends
in the same bytes however often it was killed, in any number of processes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from configs.errors import DataError
from configs.runtime.progress import Progress, progress
from configs.schema import Config, StorageConfig
from sharding.assign import task_shards
from sharding.dump.archives import Dump
from sharding.dump.scan import dump_of, read_movies
from sharding.format.manifest import Manifest, Sidecar
from sharding.format.names import MANIFEST, PLAN
from sharding.format.plan import Plan
from sharding.frame_space import check_space
from sharding.frames import read_plan
from sharding.pack import build_shard
from sharding.plan import Movie, difference, extend_plan, make_plan, same_movies
from sharding.shard import clear_beyond, shard_done
from sharding.storage.base import Storage
from sharding.storage.open import open_storage
from sharding.workers import OnProgress, ProgressUpdate, run_tasks

logger = logging.getLogger(__name__)
_TRACKED_S = 5.0


def plan_dump(config: Config, storage: Storage | None = None) -> Plan:
    """Scan the dump and plan its frame shards; no shard is written.

    Args:
        config: Says where the dump lies.
        storage: The frame set: the listing of a large archive is kept there.

    Raises:
        ConfigError: ``data.dump`` is missing.
        DataError: the dump holds no image, or a tar is damaged.
    """
    movies = _scan(config, storage)
    options = config.sharding
    return make_plan(movies, shard_bytes=options.shard_bytes, image_check=options.image_check)


def _scan(config: Config, storage: Storage | None) -> list[Movie]:
    with progress(None, label="scan", unit="movies") as bar:
        return read_movies(
            dump_of(config),
            config.data.limit,
            exclude=config.data.exclude,
            cache=storage,
            on_movie=bar.advance,
        )


def publish_plan(storage: Storage, plan: Plan, *, replace: bool = False) -> bool:
    """Write ``plan.json`` unless it stands there; return whether it was written.

    Raises:
        DataError: another plan stands there, and ``replace`` is off.
    """
    data, stands = plan.to_bytes(), storage.size(PLAN) is not None
    if stands and storage.read(PLAN) == data:
        return False
    old = None if replace else read_plan(storage)
    if old is not None and old.extensions and same_movies(old, plan):
        return False
    if old is not None:
        raise DataError(
            f"{storage.location}/{PLAN}: differs from the plan of today: {difference(old, plan)}; "
            "say plan --replace to plan again, or plan --extend to add new movies as a part"
        )
    storage.remove(MANIFEST)  # what was sealed, was sealed for the old plan
    storage.publish(PLAN, data, replace=True)
    return True


def extend_published(storage: Storage, config: Config) -> tuple[Plan, bool]:
    """Add the new movies of the dump to a sealed set as a part; return plan, and whether it grew.

    No old shard is touched. The set is unsealed until the new shards are built.

    Raises:
        DataError: there is no sealed set, it was planned with other options, or a movie of it has
            changed.
    """
    old = read_plan(storage)
    sealed = _where_sealed(storage, config)
    manifest = None
    if sealed is not None:
        manifest = Manifest.from_bytes(sealed.read(MANIFEST), f"{sealed.location}/{MANIFEST}")
    if old is None or manifest is None or len(manifest.shards) != len(old.shards):
        raise DataError(
            f"{storage.location}: no sealed frame set to extend; run `movienet-shard build`, "
            "with encoder.frame_storage temporary `movienet-encode run`"
        )
    _check_options(storage, old, config)
    movies = _scan(config, storage)
    plan = extend_plan(old, movies, parent=manifest.digest)
    if plan == old:
        return old, False
    # The plan goes last: killed in between, a seal gives the manifest back, and its digest.
    storage.remove(MANIFEST)
    storage.publish(PLAN, plan.to_bytes(), replace=True)
    return plan, True


def _where_sealed(storage: Storage, config: Config) -> Storage | None:
    """Return where the manifest of the frames lies: of a set in scratch, with the features."""
    if config.encoder.frame_storage == "temporary":
        storage = open_storage(f"{config.features_dir}/frames", config.storage)
    return storage if storage.size(MANIFEST) is not None else None


def plan_for_build(storage: Storage, config: Config) -> Plan:
    """Return the published plan; without one, make it.

    Raises:
        DataError: the published plan was made with other options.
    """
    plan = read_plan(storage)
    if plan is None:
        plan = plan_dump(config, storage)
        publish_plan(storage, plan)
    _check_options(storage, plan, config)
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
                "say plan --replace to plan again"
            )


def choose_shards(
    plan: Plan, *, task: tuple[int, int] = (0, 1), only: Sequence[str] = ()
) -> tuple[int, ...]:
    """Return the frame shards of one task by number; a shard costs its source bytes.

    Args:
        plan: The complete plan, done shards included.
        task: ``(i, n)``: the i-th of n shares, from 0.
        only: Names such as ``frames-00007``, or numbers; none means all.

    Raises:
        ConfigError: the plan has no shard of that name.
    """
    costs = [sum(movie.n_bytes for movie in shard) for shard in plan.shards]
    return task_shards(costs, "frames", task=task, only=only)


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
) -> list[Sidecar]:
    """Build those of the shards that are not done; return their sidecars.

    Args:
        storage: Where the frame set lies.
        dump: The dump.
        plan: The plan; its stamps must still hold.
        numbers: Of the shards that this call is about.
        max_bad_fraction: Share of a movie's images that may be left out.
        replace: Build shards again that were made from something else.
        workers: Processes that build them; each opens the storage anew.
        config: How workers reach an object store.
        on_figures: Called now and then with what was done so far.

    Raises:
        DataError: a source changed or is damaged, a movie has too many bad images; or a shard was
            made from something else, or is not in the plan, and ``replace`` is off.
        MachineError: they do not fit on the disk, or a worker was killed.
        OSError: a source cannot be read, or a shard cannot be written.
    """
    storage.sweep()
    todo = [
        number
        for number in numbers
        if not shard_done(storage, "frames", number, plan.input_digest(number), replace=replace)
    ]
    clear_beyond(storage, len(plan.shards), replace=replace)
    logger.info("shards: %d to build, %d done before", len(todo), len(numbers) - len(todo))
    movies = [movie for number in todo for movie in plan.shards[number]]
    check_space(storage, movies)
    task: _Build | _BuildHere = _BuildHere(storage, dump, plan, max_bad_fraction)
    if workers > 1:
        task = _Build(storage.location, config, dump, plan, max_bad_fraction)
    images = sum(movie.images or 0 for movie in movies)
    with progress(images or None, label="build", unit="images") as bar:
        shown = _Shown(bar, len(movies), on_figures)
        return run_tasks(task, todo, workers=workers, on_progress=shown.take)


@dataclass(frozen=True)
class _BuildHere:
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
class _Build:
    """The same for another process, which opens the storage itself."""

    location: str
    config: StorageConfig | None
    dump: Dump
    plan: Plan
    max_bad_fraction: float

    def __call__(self, number: int, on_progress: OnProgress) -> Sidecar:
        storage = open_storage(self.location, self.config)
        try:
            return _BuildHere(storage, self.dump, self.plan, self.max_bad_fraction)(
                number, on_progress
            )
        finally:
            storage.close()


class _Shown:
    """One bar for all workers, and the same figures for a tracker."""

    def __init__(
        self, bar: Progress, n_movies: int, on_figures: Callable[[dict[str, float]], None]
    ) -> None:
        self._bar, self._n_movies, self._on_figures = bar, n_movies, on_figures
        self._movies = self._images = self._bytes = 0
        self._start = time.monotonic()

    def take(self, news: ProgressUpdate) -> None:
        """Count what was just done."""
        self._movies += news.get("movies", 0)
        self._images += news.get("images", 0)
        self._bytes += news.get("bytes", 0)
        rate = self._bytes / 1e6 / max(time.monotonic() - self._start, 1e-3)
        self._bar.advance(news.get("images", 0), **{"movies": self._movies, "MB/s": rate})
        if "movies" in news:
            figures = {"movies": self._movies, "images": self._images, "MB/s": rate}
            self._on_figures(figures | {"movies_left": self._n_movies - self._movies})


@contextmanager
def tracked(config: Config, task: str) -> Iterator[Callable[[dict[str, float]], None]]:
    """Show a task on the tracker: one run a task, all in one group; a line every few seconds."""
    from configs.runtime.tracking import start_tracking

    tracker = start_tracking(
        config,
        run_dir=config.run_dir.parent / "shard",
        job_type="shard",
        name=f"shard-{task.replace('/', '-of-')}",
        run_id=None,
        rank=0,
    )
    said, last = time.monotonic(), dict[str, float]()

    def show(figures: dict[str, float]) -> None:
        nonlocal said, last
        last = figures
        if time.monotonic() - said >= _TRACKED_S:
            said = time.monotonic()
            tracker.log(figures, step=int(figures["movies"]))

    try:
        yield show
    finally:
        if last:
            tracker.log(last, step=int(last["movies"]))
        tracker.finish()
