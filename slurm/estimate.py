"""How long each stage takes, from the plan of the full set and the rates of a small run."""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from configs.errors import DataError, MachineError
from configs.runtime.hints import hint
from configs.schema import Config
from configs.units import parse_bytes
from slurm.outcome import Life
from slurm.records import read_lives, record_dir
from slurm.resources import Resources, clock, resolve

_PLAN = re.compile(r"movies ([\d,]+)   images ([\d,]+|unknown)   bytes ([\d.]+ \w+)")

_UNITS = {"shard": "MB", "encode": "images", "train": "steps"}
"""What a stage counts; its records count sharding in bytes."""


@dataclass(frozen=True)
class PlanSize:
    """What a plan contains."""

    movies: int
    images: int | None
    """None for remote tars and videos, whose images are known once they are read."""

    n_bytes: int


@dataclass(frozen=True)
class Estimate:
    """One stage of the full set."""

    stage: str
    units: float
    """Megabytes, images or training steps."""

    rate: float
    """Units per second of one task."""

    tasks: int
    """Tasks that run at the same time."""

    time_s: int
    """Time limit of one life."""

    @property
    def seconds(self) -> float:
        """Return the time of the longest task, its waits in the queue not included."""
        return self.units / self.rate / self.tasks

    @property
    def lives(self) -> int:
        """Return how often the time limit is reached, plus one."""
        return max(1, math.ceil(self.seconds / self.time_s))

    def line(self) -> str:
        """Return it in one line."""
        unit = _UNITS[self.stage]
        lives = "1 life" if self.lives == 1 else f"{self.lives} lives"
        tasks = f" per task, {self.tasks} tasks" if self.stage != "train" else ""
        return (
            f"{self.stage:<7} {self.units:>12,.0f} {unit}   {self.rate:,.1f} {unit}/s{tasks}   "
            f"{clock(round(self.seconds))}   {lives} of {clock(self.time_s)}   "
            f"{self.seconds * self.tasks / 3600:,.1f} job hours"
        )


def rate_of(lives: Sequence[Life]) -> float | None:
    """Return the units per second that recorded lives made; None if none made any.

    ``step`` counts on from life to life, so that a life made what it added. A life after one whose
    end is unknown is left out as well: its count contains what the killed life made.
    """
    made = seconds = 0.0
    before, after_kill = 0, False
    for life in lives:
        if life.step is None or life.seconds is None:
            after_kill = True
            continue
        if not after_kill:
            made += max(0, life.step - before)
            seconds += life.seconds
        before, after_kill = max(before, life.step), False
    # Records count whole seconds: a run of less than one took about half of one.
    return made / max(seconds, 0.5) if made else None


def estimate(
    full: PlanSize, sample: PlanSize, lives: Mapping[str, Sequence[Sequence[Life]]], want: Resources
) -> Estimate | None:
    """Return the estimate of a stage; None without a measured rate.

    Args:
        full: Plan of the full set.
        sample: Plan of the small run.
        lives: By stage, the lives of each task of the small run.
        want: Resources of the stage.
    """
    rates = [rate for task in lives.get(want.stage, ()) if (rate := rate_of(task))]
    if not rates:
        return None
    units = _images(full, sample, lives)
    if want.stage == "shard":
        units, rates = full.n_bytes / 1e6, [rate / 1e6 for rate in rates]
    if want.stage == "train":
        last = [life.step for task in lives["train"] for life in task if life.step is not None]
        units = max(last) * full.movies / sample.movies
    rate = sum(rates) / len(rates)
    together = min(want.tasks, want.throttle or want.tasks)
    return Estimate(want.stage, units, rate, together, want.time_s)


def _images(
    full: PlanSize, sample: PlanSize, lives: Mapping[str, Sequence[Sequence[Life]]]
) -> float:
    """Return the images of the full set, in proportion to bytes where its plan lacks them."""
    if full.images is not None:
        return full.images
    last = [max((life.step or 0 for life in task), default=0) for task in lives.get("encode", ())]
    return sum(last) * full.n_bytes / sample.n_bytes


def read_estimate(config: Config, limit: int, config_words: Sequence[str]) -> Iterator[str]:
    """Yield one line per stage.

    Args:
        config: Of the full run.
        limit: ``data.limit`` of the small run.
        config_words: ``--config FILE [KEY=VALUE]...`` of the full run.

    Raises:
        DataError: one of the two plans, or every rate, is missing.
    """
    small = config.model_copy(update={"data": config.data.model_copy(update={"limit": limit})})
    full_size = _plan_size(config_words)
    small_size = _plan_size([*config_words, f"data.limit={limit}"])
    lives = {stage: _lives(small, stage) for stage in ("shard", "encode", "train")}
    shown = False
    for stage in ("shard", "encode", "train"):
        resources = resolve(config.slurm, stage)
        figures = estimate(full_size, small_size, lives, resources)
        shown = shown or figures is not None
        yield figures.line() if figures else f"{stage:<7} not measured"
    if not shown:
        raise DataError(
            f"{small.root}: nothing measured; first run "
            f"{hint('movienet-slurm submit', f'data.limit={limit}')}"
        )


def _lives(config: Config, stage: str) -> list[tuple[Life, ...]]:
    if stage == "train":
        return [read_lives(config.run_dir)]
    folder = record_dir(config, stage, (0, 1)).parent
    return [read_lives(path) for path in sorted(folder.glob("task-*-of-*"))]


def _plan_size(config_words: Sequence[str]) -> PlanSize:
    try:
        command = ["movienet-shard", "status", *config_words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise MachineError("movienet-shard: not found; activate its environment") from None
    match = _PLAN.search(done.stdout)
    if match is None:
        raise DataError(f"movienet-shard status: {done.stderr.strip() or 'prints no plan'}")
    images = None if match[2] == "unknown" else _number(match[2])
    return PlanSize(_number(match[1]), images, parse_bytes(match[3]))


def _number(text: str) -> int:
    return int(text.replace(",", ""))
