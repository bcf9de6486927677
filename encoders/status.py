"""Progress of a feature set, in total and per task, from its sidecars and attempt records."""

from __future__ import annotations

import logging
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from configs.errors import DataError
from configs.runtime.attempt import AttemptRecord, last_attempt, tasks_dir
from configs.runtime.hints import hint
from configs.units import format_seconds
from encoders.frame_source import FrameSource, open_frame_source
from encoders.seal import missing_shards, sealed_as, wanted_plan
from sharding.assign import assign_shards, incomplete_tasks
from sharding.format.names import MANIFEST, array_list
from sharding.format.names import PLAN as FRAME_PLAN
from sharding.shard import read_sidecar
from sharding.storage.open import open_storage

if TYPE_CHECKING:
    from configs.schema import Config
    from encoders.encode_plan import EncodePlan
    from sharding.storage.base import Storage

logger = logging.getLogger(__name__)

_TASK = re.compile(r"task-([0-9]+)-of-([1-9][0-9]*)")

_COLUMNS = 80
_INDENT = 4 * " "


@dataclass(frozen=True)
class Done:
    """Completed shards and images out of a number of shards."""

    shards: int
    of_shards: int
    images: int
    of_images: int

    def cells(self) -> tuple[str, str, str]:
        """Return shards, images and percentage as cells of the table."""
        # Without known images, as for tars read by ranges, the shards give the percentage.
        done, total = (
            (self.images, self.of_images) if self.of_images else (self.shards, self.of_shards)
        )
        return (
            f"{self.shards:,}/{self.of_shards:,}",
            f"{self.images:,}/{self.of_images:,}" if self.of_images else "-",
            f"{100 * done // total}%" if total else "-",
        )


@dataclass(frozen=True)
class TaskStatus:
    """Progress and newest attempt of one task."""

    task: tuple[int, int]
    done: Done
    attempt: AttemptRecord | None
    """None if its record cannot be read."""

    problem: str = ""

    @property
    def outcome(self) -> str:
        """Outcome of the attempt; ``unknown`` if its record cannot be read."""
        return self.attempt.outcome if self.attempt else "unknown"

    def detail(self, now: datetime) -> str:
        """Return where and since when the newest attempt runs, or why it ended; one line."""
        attempt = self.attempt
        if attempt is None:
            return self.problem
        head = f"attempt {attempt.attempt} on {attempt.host}"
        if attempt.outcome != "running":
            return f"{head}: {attempt.message}" if attempt.message else head
        seconds = (now - datetime.fromisoformat(attempt.started)).total_seconds()
        return ", ".join(
            [f"{head} for {format_seconds(seconds)}", *self._speed(attempt.step, seconds)]
        )

    def _speed(self, step: int | None, seconds: float) -> Iterator[str]:
        encoded = self.done.images - (step or 0)
        if step is not None and encoded > 0 and seconds > 0:
            left = self.done.of_images - self.done.images
            yield f"{encoded / seconds:,.0f} images/s"
            yield f"{format_seconds(left * seconds / encoded)} left"


