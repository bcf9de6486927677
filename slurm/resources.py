"""Resources of each stage as sbatch options, and arrays that a cluster accepts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from configs.errors import ConfigError
from configs.schema_slurm import SlurmConfig, StageResources

Stage = Literal["plan", "shard", "encode", "train", "eval", "gate"]

STAGES: tuple[Stage, ...] = ("plan", "shard", "encode", "train", "eval", "gate")

DEFAULTS: dict[Stage, StageResources] = {
    "plan": StageResources(time="1h"),
    "shard": StageResources(time="4h", tasks=8, signal="USR1", lead="3min"),
    "encode": StageResources(time="4h", tasks=8, signal="USR1", lead="3min"),
    "train": StageResources(time="12h", signal="USR1", lead="5min"),
    "eval": StageResources(time="2h"),
    "gate": StageResources(time="1h"),
}
"""Values where the configuration has none."""

SIGNALLED: frozenset[Stage] = frozenset({"shard", "encode", "train"})
"""Stages that save and requeue themselves before the time limit."""

_CLOCK_S = 30
"""Slurm checks the time limits of jobs every 30 s, so that a signal may arrive this much early."""

_START_S = 60
"""Time a job needs to start: modules, container, imports, rendezvous."""

_OPTIONS = ("partition", "account", "qos", "gres", "constraint", "reservation", "exclude")


@dataclass(frozen=True)
class Resources:
    """Resources of one stage, with every default filled in."""

    stage: Stage
    options: tuple[str, ...]
    """Options of sbatch, in a fixed order."""

    nodes: int
    ranks: int
    """Per node."""

    tasks: int
    """Tasks of the stage; 1 where it has no array."""

    throttle: int | None
    time_s: int
    lead_s: int
    """Seconds before the time limit at which the job is asked to save; 0: never."""

    signal: str
    """Signal that asks it; empty where none is sent."""

    @property
    def world_size(self) -> int:
        """Return the number of ranks of one task or job."""
        return self.nodes * self.ranks


def resolve(config: SlurmConfig, stage: Stage) -> Resources:
    """Return the resources of a stage.

    Raises:
        ConfigError: the signal would arrive before the job has started to work.
    """
    merged = _merged(config, stage)
    signalled = stage in SIGNALLED
    nodes = (merged.nodes or 1) if stage == "train" else 1
    ranks = (merged.ranks or 1) if stage in ("encode", "train") else 1
    lead_s = merged.lead if signalled and merged.lead else 0
    time_s = merged.time or 0
    if signalled and time_s < lead_s + _CLOCK_S + _START_S:
        raise ConfigError(
            f"slurm.{stage}.time: got {clock(time_s)}, but the signal to save arrives "
            f"{lead_s + _CLOCK_S} s before the end (slurm.{stage}.lead {lead_s} s, and Slurm may "
            f"be {_CLOCK_S} s early) and the start takes about {_START_S} s; want at least "
            f"{clock(lead_s + _CLOCK_S + _START_S)}"
        )
    return Resources(
        stage=stage,
        options=tuple(_options(merged, nodes, ranks, time_s, lead_s)),
        nodes=nodes,
        ranks=ranks,
        tasks=(merged.tasks or 1) if stage in ("shard", "encode") else 1,
        throttle=merged.throttle,
        time_s=time_s,
        lead_s=lead_s,
        signal=str(merged.signal) if lead_s else "",
    )


def clock(seconds: int) -> str:
    """Return a duration as Slurm writes it: ``1-02:03:04`` or ``02:03:04``."""
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    day, hour = divmod(hours, 24)
    return (f"{day}-" if day else "") + f"{hour:02d}:{minute:02d}:{second:02d}"


def split_array(tasks: Sequence[int], max_array_size: int) -> tuple[tuple[int, str], ...]:
    """Return arrays that cover ``tasks``, each within what the cluster accepts.

    Args:
        tasks: Task numbers, ascending, each once.
        max_array_size: ``MaxArraySize`` of the cluster. The largest index is one below it.

    Returns:
        Pairs of offset and index list: task number = offset + array index.
    """
    groups: dict[int, list[int]] = {}
    for task in tasks:
        groups.setdefault(task // max_array_size, []).append(task % max_array_size)
    return tuple((group * max_array_size, ranges(indices)) for group, indices in groups.items())


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as Slurm lists them: ``0-3,7``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def expand(text: str) -> tuple[int, ...]:
    """Return the numbers of a list such as ``0-3,7``."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers.extend(range(int(first), int(last or first) + 1))
    return tuple(numbers)


def _merged(config: SlurmConfig, stage: Stage) -> StageResources:
    """Merge built-in defaults, keys of the section and keys of the stage; the last one applies."""
    own: StageResources = getattr(config, stage)
    merged: dict[str, Any] = {}
    for layer in (DEFAULTS[stage], config, own):
        for name in StageResources.model_fields:
            value = getattr(layer, name)
            if value is not None:
                merged[name] = value
    return StageResources.model_construct(None, **merged)


def _options(
    merged: StageResources, nodes: int, ranks: int, time_s: int, lead_s: int
) -> Iterator[str]:
    for name in _OPTIONS:
        if value := getattr(merged, name):
            yield f"--{name}={value}"
    yield f"--nodes={nodes}"
    yield f"--ntasks-per-node={ranks}"
    if merged.cpus:
        yield f"--cpus-per-task={merged.cpus}"
    if merged.mem:
        yield f"--mem={merged.mem}"
    yield f"--time={clock(time_s)}"
    if lead_s:
        yield f"--signal=B:{merged.signal}@{lead_s}"
    if merged.mail:
        yield from (f"--mail-user={merged.mail}", "--mail-type=END,FAIL")
    yield from merged.extra or ()
