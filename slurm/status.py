"""Where a submitted chain is: from one ``squeue``, the jobs' logs and their recorded attempts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import DataError
from configs.runtime.hints import hint
from configs.schema import Config
from slurm.client import QueueEntry, Slurm
from slurm.freeze import Frozen, Submitted, open_submission
from slurm.outcome import first_failure
from slurm.resources import expand, ranges

_ACTIVE = ("RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")

_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESIZING")

_BEGINS = re.compile(r"== \S+ \S+ \S+ on (\S+) life (\S+) begins")

_ENDS = re.compile(r"== .* ends: (done|failed|requeued)")

_PROGRESS = re.compile(
    r"(?P<label>[A-Za-z][\w, ]*): (?P<done>[\d,]+)(?:/(?P<total>[\d,]+))? (?P<unit>\w+)  "
    r"(?P<rate>[\d,.]+)/s\b"
)

_LINK = re.compile(r"https?://\S+/runs/\w+")

_RESUBMIT = "movienet-slurm submit --resubmit-missing"

REMEDIES: tuple[tuple[str, str], ...] = (
    ("held", "Slurm could not start it and holds it; release it: scontrol release {id}"),
    (
        "DependencyNeverSatisfied",
        "a job before it failed and it will never start; fix the cause, then {cancel} and "
        "{resubmit}",
    ),
    (
        "PartitionTimeLimit",
        "no node of its partition may run that long; lower slurm.{step}.time, cancel and resubmit",
    ),
    (
        "PartitionNodeLimit",
        "its partition has fewer nodes; lower slurm.{step}.nodes, cancel and resubmit",
    ),
    ("BadConstraints", "no node has slurm.{step}.constraint and gres; correct them and resubmit"),
    ("BeginTime", "requeued; Slurm starts it again after about two minutes"),
)
"""What a reason in the queue means, and what to do."""


@dataclass(frozen=True)
class Log:
    """What the last life in a log file left."""

    node: str = ""
    end: str = ""
    """``done``, ``failed``, ``requeued``; empty while it runs, or when it was killed."""

    error: str | None = None
    progress: str = ""
    """Last line of progress."""

    link: str = ""
    """Page of the wandb run."""


@dataclass(frozen=True)
class TaskStatus:
    """One job without an array, or one task of an array."""

    index: int | None
    state: str
    """``waiting``, ``running``, ``done``, ``failed``, ``cancelled`` or ``unknown``."""

    reason: str = ""
    node: str = ""
    detail: str = ""
    log: Log = Log()


@dataclass(frozen=True)
class JobStatus:
    """One submitted job with its tasks."""

    job: Submitted
    tasks: tuple[TaskStatus, ...]

    def lines(self) -> Iterator[str]:
        """Yield one line, and one more for each kind of trouble."""
        counts = Counter(task.state for task in self.tasks)
        states = "   ".join(
            state if self.job.array is None else f"{state} {number}"
            for state, number in sorted(counts.items())
        )
        job_id = str(self.job.job_id or "-")
        yield "   ".join([f"{self.job.name:<16}", f"{job_id:>8}", states, *self._progress()])
        yield from self._failures()
        yield from self._reasons()

    def _progress(self) -> Iterator[str]:
        matches = [
            match
            for task in self.tasks
            if task.state == "running" and (match := _PROGRESS.search(task.log.progress))
        ]
        if matches:
            yield _sum_progress(matches)
        links = [task.log.link for task in self.tasks if task.log.link]
        if links:
            yield links[-1]

    def _failures(self) -> Iterator[str]:
        by_text: dict[tuple[str, str], list[TaskStatus]] = {}
        for task in self.tasks:
            if task.state in ("failed", "cancelled"):
                by_text.setdefault((task.state, task.detail), []).append(task)
        for (state, detail), tasks in by_text.items():
            numbers = [self.job.offset + task.index for task in tasks if task.index is not None]
            where = f" tasks {ranges(numbers)}" if numbers else ""
            node = f" on {tasks[0].node}" if tasks[0].node else ""
            yield f"    {state}{where}{node}: {detail}"

    def _reasons(self) -> Iterator[str]:
        for reason in dict.fromkeys(t.reason for t in self.tasks if t.state == "waiting"):
            remedy = next((text for word, text in REMEDIES if word in reason), None)
            if remedy:
                text = remedy.format(
                    id=self.job.job_id,
                    step=self.job.step,
                    cancel=hint("movienet-slurm cancel"),
                    resubmit=hint(_RESUBMIT),
                )
                yield f"    {reason}: {text}"
            elif reason not in ("None", "", "Dependency", "Priority", "Resources"):
                yield f"    {reason}"


@dataclass(frozen=True)
class ChainStatus:
    """A submitted chain."""

    frozen: Frozen
    jobs: tuple[JobStatus, ...]

    @property
    def complete(self) -> bool:
        """Return whether every task of every job has ended well."""
        return all(task.state == "done" for job in self.jobs for task in job.tasks)

    def lines(self) -> Iterator[str]:
        """Yield the status of every job, and what to do next where one failed."""
        yield str(self.frozen.folder)
        for job in self.jobs:
            yield from job.lines()
        states = {task.state for job in self.jobs for task in job.tasks}
        if not states & {"running", "waiting"} and states & {"failed", "cancelled", "unknown"}:
            yield f"next: fix the cause, then {hint(_RESUBMIT)}"
        if any(job.job.job_id is None for job in self.jobs):
            yield f"next: {hint('movienet-slurm submit --continue')} submits the jobs without an id"


def read_status(config: Config, cluster: Slurm) -> ChainStatus:
    """Look at the newest submission of a run.

    Raises:
        DataError: there is none.
        MachineError: Slurm does not answer.
    """
    frozen = open_submission(config.run_dir)
    return describe(frozen, cluster.queue(), _read_logs(frozen))


def describe(
    frozen: Frozen, queue: Sequence[QueueEntry], logs: Mapping[tuple[str, int | None], Log]
) -> ChainStatus:
    """Return the status of a chain.

    Args:
        frozen: The submission.
        queue: All entries of the user, those of other jobs included.
        logs: By job name and array index.
    """
    entries = {(entry.job_id, entry.index): entry for entry in queue}
    jobs = []
    for job in frozen.jobs:
        indices = expand(job.array) if job.array is not None else (None,)
        tasks = tuple(
            _task(
                index,
                entries.get((job.job_id, index)) if job.job_id is not None else None,
                logs.get((job.name, index)),
                submitted=job.job_id is not None,
            )
            for index in indices
        )
        jobs.append(JobStatus(job, tasks))
    return ChainStatus(frozen, tuple(jobs))


def read_log(text: str) -> Log:
    """Return what the last life in an appended log left."""
    begins = list(_BEGINS.finditer(text))
    if not begins:
        return Log()
    last = begins[-1]
    mine = text[last.start() :]
    ends = _ENDS.findall(mine)
    progress = [line for line in mine.splitlines() if _PROGRESS.search(line)]
    links = _LINK.findall(text)
    return Log(
        node=last[1],
        end=ends[-1] if ends else "",
        error=_reason_in(mine) or first_failure(mine, last[2]),
        progress=progress[-1] if progress else "",
        link=links[-1] if links else "",
    )


def _reason_in(text: str) -> str | None:
    """Return the verdict that the script printed."""
    match = re.search(r"^failed: (.+)$", text, re.MULTILINE)
    return match[1] if match else None


def _task(
    index: int | None, entry: QueueEntry | None, log: Log | None, *, submitted: bool
) -> TaskStatus:
    log = log or Log()
    state = entry.state if entry else ""
    if not submitted:
        return TaskStatus(index, "unknown", detail="not submitted")
    if entry and state in _ACTIVE:
        return TaskStatus(index, "running", node=entry.node, log=log)
    if entry and state in _WAITING:
        return TaskStatus(index, "waiting", reason=entry.reason, log=log)
    if log.end == "done" or state == "COMPLETED":
        return TaskStatus(index, "done", node=log.node, log=log)
    if state == "CANCELLED":
        detail = log.error or "cancelled before it began" if not log.node else "cancelled"
        return TaskStatus(index, "cancelled", node=log.node, detail=detail, log=log)
    if log.end == "failed" or state:
        detail = log.error or f"Slurm reports {state or 'nothing'}"
        return TaskStatus(index, "failed", node=log.node, detail=detail, log=log)
    detail = "Slurm no longer knows it, and its log has no end"
    return TaskStatus(index, "unknown", node=log.node, detail=detail, log=log)


def _sum_progress(matches: Sequence[re.Match[str]]) -> str:
    def total(name: str) -> float:
        return sum(float(match[name].replace(",", "")) for match in matches if match[name])

    rate, unit = total("rate"), matches[0]["unit"]
    text = f"{total('done'):,.0f} of {total('total'):,.0f} {unit}   {rate:,.1f} {unit}/s"
    left = total("total") - total("done")
    return f"{text}   {left / rate / 60:,.0f} min left" if rate and left > 0 else text


def _read_logs(frozen: Frozen) -> dict[tuple[str, int | None], Log]:
    logs: dict[tuple[str, int | None], Log] = {}
    for job in frozen.jobs:
        for path in (frozen.folder / "logs").glob(f"{job.name}-{job.job_id}*.out"):
            rest = path.stem.removeprefix(f"{job.name}-{job.job_id}")
            index = int(rest[1:]) if rest[1:].isdecimal() else None
            if rest in ("", f"_{index}"):
                logs[job.name, index] = read_log(_end_of(path))
    return logs


def _end_of(path: Path, n_bytes: int = 1_000_000) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - n_bytes))
            return file.read().decode(errors="replace")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
