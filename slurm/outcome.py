"""What a batch script does after one life of its job; the decision alone, without any I/O."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Decision = Literal["done", "requeue", "failed"]

STALLED_LIVES = 2
"""Lives of a job without progress after which it is not requeued."""


@dataclass(frozen=True)
class Life:
    """What the record of one attempt contains."""

    token: str | None
    """``MOVIENET_LIFE`` of the script that started it."""

    job: str | None
    outcome: str
    """``running`` until the end is known."""

    step: int | None
    """Steps or images done when it ended."""

    message: str = ""
    seconds: float | None = None
    """From its start to its end; None if the end is unknown."""


@dataclass(frozen=True)
class JobFacts:
    """What ``scontrol -o show job`` prints about a job."""

    state: str | None = None
    preempted: bool = False
    """``PreemptTime`` is set."""

    log: str | None = None
    """Its output file."""


@dataclass(frozen=True)
class Verdict:
    """What to do, and why."""

    decision: Decision
    reason: str


def parse_facts(text: str) -> JobFacts:
    """Return the facts of a job; nothing is known where ``scontrol`` was refused."""
    fields = dict(re.findall(r"(\w+)=(\S*)", text))
    preempt = fields.get("PreemptTime", "None")
    return JobFacts(
        state=fields.get("JobState"),
        preempted=preempt not in ("None", "", "N/A"),
        log=fields.get("StdOut"),
    )


def decide(
    lives: Sequence[Life],
    token: str,
    *,
    received: frozenset[str] = frozenset(),
    facts: JobFacts | None = None,
    error: str | None = None,
) -> Verdict:
    """Decide what follows a life.

    Args:
        lives: Records of the run or task, oldest first.
        token: Token of the life that has just ended.
        received: Signals that reached the batch shell: ``TERM``, ``USR1``, ``USR2``.
        facts: What Slurm reports about the job.
        error: First ``error:`` line of this life's log.
    """
    facts = facts or JobFacts()
    index = next((n for n in reversed(range(len(lives))) if lives[n].token == token), None)
    if index is None:
        return Verdict("failed", error or "no record of this life: it ended before it began work")
    life = lives[index]
    if life.outcome == "done":
        return Verdict("done", "")
    if life.outcome == "failed":
        is_consequence = not life.message or _LOST in life.message
        reason = (error or life.message) if is_consequence else life.message
        return Verdict("failed", reason or "failed without a message")
    if life.outcome != "interrupted":
        return Verdict("failed", error or "killed; out of memory?")
    return _after_interruption(lives[: index + 1], received, facts, error)


def _after_interruption(
    lives: Sequence[Life], received: frozenset[str], facts: JobFacts, error: str | None
) -> Verdict:
    if "TERM" in received:
        return Verdict("failed", "stopped by Slurm (SIGTERM); the state is saved")
    if facts.state == "CANCELLED":
        return Verdict("failed", "cancelled; the state is saved")
    if not received and not facts.preempted:
        # A launcher whose rank crashed stops the other ranks, and their records are as good.
        return Verdict("failed", error or "a rank ended without a word; out of memory?")
    why = "preempted" if facts.preempted else f"stopped by {min(received)}"
    if stalled(lives) >= STALLED_LIVES:
        return Verdict(
            "failed",
            f"{why}, but {STALLED_LIVES} lives in a row made no progress (step {lives[-1].step}); "
            "raise slurm's time, or save more often",
        )
    return Verdict("requeue", f"{why} at step {lives[-1].step}; the state is saved")


def stalled(lives: Sequence[Life]) -> int:
    """Return how many interrupted lives of the last one's job ended the list without progress.

    A life whose end is unknown (power cut) counts neither way.
    """
    best = count = 0
    for life in lives:
        if (life.step or 0) > best:
            best, count = life.step or 0, 0
        elif life.outcome == "interrupted" and life.job == lives[-1].job:
            count += 1
    return count


def first_failure(log: str, token: str) -> str | None:
    """Return why a life failed, from its part of an appended log.

    In this order: the rank that a launcher names as the root cause, the first ``error:`` line of a
    rank, a rank that srun reports as killed (it may have been killed because of another one), and
    the line of a rank that lost another one.

    Returns:
        One line; None where the log of this life contains nothing of the kind.
    """
    _, _, mine = log.rpartition(f"life {token} begins")
    if root := _ROOT_CAUSE.search(mine):
        return _killed(root[1])
    errors = [
        match[1]
        for line in mine.splitlines()
        if (match := re.search(r"(?:^|\s)(error: .*)", line)) and not _SLURM_ERROR.search(line)
    ]
    causes = [line for line in errors if _LOST not in line]
    if causes:
        return causes[0]
    if killed := _SRUN_KILLED.search(mine):
        return _killed(killed[1])
    return errors[0] if errors else None


def _killed(rank: str) -> str:
    return f"rank {rank} was killed by signal 9; out of memory?"


_LOST = "lost another rank"
"""What a rank reports that has failed because of another one."""

_SLURM_ERROR = re.compile(
    r"\b(?:srun|slurmstepd|slurmd|scontrol|scancel|sbatch|squeue)(?:-[\w.-]+)?: error:"
)
"""What Slurm's own programs print, mostly consequences."""

_ROOT_CAUSE = re.compile(
    r"Root Cause.*?rank\s*:\s*(\d+) \(local_rank: \d+\)\s+exitcode\s*:\s*-9\b", re.DOTALL
)
"""How torch's launcher reports the rank that ended first, where the kernel has killed it."""

_SRUN_KILLED = re.compile(r"srun: error: \S+: task (\d+): (?:Killed|Out Of Memory)")
"""How srun reports a rank that was killed."""
