"""The ``slurm`` section: resources of each stage on a cluster."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    model_validator,
)

from configs.section import PositiveInt, Section
from configs.units import parse_seconds

_SLURM_TIME = re.compile(r"(?:(\d+)-)?(\d+):(\d{2})(?::(\d{2}))?")

_OWN_OPTIONS = (
    *("array", "chdir", "dependency", "error", "job-name", "kill-on-invalid-dep", "no-requeue"),
    *("ntasks", "ntasks-per-node", "open-mode", "output", "parsable", "requeue", "signal", "wrap"),
)
"""Options of sbatch that the chain depends on."""


def parse_walltime(value: object) -> int:
    """Return seconds from ``"90min"``, ``"4h"``, or Slurm's own ``"1-12:00:00"``.

    Raises:
        ValueError: not a duration, or a bare number: minutes to Slurm, seconds elsewhere here.
    """
    if not isinstance(value, str) or value.strip().isdecimal():
        raise ValueError(f"got {value!r}, want a duration with its unit: 90min, 4h or '1-12:00:00'")
    if match := _SLURM_TIME.fullmatch(value.strip()):
        days, first, second, third = (int(part) if part else None for part in match.groups())
        if days is not None:  # D-HH:MM[:SS]
            return days * 86400 + (first or 0) * 3600 + (second or 0) * 60 + (third or 0)
        if third is not None:  # HH:MM:SS
            return (first or 0) * 3600 + (second or 0) * 60 + third
        return (first or 0) * 60 + (second or 0)  # MM:SS
    return int(parse_seconds(value))


def _checked_extra(options: tuple[str, ...] | None) -> tuple[str, ...] | None:
    for option in options or ():
        name = option.removeprefix("--").partition("=")[0]
        if not option.startswith("--"):
            raise ValueError(f"got {option!r}, want long options of sbatch: --comment=films")
        if name in _OWN_OPTIONS:
            raise ValueError(f"got --{name}, which the chain sets itself")
    return options


Walltime = Annotated[
    int, BeforeValidator(parse_walltime), PlainSerializer(lambda seconds: f"{seconds}s")
]
"""Whole seconds; YAML may contain ``4h`` or ``'1-12:00:00'``."""

Memory = Annotated[str, Field(pattern=r"^[0-9]+[KMGT]?$")]
"""Memory in Slurm's notation, e.g. ``64G``; ``0`` is all memory of the node."""


class StageResources(Section):
    """Resources of one stage. A key that is left out takes the value of the ``slurm`` section."""

    partition: str | None = None
    """Partition, or several separated by commas."""

    account: str | None = None
    """Account that is charged."""

    qos: str | None = None
    """Quality of service."""

    gres: str | None = None
    """Generic resources per node, e.g. ``gpu:4``."""

    constraint: str | None = None
    """Node features, e.g. ``a100``."""

    reservation: str | None = None
    """Reservation."""

    exclude: str | None = None
    """Nodes to avoid, e.g. ``node[07,12]``."""

    nodes: PositiveInt | None = None
    """Nodes of the training job. Other stages use one node per task."""

    ranks: PositiveInt | None = None
    """Ranks per node in ``encode`` and ``train``, usually one per GPU."""

    cpus: PositiveInt | None = None
    """CPUs per rank."""

    mem: Memory | None = None
    """Memory per node, e.g. ``64G``; ``0`` is all memory of the node."""

    time: Walltime | None = None
    """Time limit of one life of the job. A job of ``shard``, ``encode`` or ``train`` that reaches
    it saves, is requeued and resumes; others fail."""

    signal: Literal["USR1", "USR2"] | None = None
    """Signal on which a job saves before its time limit."""

    lead: Walltime | None = None
    """How long before the time limit the signal is sent: the time of a save plus 60 s. Slurm may
    send it 30 s earlier or later."""

    mail: str | None = None
    """Address that receives a mail when a job of this stage ends or fails."""

    tasks: PositiveInt | None = None
    """Array tasks of ``shard`` and ``encode``; some may be left without work."""

    throttle: PositiveInt | None = None
    """Array tasks that run at the same time; default: as many as the cluster starts."""

    extra: Annotated[tuple[str, ...] | None, AfterValidator(_checked_extra)] = None
    """Further options of sbatch, e.g. ``["--comment=films", "--licenses=scratch"]``."""


class SlurmConfig(StageResources):
    """How the stages run on a Slurm cluster. Resources given here are the default of all stages."""

    launch: Literal["accelerate", "srun"] = "accelerate"
    """How ranks start: one ``accelerate launch`` per node, or ``srun`` with one task per rank."""

    site: str | None = None
    """Shell file that each job sources: modules, environment, NCCL settings, scratch. Start from
    ``slurm/site.example.sh``."""

    prefix: str = ""
    """Command before each of our commands, e.g. ``apptainer exec --nv image.sif``. Slurm's own
    commands run outside it."""

    plan: StageResources = StageResources()
    """Scan of the dump."""

    shard: StageResources = StageResources()
    """Array that builds frame shards."""

    encode: StageResources = StageResources()
    """Array that encodes frame shards."""

    train: StageResources = StageResources()
    """Training."""

    eval: StageResources = StageResources()
    """Report."""

    gate: StageResources = StageResources()
    """Checks after the arrays."""

    @model_validator(mode="after")
    def _nodes_only_where_they_count(self) -> Self:
        for stage in ("plan", "shard", "encode", "eval", "gate"):
            resources: StageResources = getattr(self, stage)
            nodes, ranks = resources.nodes or 1, resources.ranks or 1
            if nodes > 1:
                raise ValueError(
                    f"slurm.{stage}.nodes: got {nodes}, want 1: only train spans nodes"
                )
            if ranks > 1 and stage != "encode":
                raise ValueError(
                    f"slurm.{stage}.ranks: got {ranks}, want 1: only encode and train have ranks"
                )
        return self
