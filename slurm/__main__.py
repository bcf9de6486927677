"""Commands of the package: the chain of stages on a Slurm cluster."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from configs.runtime.cli import CommandGroup, echo, run
from configs.runtime.hints import hint
from slurm.steps import STEPS

if TYPE_CHECKING:
    from configs.schema import Config
    from slurm.client import Slurm
    from slurm.freeze import Frozen
    from slurm.steps import Step
    from slurm.submit import Request

commands = CommandGroup("movienet-slurm", "Submit the chain of stages to Slurm, and look after it.")

_step = click.Choice(STEPS)


@commands.command()
@click.option("--from", "first", type=_step, default="plan", help="Begin with this step.")
@click.option("--only", type=_step, help="Submit this step alone.")
@click.option("--grid", multiple=True, metavar="KEY=V1,V2", help="One training run per value.")
@click.option("--resubmit-missing", is_flag=True, help="Run incomplete tasks again, then the rest.")
@click.option("--continue", "resume", is_flag=True, help="Submit the jobs that Slurm refused.")
@click.option("--dry-run", is_flag=True, help="Print the scripts, submit nothing.")
def submit(
    config: Config,
    first: Step,
    only: Step | None,
    grid: tuple[str, ...],
    *,
    resubmit_missing: bool,
    resume: bool,
    dry_run: bool,
) -> None:
    """Freeze configuration and code, and submit the chain."""
    from slurm import submit as chain
    from slurm.client import Slurm
    from slurm.doctor import check_before_submit

    cluster = Slurm()
    request = chain.Request(first=first, only=only, grid=grid)
    if resubmit_missing:
        request = _missing(config, request)
    size = chain.max_array_size(cluster)
    if dry_run:
        for text in chain.dry_run(config, request, max_array_size=size):
            echo(text)
        return
    if resume:
        frozen = chain.resume_submission(config)
    else:
        jobs = chain.plan_jobs(config, request, max_array_size=size)
        check_before_submit(config, cluster, {job.stage for job in jobs})
        frozen = chain.start_submission(config, jobs)
    _submit(frozen, cluster)


def _missing(config: Config, request: Request) -> Request:
    from dataclasses import replace

    from slurm.submit import missing_request

    context = click.get_current_context()
    words = ["--config", str(context.params["config_path"]), *context.params["overrides"]]
    return replace(missing_request(config, words), only=request.only, grid=request.grid)


def _submit(frozen: Frozen, cluster: Slurm) -> None:
    from slurm.chain import waits_of
    from slurm.submit import submit_jobs

    for job in submit_jobs(frozen, cluster):
        tasks = f"   tasks {job.array}" if job.array else ""
        offset = f" + {job.offset}" if job.offset else ""
        waits = waits_of(job.after_ok, job.after_any)
        echo(f"{job.job_id}   {job.name}{tasks}{offset}   {waits}".rstrip())
    echo(f"submitted {frozen.folder}; next: {hint('movienet-slurm status')}")


@commands.command()
def status(config: Config) -> int:
    """Show the newest submission.

    Exit code: 0 if everything is complete, 1 if not.
    """
    from slurm.client import Slurm
    from slurm.status import read_status

    chain = read_status(config, Slurm())
    for line in chain.lines():
        echo(line)
    return 0 if chain.complete else 1


@commands.command()
def cancel(config: Config) -> None:
    """Cancel the newest submission, from the end of its chain to its start."""
    from slurm.client import Slurm
    from slurm.freeze import open_submission

    cluster = Slurm()
    for job in reversed(open_submission(config.run_dir).jobs):
        if job.job_id is not None:
            cluster.cancel(job.job_id)
            echo(f"cancelled {job.job_id}   {job.name}")


@commands.command(example="--stage train --life TOKEN")
@click.option(
    "--stage",
    type=click.Choice(["shard", "encode", "train"]),
    required=True,
    help="Stage of the job that ended.",
)
@click.option("--task", default="0/1", metavar="I/N", help="The I-th of N tasks, from 0.")
@click.option("--received", default="", help="Signals that the batch script received: TERM, USR1.")
@click.option("--life", envvar="MOVIENET_LIFE", required=True, help="Token of the life that ended.")
def outcome(config: Config, stage: str, task: str, received: str, life: str) -> int:
    """Decide what a batch script does after one life of its job.

    Reads what `scontrol -o show job` prints from stdin.

    Exit code: 0 if done, 75 to requeue, 1 if failed.
    """
    from slurm.outcome import decide, parse_facts
    from slurm.records import failure_in, read_lives, record_dir

    index, _, count = task.partition("/")
    facts = parse_facts("" if sys.stdin.isatty() else sys.stdin.read())
    verdict = decide(
        read_lives(record_dir(config, stage, (int(index), int(count)))),
        life,
        received=frozenset(received.split()),
        facts=facts,
        error=failure_in(facts.log, life),
    )
    echo(f"{verdict.decision}: {verdict.reason}".removesuffix(": "))
    return {"done": 0, "requeue": 75, "failed": 1}[verdict.decision]


@commands.command(hidden=True)
def trained(config: Config) -> None:
    """Refuse to go on before training is done: to Slurm a forgotten job counts as a success."""
    from configs.errors import DataError
    from slurm.records import read_lives

    lives = read_lives(config.run_dir)
    if not any(life.outcome == "done" for life in lives):
        last = lives[-1].outcome if lives else "not begun"
        raise DataError(
            f"{config.run_dir}: training is {last}, want done; run "
            f"{hint('movienet-slurm submit --from train')}"
        )


@commands.command()
@click.option("--patience", default="15min", show_default=True, help="Longest wait for a job.")
@click.option("--cheap", is_flag=True, help="Only what the login node shows, without a job.")
def doctor(config: Config, patience: str, *, cheap: bool) -> int:
    """Find out whether this site can run the chain: one row per finding, with its remedy."""
    from configs.units import parse_seconds
    from slurm.client import Slurm
    from slurm.doctor import cheap_rows, examine

    if cheap:
        rows = list(cheap_rows(config, Slurm()))
        for row in rows:
            echo(row.line())
        return int(any(row.level == "fail" for row in rows))
    patience_s = parse_seconds(patience)
    good = examine(config, Slurm(), patience_s=patience_s, on_row=lambda row: echo(row.line()))
    return 0 if good else 1


@commands.command()
@click.option("--sample", default=20, show_default=True, help="data.limit of the measured run.")
def estimate(config: Config, sample: int) -> None:
    """Estimate hours and lives of each stage, from the plan and the rates of a small run."""
    from slurm.estimate import read_estimate

    context = click.get_current_context()
    words = ["--config", str(context.params["config_path"]), *context.params["overrides"]]
    for line in read_estimate(config, sample, words):
        echo(line)


@commands.command(hidden=True, example="--rows FILE")
@click.option("--rows", required=True, metavar="FILE", help="Where findings are appended.")
def probe(config: Config, rows: str) -> None:
    """Look at the node of a probe job; `doctor` starts it."""
    import os
    from pathlib import Path

    from slurm.doctor import line_of
    from slurm.probe import gather_first, node_rows

    context = click.get_current_context()
    os.environ["MOVIENET_CONFIG"] = str(context.params["config_path"])
    nodes = int(os.environ.get("SLURM_NNODES", "1"))
    needs_gpu = bool(os.environ.get("SLURM_JOB_GPUS") or os.environ.get("SLURM_STEP_GPUS"))
    findings = list(node_rows(config, nodes=nodes, needs_gpu=needs_gpu))
    text = [
        line_of(row) for row in gather_first(findings, int(os.environ.get("SLURM_NODEID", "0")))
    ]
    with Path(rows).open("a", encoding="utf-8") as file:
        file.write("\n".join([*text, ""]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    return run(commands, argv)


if __name__ == "__main__":
    sys.exit(main())
