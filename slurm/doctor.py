"""Whether a site can run the chain: rows of findings, each with its remedy.

The cheap half looks from the login node, and ``submit`` runs it too. The other half is one short
job per partition, on two nodes where training spans nodes (``slurm.probe``).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from configs.corrupt import report_corrupt
from configs.errors import ConfigError, MachineError
from configs.runtime.publish import publish_bytes
from configs.schema import Config
from configs.schema_slurm import parse_walltime
from slurm.chain import Job
from slurm.client import Partition, Slurm
from slurm.findings import Level, Row, look_at_folder
from slurm.freeze import freeze
from slurm.resources import SIGNALLED, STAGES, Resources, Stage, clock, resolve
from slurm.script import Place, render

_TIME_S = 600
"""Time limit of a probe job."""

_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE")


def check_before_submit(config: Config, cluster: Slurm, stages: Collection[Stage]) -> None:
    """Run the cheap half for some stages; refuse at the first finding that would stop the chain.

    Raises:
        ConfigError: a row failed.
    """
    for row in cheap_rows(config, cluster, stages):
        if row.level == "fail":
            raise ConfigError(f"{row.check}: {row.detail}; {row.remedy}")


def cheap_rows(config: Config, cluster: Slurm, stages: Collection[Stage] = STAGES) -> Iterator[Row]:
    """Yield what can be seen from the login node within seconds."""
    partitions = cluster.partitions()
    for stage in STAGES:
        if stage not in stages:
            continue
        yield from _partition_rows(resolve(config.slurm, stage), partitions)
    for node, state, reason in cluster.lost_nodes():
        remedy = f"ask the administrator, or set slurm.exclude: {node}"
        yield Row("nodes", "warn", f"{node} is {state} ({reason})", remedy)
    for folder in (config.run_dir.parent, *_local(config.root)):
        yield from look_at_folder("runs" if folder == config.run_dir.parent else "root", folder)


def _local(root: str) -> tuple[Path, ...]:
    return () if "://" in root else (Path(root),)


def _partition_rows(resources: Resources, partitions: dict[str, Partition]) -> Iterator[Row]:
    key = f"slurm.{resources.stage}"
    names = partition_of(resources)
    for name in names.split(",") if names else [_default_of(partitions)]:
        partition = partitions.get(name)
        if partition is None:
            names_of_cluster = ", ".join(sorted(partitions))
            yield Row(
                f"{key}.partition",
                "fail",
                f"no partition {name!r}",
                f"partitions: {names_of_cluster}",
            )
        elif partition.state != "up":
            level: Level = "warn" if partition.state == "down" else "fail"
            yield Row(
                f"{key}.partition", level, f"{name} is {partition.state}", "choose another one"
            )
        elif partition.limit != "infinite" and resources.time_s > _seconds(partition.limit):
            yield Row(
                f"{key}.time",
                "fail",
                f"got {clock(resources.time_s)}, partition {name} allows {partition.limit}",
                "lower it; a job that reaches its limit is requeued and resumes"
                if resources.stage in SIGNALLED
                else "lower it, or choose another partition",
            )
        elif resources.nodes > partition.nodes:
            detail = f"got {resources.nodes}, partition {name} has {partition.nodes}"
            yield Row(f"{key}.nodes", "fail", detail, "lower it")
        else:
            yield Row(f"{key}.partition", "ok", name or "default")


def partition_of(resources: Resources) -> str:
    """Return the partition of a stage; empty for the default one."""
    prefix = "--partition="
    options = [option for option in resources.options if option.startswith(prefix)]
    return options[-1].removeprefix(prefix) if options else ""


def _default_of(partitions: dict[str, Partition]) -> str:
    return next((name for name, one in partitions.items() if one.is_default), "")


def _seconds(limit: str) -> int:
    """Return a limit of ``sinfo`` in seconds; ``30`` there means seconds after the last colon."""
    return parse_walltime(limit if ":" in limit or "-" in limit else f"{limit}s")


# --- the other half: one short job per partition --------------------------------------------------


def plan_probes(config: Config) -> tuple[Job, ...]:
    """Return one short job per partition, as wide as training where that uses it."""
    probes: dict[str, Job] = {}
    stages: tuple[Stage, ...] = ("train", "encode", "shard", "plan", "eval", "gate")
    for stage in stages:
        stage_resources = resolve(config.slurm, stage)
        partition = partition_of(stage_resources)
        if partition in probes:
            continue
        nodes = min(2, stage_resources.nodes)
        own_options = ("--time=", "--signal=", "--nodes=", "--ntasks-per-node=", "--mail")
        options = [
            option for option in stage_resources.options if not option.startswith(own_options)
        ]
        options += [f"--nodes={nodes}", "--ntasks-per-node=1", f"--time={clock(_TIME_S)}"]
        resources = replace(
            stage_resources,
            options=tuple(options),
            nodes=nodes,
            ranks=1,
            tasks=1,
            time_s=_TIME_S,
            signal="",
        )
        name = f"doctor-{partition.replace(',', '-') or 'default'}"
        probes[partition] = Job(name, "plan", "plan", resources)
    return tuple(probes.values())


def examine(
    config: Config,
    cluster: Slurm,
    *,
    patience_s: float,
    on_row: Callable[[Row], None],
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Run both halves and pass on each finding; return whether nothing failed.

    Args:
        config: Of the run.
        cluster: The cluster.
        patience_s: Longest wait for a probe job, its time in the queue included.
        on_row: Called with each row as soon as it is known.
        sleep: Pauses between two looks at the queue.
    """
    rows: list[Row] = []

    def take(new_rows: Sequence[Row]) -> None:
        rows.extend(new_rows)
        for row in new_rows:
            on_row(row)

    take(list(cheap_rows(config, cluster)))
    folder = _new_folder(config.run_dir)
    frozen = freeze(config, folder)
    started = {job.name: _start(job, frozen, folder, cluster) for job in plan_probes(config)}
    for name, job_id in started.items():
        state, reason = _wait(cluster, job_id, patience_s, sleep)
        take(_read(folder / f"{name}.jsonl", name, state, reason))
    return all(row.level != "fail" for row in rows)


