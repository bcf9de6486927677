"""A real Slurm cluster on this machine and a project on it, for the tests marked ``slurm``."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tests import forked

CHECKOUT = Path(__file__).parents[2]
TESTBED = CHECKOUT.parent / "shared" / "slurm-testbed" / "testbed"

PROGRAMS = {
    "movienet-shard": "sharding",
    "movienet-encode": "encoders",
    "movienet-train": "training",
    "movienet-eval": "eval",
    "movienet-slurm": "slurm",
}

T = TypeVar("T")

PATIENCE = 4.0
"""How much longer than on an idle machine a test waits before it fails."""

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")


def wait_until(look: Callable[[], T | None], *, within_s: float = 90.0, what: str = "") -> T:
    """Return the first true result of ``look``; a busy machine gets more time."""
    deadline = time.monotonic() + PATIENCE * within_s
    while True:
        result = look()
        if result:
            return result
        if time.monotonic() > deadline:
            raise AssertionError(f"{what or look}: not within {within_s:g} s")
        time.sleep(0.25)


@dataclass(frozen=True)
class Cluster:
    """The testbed."""

    folder: Path
    conf: str

    def call(self, *words: str) -> str:
        """Run a command of the testbed."""
        done = subprocess.run(
            [str(TESTBED), *words, "--dir", str(self.folder)],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def slurm(self, *words: str) -> str:
        """Run one of Slurm's commands and return its output, whatever its status."""
        environment = {"PATH": os.environ["PATH"], "SLURM_CONF": self.conf}
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=60, env=environment
        )
        return done.stdout + done.stderr

    def jobs(self) -> list[dict[str, str]]:
        """Return what the controller knows of every job and array task."""
        lines = self.slurm("scontrol", "-o", "show", "job").splitlines()
        return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines if "JobId=" in line]

    def attempts(self, job_id: int) -> list[dict[str, str]]:
        """Return the ended attempts of a job; those of an array carry its id."""
        path = self.folder / "jobcomp.txt"
        lines = path.read_text().splitlines() if path.is_file() else []
        rows = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]
        return [row for row in rows if row.get("ArrayJobId", row["JobId"]) == str(job_id)]

    def wait_saved(self) -> None:
        """Wait until the controller has written its jobs to disk; before, it may forget them."""
        state = self.folder / "state" / "job_state"
        now = time.time()
        wait_until(lambda: state.is_file() and state.stat().st_mtime > now, what="saved state")

    def clean(self) -> None:
        """Cancel all jobs, and wait until every node is idle."""
        self.slurm("scancel", "--user", "root")
        wait_until(lambda: not self.slurm("squeue", "--noheader").strip(), what="empty queue")