@dataclass(frozen=True)
class SetStatus:
    """Progress of a feature set and its tasks."""

    location: str
    done: Done
    sealed: bool
    tasks: tuple[TaskStatus, ...]
    missing: tuple[int, ...]
    costs: tuple[int, ...] = ()
    """Of each shard, by which tasks are assigned."""

    def incomplete_tasks(self, tasks: int) -> tuple[int, ...]:
        """Return those of N tasks that have a missing shard."""
        return incomplete_tasks(self.costs, tasks, self.missing)

    @property
    def is_complete(self) -> bool:
        """Return whether every shard is done and the set is sealed."""
        return self.sealed and not self.missing

    def lines(self) -> Iterator[str]:
        """Yield the report as lines for a terminal of 80 columns."""
        yield f"{self.location}: {'sealed' if self.sealed else 'not sealed'}"
        yield from self._table()
        if self.missing:
            yield f"missing shards: {array_list(self.missing)}"
            yield f"next: {hint('movienet-encode run')}"
            yield f"or as a Slurm array, --array={array_list(self.missing)}:"
            yield f"{_INDENT}{hint('movienet-encode run --only $SLURM_ARRAY_TASK_ID')}"
        elif not self.sealed:
            yield f"next: {hint('movienet-encode seal')}"

    def _table(self) -> Iterator[str]:
        """Yield the rows of set and tasks; details of an attempt follow its row, indented."""
        now = datetime.now(UTC)
        rows = [("", "shards", "images", "done", ""), ("set", *self.done.cells(), "")]
        details = ["", ""]
        for one in self.tasks:
            name = f"task {one.task[0]}/{one.task[1]}"
            rows.append((name, *one.done.cells(), one.outcome))
            details.append("" if one.outcome == "done" else one.detail(now))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for (name, *figures, outcome), detail in zip(rows, details, strict=True):
            cells = [text.rjust(width) for text, width in zip(figures, widths[1:], strict=False)]
            yield "   ".join([name.ljust(widths[0]), *cells, outcome]).rstrip()
            yield from textwrap.wrap(
                detail, _COLUMNS, initial_indent=_INDENT, subsequent_indent=_INDENT
            )


def read_status(config: Config) -> SetStatus:
    """Read the sidecars of a feature set and the attempt records of its tasks.

    Raises:
        DataError: there is no plan, or the frame set is not the planned one.
    """
    features = open_storage(config.features_dir, config.storage)
    plan = wanted_plan(features)
    if _needs_no_frames(config, features, plan):
        done = Done(plan.n_shards, plan.n_shards, 0, 0)
        return SetStatus(features.location, done, sealed=True, tasks=(), missing=())
    frames = open_frame_source(config)
    # One read per shard, which takes a while on an object store.
    logger.info("reading the sidecars of %d feature shards", plan.n_shards)
    missing = missing_shards(features, plan, frames, replace=True)
    numbers = range(plan.n_shards)
    return SetStatus(
        location=features.location,
        done=_done(frames, numbers, missing),
        sealed=sealed_as(features, plan) is not None,
        tasks=tuple(_tasks(config, frames, missing)),
        missing=tuple(missing),
        costs=tuple(frames.costs),
    )


def _needs_no_frames(config: Config, features: Storage, plan: EncodePlan) -> bool:
    """Return whether a set is complete, and its frame shards were deleted to save space."""
    if config.encoder.frame_storage == "temporary":
        return False
    frames = open_storage(config.frames_url, config.storage)
    # `movienet-shard plan` removes the manifest too: a plan alone means shards yet to be built.
    if any(frames.size(name) is not None for name in (MANIFEST, FRAME_PLAN)):
        return False
    shards = (read_sidecar(features, "features", number) for number in range(plan.n_shards))
    return sealed_as(features, plan) is not None and all(shards)


def _done(frames: FrameSource, numbers: Sequence[int], missing: Sequence[int]) -> Done:
    images = frames.images
    completed = set(numbers) - set(missing)
    return Done(
        shards=len(completed),
        of_shards=len(numbers),
        images=sum(images[number] for number in completed),
        of_images=sum(images[number] for number in numbers),
    )


def _tasks(config: Config, frames: FrameSource, missing: Sequence[int]) -> Iterator[TaskStatus]:
    """Yield the tasks that have an attempt record, ordered by number of tasks, then by task."""
    folder = tasks_dir(config, "encode")
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    matches = [match for name in names if (match := _TASK.fullmatch(name))]
    tasks = sorted((int(match[2]), int(match[1])) for match in matches)
    for of, task in tasks:
        problem = ""
        try:
            attempt = last_attempt(folder / f"task-{task}-of-{of}")
        except DataError as error:
            attempt, problem = None, str(error)
        if (attempt or problem) and task < of:
            done = _done(frames, assign_shards(frames.costs, of)[task], missing)
            yield TaskStatus((task, of), done, attempt, problem)
