"""Progress of encoding: every rank reports its own rate, rank 0 also totals of task and set.

Totals are counted from the sidecars in the feature set, so the ranks exchange no messages.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import MovieNetError
from configs.runtime.attempt import task_dir
from configs.runtime.progress import progress
from configs.runtime.publish import publish_bytes
from configs.runtime.tracking import start_tracking
from configs.units import format_seconds
from sharding.format.names import sidecar_name

if TYPE_CHECKING:
    from configs.runtime.progress import Progress
    from configs.runtime.tracking import Tracker
    from configs.runtime.world import World
    from configs.schema import Config
    from encoders.extract import EncodeStats
    from encoders.input_pipeline import Batch
    from sharding.storage.base import Storage

logger = logging.getLogger(__name__)

_LOG_S = 2.0
"""Seconds between two points of a chart."""

_COUNT_S = 20.0
"""Seconds between two counts of the sidecars; on an object store a count costs requests."""

_RUN_ID = "wandb-id"


@dataclass(frozen=True)
class Tally:
    """Counter of completed shards; a shard is complete if its sidecar exists."""

    features: Storage
    images: Sequence[int]
    """Planned images of every shard of the set."""

    task: frozenset[int]
    """Shards of this task."""

    def done(self) -> dict[str, tuple[int, int]]:
        """Return completed shards and their images, for ``task`` and ``set``."""
        names = set(self.features.names())
        completed = [n for n in range(len(self.images)) if sidecar_name("features", n) in names]
        of_task = [n for n in completed if n in self.task]
        return {
            scope: (len(numbers), sum(self.images[n] for n in numbers))
            for scope, numbers in (("task", of_task), ("set", completed))
        }

    def total(self) -> dict[str, int]:
        """Return all planned images, for ``task`` and ``set``."""
        return {"task": sum(self.images[n] for n in self.task), "set": sum(self.images)}


class ProgressReporter:
    """Reports the work of one rank as a progress bar, log lines and charts.

    Args:
        planned: Planned images of every shard of the set; 0 where unknown.
        todo: Images this rank is to encode; None if unknown.
        done: Work of this rank so far; the encoding loop updates it.
        bar: Where progress is shown.
        tracker: Where charts are logged.
    """

    def __init__(
        self,
        planned: Sequence[int],
        todo: int | None,
        done: EncodeStats,
        bar: Progress,
        tracker: Tracker,
    ) -> None:
        self._planned, self._todo = planned, todo
        self._done, self._bar, self._tracker = done, bar, tracker
        self._shown: dict[int, int] = {}
        self._tally: Tally | None = None
        self._scopes: Sequence[str] = ()
        self._start = self._counted = self._logged = time.monotonic()
        self._begin: dict[str, tuple[int, int]] = {}
        self._totals: dict[str, float] = {}
        self._step = 0

    def count(self, tally: Tally, scopes: Sequence[str] = ()) -> None:
        """Report totals of task and set from now on.

        Args:
            tally: Counter of completed shards.
            scopes: ``task`` and ``set`` as far as they are larger than the work of this rank:
                the bar then shows their time left too.
        """
        self._tally, self._scopes = tally, scopes
        self._begin = self._completed() or {}
        self._step = self._begin["task"][1] if self._begin else 0

    def watch(self, batch: Batch) -> None:
        """Record a finished batch."""
        now = time.monotonic()
        self._count_now(now)
        self._bar.skip(self._skipped(batch))
        self._bar.advance(len(batch.frames), **self._figures())
        if now - self._logged >= _LOG_S:
            self._logged = now
            self.log()

    def log(self) -> None:
        """Log one point of the charts."""
        done = self._done
        figures = {
            "rank/images": float(done.images),
            "rank/images_s": done.rate,
            "rank/waiting_share": done.waiting,
            "rank/tower_share": done.working,
        }
        if done.rate and self._todo:
            left = max(0, self._todo - sum(self._shown.values()))
            figures["rank/left_s"] = left / done.rate
        # Steps of a run never decrease, also where a damaged shard is encoded once more.
        first = max(self._step, (self._tracker.next_step or 0) - 1)
        self._tracker.log(figures | self._totals, step=first + done.images)

    def finish(self) -> None:
        """Count once more, and log the last point of the charts."""
        self._counted = -math.inf
        self._count_now(time.monotonic())
        self._bar.advance(0, **self._figures())
        self.log()

    def _skipped(self, batch: Batch) -> int:
        """Return the planned images to count in addition to those of a batch.

        The bar counts planned images, so that it ends full: images rejected while a temporary
        frame shard was built count with its last batch, and a shard that is read again after an
        error counts once.
        """
        number, shown = batch.shard.number, batch.frames.stop
        if batch.is_last:
            shown = self._planned[number] or shown
        previous = self._shown.get(number, 0)
        self._shown[number] = shown
        return shown - previous - len(batch.frames)

    def _count_now(self, now: float) -> None:
        if self._tally is None or now - self._counted < _COUNT_S:
            return
        self._counted = now
        completed, total = self._completed(), self._tally.total()
        self._begin = self._begin or completed or {}
        for scope, (shards, images) in (completed or {}).items():
            self._totals |= {f"{scope}/shards": float(shards), f"{scope}/images": float(images)}
            # Since the start of this attempt: earlier ones may have had another number of ranks.
            rate = (images - self._begin[scope][1]) / (now - self._start)
            if rate > 0:
                self._totals[f"{scope}/images_s"] = rate
                self._totals[f"{scope}/left_s"] = (total[scope] - images) / rate

    def _completed(self) -> dict[str, tuple[int, int]] | None:
        """Return the count; None where it fails, e.g. on a stale NFS handle: it is only shown."""
        if self._tally is None:
            return None
        try:
            return self._tally.done()
        except (OSError, MovieNetError) as error:
            logger.debug("encode: completed shards not counted (%s)", error)
            return None

    def _figures(self) -> dict[str, str]:
        if not self._scopes:  # then the bar itself shows the time left of all the work
            return {"waiting for data": f"{self._done.waiting:.0%}"}
        return {
            scope: f"{format_seconds(self._totals[f'{scope}/left_s'])} left"
            for scope in self._scopes
            if f"{scope}/left_s" in self._totals
        }


@contextmanager
def reporting(
    config: Config,
    task: tuple[int, int],
    world: World,
    *,
    todo: int | None,
    done: EncodeStats,
    tally: Tally,
    only: tuple[str, ...] = (),
) -> Iterator[ProgressReporter]:
    """Report the progress of a rank while the block runs.

    Args:
        config: Of the run.
        task: ``(i, n)``: the i-th of n tasks, from 0.
        world: Ranks of this task; rank 0 draws the bar and reports the totals.
        todo: Images this rank is to encode; None if unknown.
        done: Work of this rank so far; the encoding loop updates it.
        tally: Counter of completed shards.
        only: Shards that the task is limited to.
    """
    folder, first = task_dir(config, "encode", task, only), world.rank == 0
    tracker = start_tracking(
        config,
        run_dir=folder,
        job_type="encode",
        name=f"{config.encoder.name}-encode-{task[0]}-of-{task[1]}",
        run_id=_run_id(folder) if first else None,
        rank=world.rank,
    )
    # Stored, so that the next attempt of the task resumes the same wandb run.
    if first and tracker.run_id:
        with suppress(OSError):  # then the next attempt is a wandb run of its own
            publish_bytes(folder / _RUN_ID, tracker.run_id.encode())
    label = "encode" if world.size == 1 else f"encode, rank {world.rank}"
    try:
        with progress(todo or None, label=label, unit="images", bar=first) as bar:
            reporter = ProgressReporter(tally.images, todo, done, bar, tracker)
            if first:
                scopes = {"task": world.size > 1, "set": task[1] > 1}
                reporter.count(tally, [scope for scope, larger in scopes.items() if larger])
            yield reporter
            reporter.finish()
    finally:
        tracker.finish()


def _run_id(folder: Path) -> str | None:
    """Return the id of the wandb run of an earlier attempt; None if there is none."""
    try:
        return (folder / _RUN_ID).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None
