"""One command submits the chain: freeze, render, submit, record."""

from __future__ import annotations

import logging
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import ConfigError, DataError, MachineError
from configs.runtime.hints import hint
from configs.schema import Config
from slurm.chain import Job, plan_chain, waits_of
from slurm.client import RefusedError, Slurm
from slurm.freeze import Frozen, Submitted, freeze, label_of, next_folder, open_submission
from slurm.resources import expand
from slurm.script import Place, render
from slurm.steps import Step

logger = logging.getLogger(__name__)

_BODIES = Path(__file__).parent


@dataclass(frozen=True)
class Request:
    """What ``submit`` is asked for."""

    first: Step = "plan"
    only: Step | None = None
    grid: tuple[str, ...] = ()
    tasks: Mapping[str, Sequence[int]] | None = None
    """Of ``shard`` or ``encode``: the only tasks to run."""


def plan_jobs(config: Config, request: Request, *, max_array_size: int) -> tuple[Job, ...]:
    """Return the chain of a configuration; nothing is written or submitted."""
    return plan_chain(
        config.slurm,
        run_name=config.training.run_name,
        max_array_size=max_array_size,
        temporary_frames=config.encoder.frame_storage == "temporary",
        first=request.first,
        only=request.only,
        grid=request.grid,
        tasks=request.tasks,
    )


def dry_run(config: Config, request: Request, *, max_array_size: int) -> Iterator[str]:
    """Yield every script of a chain and what it waits for; nothing is written or submitted."""
    folder = config.run_dir.absolute() / "submit-N"
    place = _place(config, folder, label=f"{config.training.run_name}.N")
    for job in plan_jobs(config, request, max_array_size=max_array_size):
        head = ", ".join(filter(None, [job.name, waits_of(job.after_ok, job.after_any)]))
        yield f"# ---- {head} ----\n{render(job, _body(job.stage), place)}"


def start_submission(config: Config, jobs: Sequence[Job]) -> Frozen:
    """Freeze configuration, code and user files, and write the scripts; submit nothing yet.

    Raises:
        ConfigError: there is no job.
    """
    if not jobs:
        raise ConfigError("submit: no step is left to run; check --from and --only")
    folder = next_folder(config.run_dir)
    label = label_of(config, folder)
    place = _place(freeze(config, folder), folder, label=label)
    for job in jobs:
        (folder / f"{job.name}.sbatch").write_text(render(job, _body(job.stage), place))
    return Frozen(folder, label, tuple(_submitted(job) for job in jobs)).record()


def submit_jobs(frozen: Frozen, cluster: Slurm) -> Iterator[Submitted]:
    """Submit the jobs that have no id yet, in order; yield each.

    Raises:
        MachineError: Slurm refused one; those before it stay submitted, and the same call
            resumes there.
    """
    for job in frozen.jobs:
        if job.job_id is not None:
            continue
        ids = {other.name: other.job_id for other in frozen.jobs if other.job_id is not None}
        try:
            job_id = cluster.submit(
                frozen.folder / f"{job.name}.sbatch",
                name=f"{frozen.label}.{job.name}",
                after_ok=[ids[name] for name in job.after_ok],
                after_any=[ids[name] for name in job.after_any],
            )
        except RefusedError as error:
            done = ", ".join(f"{name} {number}" for name, number in ids.items()) or "nothing"
            raise MachineError(
                f"{error}; submitted so far: {done}; submit the rest with "
                f"{hint('movienet-slurm submit --continue')}"
            ) from None
        frozen = frozen.accepted(job.name, job_id)
        yield next(other for other in frozen.jobs if other.name == job.name)


def resume_submission(config: Config) -> Frozen:
    """Return the newest submission, some of whose jobs were refused.

    Raises:
        DataError: there is none, or all its jobs are submitted.
    """
    frozen = open_submission(config.run_dir)
    if all(job.job_id is not None for job in frozen.jobs):
        raise DataError(
            f"{frozen.folder}: all jobs are submitted; see {hint('movienet-slurm status')}"
        )
    return frozen


def missing_request(config: Config, config_args: Sequence[str]) -> Request:
    """Return a request for the tasks that are incomplete and all that follows them.

    Raises:
        MachineError: the state of a data set cannot be read.
    """
    steps: tuple[tuple[Step, str], ...] = (
        ("shard", "movienet-shard"),
        ("encode", "movienet-encode"),
    )
    for step, program in steps:
        if step == "shard" and config.encoder.frame_storage == "temporary":
            continue
        n_tasks = next(
            job.tasks
            for job in plan_jobs(config, Request(only=step), max_array_size=10**9)
            if job.step == step
        )
        tasks = _missing_tasks(program, n_tasks, config_args)
        if tasks is None and step == "shard":
            return Request()  # the plan too: it is cheap where it exists
        if tasks is None or tasks:
            return Request(first=step, tasks={str(step): tasks} if tasks else None)
    return Request(first="train")


def max_array_size(cluster: Slurm) -> int:
    """Return how many indices an array may have on this cluster."""
    return int(cluster.settings().get("MaxArraySize", "1001"))


def _missing_tasks(
    program: str, n_tasks: int, config_args: Sequence[str]
) -> tuple[int, ...] | None:
    """Return the incomplete tasks of a set; empty if it is sealed, None if it must start over.

    It starts over without a plan, and where it is complete but not sealed, which costs little.
    """
    command = [program, "status", "--tasks", str(n_tasks), *config_args]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise MachineError(f"{program}: not found; activate the environment of the jobs") from None
    if match := re.search(r"incomplete tasks of \d+: --array=([0-9,-]+)", done.stdout):
        return expand(match[1])
    if "not sealed" in done.stdout:
        return None
    if re.search(r"\bsealed\b", done.stdout):
        return ()
    if "no plan" in done.stderr:
        return None
    raise MachineError(f"{' '.join(command[:2])}: {done.stderr.strip() or done.stdout.strip()}")


def _place(config: Config, folder: Path, *, label: str) -> Place:
    return Place.of(config.slurm, folder=str(folder), cwd=str(Path.cwd()), label=label)


def _body(stage: str) -> str:
    return (_BODIES / f"{stage}.sbatch").read_text(encoding="utf-8")


def _submitted(job: Job) -> Submitted:
    return Submitted(
        name=job.name,
        stage=job.stage,
        step=job.step,
        tasks=job.tasks,
        array=job.array,
        offset=job.offset,
        after_ok=job.after_ok,
        after_any=job.after_any,
        overrides=job.overrides,
        data_set=job.data_set,
    )
