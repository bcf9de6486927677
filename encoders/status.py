"""How far a feature set is, in all and by task: from the sidecars and the tasks' attempts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from configs.runtime.attempt import AttemptRecord, last_attempt
from encoders.frame_source import FrameSource, open_frame_source
from encoders.progress_report import encode_dir
from encoders.seal import missing_shards, sealed_as, wanted_plan
from sharding.assign import assign_shards
from sharding.format.names import array_list
from sharding.storage.open import open_storage

if TYPE_CHECKING:
    from configs.schema import Config

_TASK = re.compile(r"task-([0-9]+)-of-([1-9][0-9]*)")


@dataclass(frozen=True)
class Done:
    """How many of some shards are done."""

    shards: int
    of_shards: int
    images: int
    of_images: int

    def __str__(self) -> str:
        shards = f"shards {self.shards:,} of {self.of_shards:,}"
        return f"{shards}   images {self.images:,} of {self.of_images:,}"


@dataclass(frozen=True)
class TaskStatus:
    """How far one task is."""

    task: tuple[int, int]
    done: Done
    attempt: AttemptRecord

    def line(self, now: datetime) -> str:
        """Return it in one line."""
        attempt = self.attempt
        head = f"task {self.task[0]}/{self.task[1]}   {self.done}"
        tail = f"attempt {attempt.attempt} {attempt.outcome}   {attempt.host}"
        if attempt.outcome != "running":
            return "   ".join([head, tail, attempt.message]).rstrip()
        seconds = (now - datetime.fromisoformat(attempt.started)).total_seconds()
        return "   ".join([head, f"{tail}   since {seconds:.0f} s", *self._speed(seconds)])

    def _speed(self, seconds: float) -> Iterator[str]:
        made = self.done.images - (self.attempt.step or 0)
        if self.attempt.step is not None and made > 0 and seconds > 0:
            left = self.done.of_images - self.done.images
            yield f"{made / seconds:,.0f} images/s   {left * seconds / made:,.0f} s left"


@dataclass(frozen=True)
class SetStatus:
    """How far a set is."""

    location: str
    done: Done
    sealed: bool
    tasks: tuple[TaskStatus, ...]
    missing: tuple[int, ...]

    @property
    def is_complete(self) -> bool:
        """Return whether every shard is done and the set is sealed."""
        return self.sealed and not self.missing

    def lines(self) -> Iterator[str]:
        """Yield it in lines."""
        yield f"{self.location}   {self.done}   {'sealed' if self.sealed else 'not sealed'}"
        now = datetime.now(UTC)
        for task in self.tasks:
            yield task.line(now)
        if self.missing:
            yield f"missing: --array={array_list(self.missing)} and `run --only` its number"


def read_status(config: Config) -> SetStatus:
    """Look at what is there.

    Raises:
        DataError: there is no plan, or the frame set is another one than was planned.
    """
    features = open_storage(config.features_dir, config.storage)
    plan, frames = wanted_plan(features), open_frame_source(config)
    missing = missing_shards(features, plan, frames, replace=True)
    numbers = range(plan.n_shards)
    return SetStatus(
        location=features.location,
        done=_done(frames, numbers, missing),
        sealed=sealed_as(features, plan) is not None,
        tasks=tuple(_tasks(config, frames, missing)),
        missing=tuple(missing),
    )


def _done(frames: FrameSource, numbers: Sequence[int], missing: Sequence[int]) -> Done:
    images = frames.images
    there = set(numbers) - set(missing)
    return Done(
        shards=len(there),
        of_shards=len(numbers),
        images=sum(images[number] for number in there),
        of_images=sum(images[number] for number in numbers),
    )


def _tasks(config: Config, frames: FrameSource, missing: Sequence[int]) -> Iterator[TaskStatus]:
    """Yield the tasks that have left a trace, in order of their share."""
    folder = encode_dir(config)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = [match for name in names if (match := _TASK.fullmatch(name))]
    tasks = sorted((int(match[2]), int(match[1])) for match in found)
    for of, task in tasks:
        attempt = last_attempt(folder / f"task-{task}-of-{of}")
        if attempt is not None and task < of:
            done = _done(frames, assign_shards(frames.costs, of)[task], missing)
            yield TaskStatus((task, of), done, attempt)