def _new_folder(run_dir: Path) -> Path:
    numbers = (path.name.removeprefix("doctor-") for path in run_dir.glob("doctor-*"))
    last = max((int(number) for number in numbers if number.isdecimal()), default=0)
    folder = run_dir / f"doctor-{last + 1}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise MachineError(
            f"{folder}: {error.strerror}; set data.root or data.runs to a writable folder"
        ) from None
    return folder.resolve()


def _start(job: Job, config: Config, folder: Path, cluster: Slurm) -> int:
    label = f"{config.training.run_name}.{folder.name}"
    place = Place.of(config.slurm, folder=str(folder), cwd=str(Path.cwd()), label=label)
    body = (Path(__file__).parent / "doctor.sbatch").read_text(encoding="utf-8")
    text = render(job, body, place).replace(
        "\nset -u\n", f"\nROWS={folder}/{job.name}.jsonl\nset -u\n", 1
    )
    script = folder / f"{job.name}.sbatch"
    publish_bytes(script, text.encode())
    return cluster.submit(script, name=f"{label}.{job.name}")


def _wait(
    cluster: Slurm, job_id: int, patience_s: float, sleep: Callable[[float], None]
) -> tuple[str, str]:
    """Return state and reason of a job once it has ended, or when patience ends; then cancel it."""
    deadline = time.monotonic() + patience_s
    while True:
        entries = [entry for entry in cluster.queue() if entry.job_id == job_id]
        state = entries[-1].state if entries else "COMPLETED"
        if state in _ENDED:
            return state, ""
        if time.monotonic() > deadline:
            cluster.cancel(job_id)
            return state, entries[-1].reason
        sleep(1.0)


def _read(path: Path, name: str, state: str, reason: str) -> list[Row]:
    rows = []
    if path.is_file():
        with report_corrupt(path, "run `movienet-slurm doctor` again"):
            lines = path.read_text(encoding="utf-8").splitlines()
            rows = [Row(**json.loads(line)) for line in lines]
    if state != "COMPLETED":
        detail = f"its job ended as {state}" if not reason else f"its job is {state} ({reason})"
        remedy = f"see {path.parent}/logs/{name}-*.out"
        rows.append(Row(name, "fail", detail, remedy))
    return rows


def line_of(row: Row) -> str:
    """Return a row as JSON, one line."""
    return json.dumps(asdict(row))
