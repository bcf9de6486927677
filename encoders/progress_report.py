"""How far encoding is: each rank tells its own rate, rank 0 also the totals of task and set.

Totals are counted from the sidecars that are there, so no rank asks another one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from configs.runtime.progress import progress
from configs.runtime.publish import publish_bytes
from configs.runtime.tracking import start_tracking
from sharding.format.names import sidecar_name

if TYPE_CHECKING:
    from configs.runtime.launch import World
    from configs.runtime.progress import Progress
    from configs.runtime.tracking import Tracker
    from configs.schema import Config
    from encoders.extract import EncodeStats
    from sharding.storage.base import Storage

_LOG_S = 2.0
"""Seconds between two points of a chart."""

_COUNT_S = 20.0
"""Seconds between two counts of the sidecars: on an object store each is a request or more."""

_RUN_ID = "wandb-id"


def task_dir(config: Config, task: tuple[int, int]) -> Path:
    """Return where a task keeps its attempts and its wandb run: ``NAME-encode/task-I-of-N``."""
    return encode_dir(config) / f"task-{task[0]}-of-{task[1]}"


def encode_dir(config: Config) -> Path:
    """Return the folder of all tasks that make a feature set."""
    return config.run_dir.parent / f"{config.encoder.name}-encode"


@dataclass(frozen=True)
class Tally:
    """Counts which shards are there, by their sidecars."""

    features: Storage
    images: Sequence[int]
    """Of every shard of the set."""

    task: frozenset[int]
    """Shards of this task."""

    def done(self) -> dict[str, tuple[int, int]]:
        """Return shards and images that are done, of ``task`` and ``set``."""
        names = set(self.features.names())
        there = [n for n in range(len(self.images)) if sidecar_name("features", n) in names]
        mine = [n for n in there if n in self.task]
        return {
            what: (len(numbers), sum(self.images[n] for n in numbers))
            for what, numbers in (("task", mine), ("set", there))
        }

    def total(self) -> dict[str, int]:
        """Return all images, of ``task`` and ``set``."""
        return {"task": sum(self.images[n] for n in self.task), "set": sum(self.images)}


class ProgressReporter:
    """Turns what a rank has done into a bar, lines and charts."""

    def __init__(self, todo: int, done: EncodeStats, bar: Progress, tracker: Tracker) -> None:
        self._todo, self._done, self._bar, self._tracker = todo, done, bar, tracker
        self._tally: Tally | None = None
        self._start = self._counted = self._logged = time.monotonic()
        self._begin: dict[str, tuple[int, int]] = {}
        self._totals: dict[str, float] = {}
        self._step = 0

    def count(self, tally: Tally) -> None:
        """Tell totals as well, from now on."""
        self._tally, self._begin = tally, tally.done()
        self._step = self._begin["task"][1]

    def watch(self, images: int) -> None:
        """Take note of a batch."""
        done, now = self._done, time.monotonic()
        self._bar.advance(images, waiting=done.waiting, tower=done.working, **self._totals_now(now))
        if now - self._logged >= _LOG_S:
            self._logged = now
            self.log()

    def log(self) -> None:
        """Put a point on the charts."""
        done = self._done
        figures = {
            "rank/images": float(done.images),
            "rank/images_s": done.rate,
            "rank/waiting_share": done.waiting,
            "rank/tower_share": done.working,
        }
        if done.rate and self._todo:
            figures["rank/left_s"] = max(0, self._todo - done.images) / done.rate
        self._tracker.log(figures | self._totals, step=self._step + done.images)

    def finish(self) -> None:
        """Count once more, and put the last point on the charts."""
        self._counted = -math.inf
        self._bar.advance(0, **self._totals_now(time.monotonic()))
        self.log()

    def _totals_now(self, now: float) -> dict[str, float]:
        if self._tally is None or now - self._counted < _COUNT_S:
            return {}
        self._counted = now
        total = self._tally.total()
        for what, (shards, images) in self._tally.done().items():
            self._totals |= {f"{what}/shards": float(shards), f"{what}/images": float(images)}
            rate = (images - self._begin[what][1]) / (now - self._start)
            if rate > 0:
                self._totals[f"{what}/images_s"] = rate
                self._totals[f"{what}/left_s"] = (total[what] - images) / rate
        shown = ("set/images_s", "set/left_s")
        return {name: self._totals[name] for name in shown if name in self._totals}


@contextmanager
def reporting(
    config: Config,
    task: tuple[int, int],
    world: World,
    *,
    todo: int,
    done: EncodeStats,
    tally: Tally,
) -> Iterator[ProgressReporter]:
    """Show how far a rank is while the block runs.

    Args:
        config: Of the run.
        task: ``(i, n)``: the i-th of n shares, from 0.
        world: Ranks of this task; rank 0 draws the bar and tells the totals.
        todo: Images that this rank is to encode; 0 if nobody knows.
        done: What it has done so far.
        tally: Counts what is there.
    """
    folder, first = task_dir(config, task), world.rank == 0
    tracker = start_tracking(
        config,
        run_dir=folder,
        job_type="encode",
        name=f"{config.encoder.name}-encode-{task[0]}-of-{task[1]}",
        run_id=_run_id(folder) if first else None,
        rank=world.rank,
    )
    if first and tracker.run_id:
        publish_bytes(folder / _RUN_ID, tracker.run_id.encode())
    label = "encode" if world.size == 1 else f"encode, rank {world.rank}"
    try:
        with progress(todo or None, label=label, unit="images", bar=first) as bar:
            follower = ProgressReporter(todo, done, bar, tracker)
            if first:
                follower.count(tally)
            yield follower
            follower.finish()
    finally:
        tracker.finish()


def _run_id(folder: Path) -> str | None:
    """Return the id of the wandb run that an earlier attempt began."""
    path = folder / _RUN_ID
    return path.read_text() if path.is_file() else None
