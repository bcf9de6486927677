"""The graph of jobs that takes a dump to a report.

    plan -> shard (array) -> gate frames -> encode (array) -> gate features -> train -> eval

Jobs that need data wait with ``afterok``. A gate waits for its array with ``afterany``: it seals
the set, or names the tasks that are missing and fails, which cancels everything after it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from configs.errors import ConfigError
from configs.schema_slurm import SlurmConfig
from slurm.resources import Resources, Stage, resolve, split_array
from slurm.steps import STEPS, Step

_DATA_SETS: dict[str, str] = {"shard": "frames", "encode": "features"}


@dataclass(frozen=True)
class Job:
    """One job or job array of the chain."""

    name: str
    """Unique in the chain, e.g. ``shard``, ``shard-101``, ``gate-frames``, ``train-seed-1``."""

    stage: Stage
    """Which body it runs."""

    step: Step
    resources: Resources
    array: str | None = None
    """Index list of an array, without the throttle."""

    offset: int = 0
    """Task number = offset + array index."""

    data_set: str = ""
    """Of a gate: ``frames`` or ``features``."""

    after_ok: tuple[str, ...] = ()
    """Jobs that must end well before it starts."""

    after_any: tuple[str, ...] = ()
    """Jobs that must end, well or not."""

    overrides: tuple[str, ...] = ()
    """Assignments after the configuration, e.g. ``training.seed=1``."""

    @property
    def tasks(self) -> int:
        """Return the tasks that the stage is divided into, however many this job runs."""
        return self.resources.tasks


@dataclass(frozen=True)
class Point:
    """One point of a grid: a training run of its own."""

    suffix: str
    overrides: tuple[str, ...]


def plan_chain(
    config: SlurmConfig,
    *,
    run_name: str,
    max_array_size: int,
    temporary_frames: bool = False,
    first: Step = "plan",
    only: Step | None = None,
    grid: Sequence[str] = (),
    tasks: Mapping[str, Sequence[int]] | None = None,
) -> tuple[Job, ...]:
    """Return the jobs of a chain, each after all that it waits for.

    Args:
        config: The ``slurm`` section.
        run_name: ``training.run_name``; a grid appends to it.
        max_array_size: ``MaxArraySize`` of the cluster.
        temporary_frames: Whether frames are built while encoding, which leaves out ``shard``.
        first: Step to begin with.
        only: The only step.
        grid: ``KEY=V1,V2`` each: one training run per combination.
        tasks: Of ``shard`` or ``encode``: the only tasks to run.

    Raises:
        ConfigError: a grid is no assignment, or a time limit is too short.
    """
    steps = [step for step in STEPS if _chosen(step, first, only)]
    if temporary_frames:
        steps = [step for step in steps if step != "shard"]
    jobs: list[Job] = []
    before: tuple[str, ...] = ()
    if "plan" in steps:
        jobs.append(Job("plan", "plan", "plan", resolve(config, "plan")))
        before = ("plan",)
    for step in ("shard", "encode"):
        if step in steps:
            added = tuple(_array_and_gate(config, step, before, max_array_size, tasks or {}))
            jobs += added
            before = (added[-1].name,)
    for point in grid_points(grid, run_name):
        jobs += _train_and_eval(config, steps, point, before)
    return tuple(jobs)


def grid_points(grid: Sequence[str], run_name: str) -> tuple[Point, ...]:
    """Return one point per combination of ``KEY=V1,V2`` lists; one without a grid.

    Raises:
        ConfigError: an entry is no ``KEY=V1,V2``, or assigns the run's name.
    """
    axes: list[tuple[str, list[str]]] = []
    for entry in grid:
        key, _, values = entry.partition("=")
        if not key or not values or key == "training.run_name":
            raise ConfigError(f"--grid: got {entry!r}, want KEY=V1,V2, e.g. training.seed=0,1,2")
        axes.append((key, values.split(",")))
    points = []
    for chosen in itertools.product(*(values for _, values in axes)):
        pairs = list(zip((key for key, _ in axes), chosen, strict=True))
        suffix = "".join(f"-{_short(key)}-{_clean(value)}" for key, value in pairs)
        overrides = tuple(f"{key}={value}" for key, value in pairs)
        if overrides:
            overrides += (f"training.run_name={run_name}{suffix}",)
        points.append(Point(suffix, overrides))
    if len({point.suffix for point in points}) < len(points):
        raise ConfigError(f"--grid: got {' '.join(grid)}, want each value once")
    return tuple(points)


def _chosen(step: str, first: str, only: str | None) -> bool:
    return step == only if only else STEPS.index(step) >= STEPS.index(first)


def _array_and_gate(
    config: SlurmConfig,
    step: Literal["shard", "encode"],
    before: tuple[str, ...],
    max_array_size: int,
    tasks: Mapping[str, Sequence[int]],
) -> Iterator[Job]:
    resources = resolve(config, step)
    numbers = tasks.get(step, range(resources.tasks))
    names = []
    for offset, indices in split_array(numbers, max_array_size):
        name = f"{step}-{offset}" if offset else step
        names.append(name)
        yield Job(name, step, step, resources, array=indices, offset=offset, after_ok=before)
    gate = resolve(config, "gate")
    yield Job(
        f"gate-{_DATA_SETS[step]}",
        *("gate", step),
        replace(gate, tasks=resources.tasks),
        data_set=_DATA_SETS[step],
        # Where the array was cancelled with what it waits for, its gate must not run.
        after_ok=before,
        after_any=tuple(names),
    )


def _train_and_eval(
    config: SlurmConfig, steps: Sequence[str], point: Point, before: tuple[str, ...]
) -> Iterator[Job]:
    for step in ("train", "eval"):
        if step in steps:
            yield Job(
                f"{step}{point.suffix}",
                *(step, step),
                resolve(config, step),
                after_ok=before,
                overrides=point.overrides,
            )
            before = (f"{step}{point.suffix}",)


def _short(key: str) -> str:
    return key.rpartition(".")[2]


def _clean(value: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._" else "_" for letter in value)


def waits_of(after_ok: Sequence[str], after_any: Sequence[str]) -> str:
    """Return what a job waits for, for people: ``afterok plan, afterany shard``."""
    pairs = (("afterok", after_ok), ("afterany", after_any))
    return ", ".join(f"{condition} {' '.join(names)}" for condition, names in pairs if names)