@dataclass
class Project:
    """A folder with a configuration, in which a user runs our commands."""

    cluster: Cluster
    folder: Path
    environment: dict[str, str]

    @property
    def config(self) -> Path:
        return self.folder / "films.yaml"

    @property
    def run_dir(self) -> Path:
        return self.folder / "data" / "runs" / "lstm"

    def command(
        self, program: str, *words: str, extra: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run one of our commands."""
        name, *rest = words
        return subprocess.run(
            [sys.executable, "-m", PROGRAMS[program], name, "--config", str(self.config), *rest],
            cwd=self.folder,
            env=self.environment | dict(extra or {}),
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    def run(self, program: str, *words: str) -> str:
        """Run one of our commands, which must end well."""
        done = self.command(program, *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run_forked(self, program: str, *words: str, ranks: int = 1) -> None:
        """Run one of our commands in processes that start at once; it must end well."""
        name, *rest = words
        command = [PROGRAMS[program], name, "--config", str(self.config), *rest]
        done = forked.run(command, folder=self.folder, environment=self.environment, ranks=ranks)
        assert done.returncode == 0, done.stderr

    def submit(self, *words: str, extra: Mapping[str, str] | None = None) -> Submission:
        """Submit the chain."""
        done = self.command("movienet-slurm", "submit", *words, extra=extra)
        assert done.returncode == 0, done.stdout + done.stderr
        return self.submission()

    def submission(self) -> Submission:
        """Return the newest submission."""
        folders = sorted(self.run_dir.glob("submit-*"), key=lambda path: path.stat().st_mtime)
        tree = json.loads((folders[-1] / "jobs.json").read_bytes())
        ids = {job["name"]: job["job_id"] for job in tree["jobs"]}
        return Submission(self.cluster, folders[-1], ids)

    def change(self, **sections: Mapping[str, Any]) -> None:
        """Change keys of the configuration file."""
        tree = yaml.safe_load(self.config.read_text())
        for section, values in sections.items():
            tree.setdefault(section, {}).update(values)
        self.config.write_text(yaml.safe_dump(tree))

    def digest(self, data_set: str = "frames") -> str:
        """Return the manifest of a data set, which is its identity."""
        return (self.folder / "data" / data_set / "manifest.json").read_text()

    def records(self, folder: Path) -> list[dict[str, Any]]:
        """Return the attempts in a folder, oldest first."""
        paths = sorted(folder.glob("attempt-*.json"), key=lambda path: int(path.stem[8:]))
        return [json.loads(path.read_bytes()) for path in paths]


@dataclass(frozen=True)
class Submission:
    """The jobs of one ``submit``."""

    cluster: Cluster
    folder: Path
    ids: dict[str, int]

    def states(self) -> dict[str, str]:
        """Return the state of each job, and of each task of an array as ``shard_3``."""
        names = {str(job_id): name for name, job_id in self.ids.items()}
        states = {}
        for job in self.cluster.jobs():
            name = names.get(job.get("ArrayJobId", job["JobId"]))
            if name is not None:
                index = job.get("ArrayTaskId")
                states[f"{name}_{index}" if index else name] = job["JobState"]
        return states

    def wait(self, *, within_s: float = 120.0) -> dict[str, str]:
        """Wait until every job has ended; return the states."""

        def ended() -> dict[str, str] | None:
            states = self.states()
            return states if states and all(s in ENDED for s in states.values()) else None

        try:
            return wait_until(ended, within_s=within_s)
        except AssertionError:
            queue = self.cluster.slurm("squeue", "--format=%i %T %r %N")
            nodes = self.cluster.slurm("sinfo", "--Node", "--long")
            raise AssertionError(f"{self.states()}\n{queue}\n{nodes}\n{self.logs()}") from None

    def wait_for(self, name: str, state: str, *, within_s: float = 60.0) -> None:
        """Wait until a job or task is in a state."""
        wait_until(
            lambda: self.states().get(name) == state, within_s=within_s, what=f"{name} {state}"
        )

    def task_id(self, name: str, index: int) -> str:
        """Return how Slurm names an array task."""
        return f"{self.ids[name]}_{index}"

    def log(self, name: str, index: int | None = None) -> str:
        """Return the log of a job or array task; empty before it has begun."""
        tail = f"{self.ids[name]}" + (f"_{index}" if index is not None else "")
        path = self.folder / "logs" / f"{name}-{tail}.out"
        return path.read_text(errors="replace") if path.is_file() else ""

    def logs(self) -> str:
        """Return all logs, for a failure's message."""
        paths = sorted((self.folder / "logs").glob("*.out"))
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in paths)


def write_programs(folder: Path) -> None:
    """Write our console scripts, as an installation has them."""
    folder.mkdir(parents=True, exist_ok=True)
    for program, package in PROGRAMS.items():
        path = folder / program
        path.write_text(f'#!/bin/bash\nexec "{sys.executable}" -m {package} "$@"\n')
        path.chmod(0o755)


def site_file(folder: Path, programs: Path, lines: Sequence[str] = ()) -> Path:
    """Write a site file that finds our programs, with further lines."""
    path = folder / "site.sh"
    python = Path(sys.executable).parent
    head = [
        f'export PATH="{programs}:{python}:$PATH"',
        f"export HOME={folder} OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1",
    ]
    path.write_text("\n".join([*head, *lines, ""]))
    return path
