"""The text of a batch script: options and settings of one job before a committed body."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from slurm.chain import Job

if TYPE_CHECKING:
    from configs.schema_slurm import SlurmConfig

BODY_START = "set -u\n"
"""First line of a body after its own ``#SBATCH`` lines, which serve when it is run alone."""


@dataclass(frozen=True)
class Place:
    """Where a frozen chain is stored and runs. All paths are absolute."""

    folder: str
    """``RUN/submit-N``."""

    cwd: str
    """Working directory of the jobs."""

    label: str
    """Beginning of all job names, unique for each submit."""

    site: str
    """Site file, or empty."""

    prefix: str
    launch: str

    @classmethod
    def of(cls, config: SlurmConfig, *, folder: str, cwd: str, label: str) -> Self:
        """Return the place of the jobs of a configuration."""
        return cls(folder, cwd, label, config.site or "", config.prefix, config.launch)


def job_name(place: Place, job: Job) -> str:
    """Return the name of a job in the queue; no two jobs of a user share one."""
    return f"{place.label}.{job.name}"


def log_pattern(place: Place, job: Job) -> str:
    """Return the log file of a job; one file per array task."""
    index = "%A_%a" if job.array is not None else "%j"
    return f"{place.folder}/logs/{job.name}-{index}.out"


def render(job: Job, body: str, place: Place) -> str:
    """Return the batch script of a job.

    Args:
        job: The job.
        body: Text of the ``.sbatch`` file of its stage.
        place: Where it runs.

    Raises:
        ValueError: the body has no line ``set -u``.
    """
    _, start, rest = body.partition(BODY_START)
    if not start:
        raise ValueError(f"{job.stage}.sbatch: no line 'set -u'")
    head = ["#!/bin/bash", *(f"#SBATCH {option}" for option in _options(job, place))]
    return "\n".join([*head, *_settings(job, place), f"{start}{rest}"])


def _options(job: Job, place: Place) -> Iterator[str]:
    yield f"--job-name={job_name(place, job)}"
    yield from job.resources.options
    if job.array is not None:
        throttle = f"%{job.resources.throttle}" if job.resources.throttle else ""
        yield f"--array={job.array}{throttle}"
    yield f"--chdir={_unspaced(place.cwd)}"
    yield f"--output={_unspaced(log_pattern(place, job))}"
    yield "--open-mode=append"
    yield "--requeue"


def _settings(job: Job, place: Place) -> Iterator[str]:
    settings = {"SITE": place.site, "PREFIX": place.prefix, "CODE": f"{place.folder}/code"}
    if job.resources.signal:
        settings["SIGNAL"] = job.resources.signal
    if job.stage in ("encode", "train"):
        settings |= {"LAUNCH": place.launch, "RANKS": str(job.resources.ranks)}
    if job.array is not None:
        settings |= {"TASKS": str(job.tasks), "OFFSET": str(job.offset)}
    if job.stage == "gate":
        settings |= {"TASKS": str(job.tasks), "DATA_SET": job.data_set}
    for name, value in settings.items():
        yield f"{name}={shlex.quote(value)}"
    words = ["--config", f"{place.folder}/config.yaml", *job.overrides]
    yield f"set -- {' '.join(shlex.quote(word) for word in words)}"
    yield ""


def _unspaced(path: str) -> str:
    """Quote a path for an ``#SBATCH`` line, which sbatch splits at spaces."""
    return f'"{path}"' if " " in path else path
