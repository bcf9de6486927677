"""Slurm's commands; the only file that calls sbatch, squeue, scontrol, scancel and sinfo.

Options of Slurm 20.11 suffice, and accounting (``sacct``) is not needed.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import MachineError

logger = logging.getLogger(__name__)

_COMMAND_S = 120.0
"""Longest time for one command."""

_AWAY_S = 300.0
"""Longest time to wait for a controller that does not answer."""

_AWAY = re.compile(
    r"Unable to contact slurm controller|Socket timed out|Connection refused|"
    r"Zero Bytes were transmitted|Transport endpoint is not connected|Unable to establish"
)

_UNCONFIGURED = re.compile(r"configuration source|Unable to process configuration")

_KEPT = ("SLURM_CONF", "SLURM_CLUSTERS")


class RefusedError(MachineError):
    """Slurm refused a job; the message is Slurm's own line."""


@dataclass(frozen=True)
class QueueEntry:
    """One job or array task in the queue: running, waiting or ended lately."""

    job_id: int
    """Of an array: its own id, the same for all tasks."""

    index: int | None
    """Array index; None for a job without an array."""

    state: str
    """``PENDING``, ``RUNNING``, ``COMPLETED``, ``FAILED`` …"""

    reason: str
    node: str
    name: str


@dataclass(frozen=True)
class Partition:
    """One partition."""

    is_default: bool
    state: str
    """``up``; ``down`` accepts jobs and starts none; ``drain`` and ``inact`` refuse them."""

    limit: str
    """Longest time limit as Slurm writes it, or ``infinite``."""

    nodes: int


class Slurm:
    """A cluster, through its commands."""

    def __init__(
        self, *, away_s: float = _AWAY_S, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._away_s = away_s
        self._sleep = sleep

    def submit(
        self,
        script: Path,
        *,
        name: str,
        after_ok: Sequence[int] = (),
        after_any: Sequence[int] = (),
    ) -> int:
        """Submit a script once and return its job id.

        Args:
            script: Rendered batch script.
            name: Its job name, which no other job of this user has: where the controller does
                not answer, the queue is searched for it before the script is submitted again.
            after_ok: Ids of the jobs that must end well before it starts.
            after_any: Ids of the jobs that must end.

        Raises:
            RefusedError: Slurm does not accept the job.
            MachineError: no Slurm here, or its controller does not answer for minutes.
        """
        command = ["sbatch", "--parsable"]
        conditions = [
            f"{condition}:{':'.join(str(job_id) for job_id in ids)}"
            for condition, ids in (("afterok", after_ok), ("afterany", after_any))
            if ids
        ]
        if conditions:
            command += [f"--dependency={','.join(conditions)}", "--kill-on-invalid-dep=yes"]
        command.append(str(script))
        deadline = time.monotonic() + self._away_s
        while True:
            done = _run(command)
            if done.returncode == 0:
                return int(done.stdout.split(";")[0].strip())
            if not _AWAY.search(done.stderr) or time.monotonic() > deadline:
                raise RefusedError(f"sbatch refused {name}: {_line(done.stderr)}")
            logger.warning("%s: the Slurm controller does not answer; trying again", name)
            self._sleep(5.0)
            if (job_id := self.find(name)) is not None:
                return job_id

    def find(self, name: str) -> int | None:
        """Return the id of the job with a name; None if the queue has none."""
        output = self._ask(["squeue", "--noheader", f"--name={name}", "--format=%F"])
        return int(output.split()[0]) if output.split() else None

    def queue(self) -> list[QueueEntry]:
        """Return this user's jobs, and those that ended within the last minutes; one ``squeue``."""
        form = "%F|%K|%T|%r|%N|%j"
        options = ["--noheader", "--array", "--states=all", f"--user={os.getuid()}"]
        output = self._ask(["squeue", *options, f"--format={form}"])
        return [_entry(line) for line in output.splitlines() if line.count("|") >= 5]

    def cancel(self, job_id: int) -> None:
        """Cancel a job or array; one that has ended is left alone."""
        done = _run(["scancel", str(job_id)])
        if done.returncode != 0 and "Invalid job id" not in done.stderr:
            raise MachineError(f"scancel {job_id}: {_line(done.stderr)}")

    def settings(self) -> dict[str, str]:
        """Return the cluster's configuration, e.g. ``MaxArraySize``; one ``scontrol``."""
        output = self._ask(["scontrol", "show", "config"])
        pairs = (line.split("=", 1) for line in output.splitlines() if "=" in line)
        return {key.strip(): value.strip() for key, value in pairs}

    def partitions(self) -> dict[str, Partition]:
        """Return the partitions by name; one ``sinfo``."""
        output = self._ask(["sinfo", "--noheader", "--format=%P|%a|%l|%D"])
        rows = [line.split("|") for line in output.splitlines() if line.count("|") == 3]
        partitions: dict[str, Partition] = {}
        for name, state, limit, nodes in rows:  # a partition has a row per state of its nodes
            key = name.rstrip("*")
            before = partitions[key].nodes if key in partitions else 0
            partitions[key] = Partition(
                is_default=name.endswith("*"),
                state=state,
                limit=limit,
                nodes=before + int(nodes),
            )
        return partitions

    def lost_nodes(self) -> list[tuple[str, str, str]]:
        """Return node, state and reason of nodes that are down, drained or do not respond."""
        output = self._ask(["sinfo", "--noheader", "--Node", "--format=%N|%T|%E"])
        rows = [line.split("|", 2) for line in output.splitlines() if line.count("|") >= 2]
        lost = [
            (name, state, reason)
            for name, state, reason in rows
            if re.search(r"down|drain|fail|\*|inval|unknown", state)
        ]
        return list(dict.fromkeys(lost))

    def _ask(self, command: Sequence[str]) -> str:
        """Run a command that changes nothing, again while the controller does not answer."""
        deadline = time.monotonic() + self._away_s
        while True:
            done = _run(command)
            if done.returncode == 0:
                return done.stdout
            if _UNCONFIGURED.search(done.stderr):
                raise MachineError(
                    f"{command[0]}: finds no configuration of Slurm; run this on a login node of "
                    f"the cluster, or set SLURM_CONF to its slurm.conf ({_line(done.stderr)})"
                )
            if not _AWAY.search(done.stderr) or time.monotonic() > deadline:
                raise MachineError(f"{' '.join(command[:2])}: {_line(done.stderr)}")
            self._sleep(5.0)


def submission_environment() -> dict[str, str]:
    """Return this process's environment without what an enclosing job left in it."""
    stale = [
        name
        for name in os.environ
        if name.startswith(("SLURM_", "SBATCH_", "SRUN_")) and name not in _KEPT
    ]
    return {name: value for name, value in os.environ.items() if name not in stale}


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=_COMMAND_S,
            env=submission_environment(),
        )
    except FileNotFoundError:
        raise MachineError(
            f"{command[0]}: not found; run this on a login node of the cluster, or load Slurm's "
            "module"
        ) from None
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", "Unable to contact slurm controller")


def _entry(line: str) -> QueueEntry:
    job_id, index, state, reason, node, name = line.split("|", 5)
    return QueueEntry(
        job_id=int(job_id),
        index=int(index) if index.isdecimal() else None,
        state=state,
        reason=reason,
        node=node,
        name=name,
    )


def _line(text: str) -> str:
    """Return Slurm's message in one line, without the names of its programs."""
    lines = [re.sub(r"^\w+: (?:error: )?", "", line) for line in text.splitlines() if line.strip()]
    return "; ".join(lines) or "no message"
