"""The rehearsal's folder: configuration, commands, and what the records of the product contain."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.slurm.cluster import CHECKOUT, PROGRAMS, site_file, write_programs

MARKER = "MOVIENET_REHEARSAL"
"""Environment variable of every process of the rehearsal; its value is the folder."""

SHARD_TASKS, RANKS = 4, 2
SHARDS_MB = 8


@dataclass(frozen=True)
class Work:
    """The folder of a rehearsal."""

    folder: Path

    @property
    def config(self) -> Path:
        """The configuration file."""
        return self.folder / "films.yaml"

    @property
    def bin(self) -> Path:
        """The folder of our console scripts."""
        return self.folder / "bin"

    def environment(self) -> dict[str, str]:
        """Return the environment of every command."""
        return {
            "PATH": f"{self.bin}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "PYTHONPATH": str(CHECKOUT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            MARKER: str(self.folder),
        }

    def command(self, program: str, *words: str) -> list[str]:
        """Return the command line of one of our programs with the rehearsal's configuration."""
        name, *rest = words
        package = PROGRAMS[program]
        return [sys.executable, "-m", package, name, "--config", str(self.config), *rest]

    def run(self, program: str, *words: str, allowed: Sequence[int] = (0,)) -> str:
        """Run one of our programs to its end and return its output.

        Raises:
            SystemExit: it ends with a status that is not allowed.
        """
        done = subprocess.run(
            self.command(program, *words),
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode not in allowed:
            raise SystemExit(f"{program} {' '.join(words)}: {done.stdout[-2000:]}{done.stderr}")
        return done.stdout

    def write_config(self, *, exclude: Sequence[str] = ()) -> None:
        """Write configuration, site file and console scripts."""
        write_programs(self.bin)
        site = site_file(self.folder, self.bin, [f"export {MARKER}={self.folder}"])
        tree = yaml.safe_load((CHECKOUT / "configs" / "demo.yaml").read_text())
        tree["data"] = {
            "dump": "dump/240P",
            "metadata": "dump/meta",
            "split": "dump/split.json",
            "root": "data",
            "exclude": list(exclude),
        }
        tree["sharding"] = {"shard_bytes": f"{SHARDS_MB}MiB"}
        tree["encoder"]["model"] = str(CHECKOUT / "configs" / "towers" / "demo.json")
        tree["stream"]["windows_per_movie"] = 8
        tree["training"] |= {"run_name": "lstm", "epochs": 20}
        tree["tracking"] = {"wandb": "off"}
        tree["slurm"] = {
            "site": str(site),
            "time": "40min",
            "lead": "20s",
            "shard": {"tasks": SHARD_TASKS},
            "encode": {"tasks": 1, "ranks": RANKS},
        }
        self.config.write_text(yaml.safe_dump(tree))

    # --- results

    def shards(self, data_set: str) -> tuple[int, int]:
        """Return how many shards of ``frames`` or ``features/demo`` exist, and how many will."""
        plan = self.folder / "data" / "frames" / "plan.json"
        if not plan.is_file():
            return 0, 0
        kind = data_set.partition("/")[0]
        done = len(list((self.folder / "data" / data_set).glob(f"{kind}-[0-9]*.tar")))
        movies = json.loads(plan.read_bytes())["movies"]
        return done, 1 + max(movie["shard"] for movie in movies)

    def progress(self, data_set: str) -> float:
        """Return the fraction of shards that exist, 0 to 1."""
        done, n = self.shards(data_set)
        return done / n if n else 0.0

    def is_sealed(self, data_set: str, root: str = "data") -> bool:
        """Return whether a data set is complete."""
        return (self.folder / root / data_set / "manifest.json").is_file()

    def digest(self, data_set: str, root: str = "data") -> str:
        """Return the digest of a sealed data set."""
        return hashlib.sha256(
            (self.folder / root / data_set / "manifest.json").read_bytes()
        ).hexdigest()

    def attempts(self, stage: str, root: str = "data") -> list[list[dict[str, Any]]]:
        """Return the records of each task of ``shard`` or ``encode``, or of training."""
        runs = self.folder / root / "runs"
        pattern = {"shard": "shard/task-*", "encode": "demo-encode/task-*", "train": "lstm"}[stage]
        return [_records(folder) for folder in sorted(runs.glob(pattern))]

    # --- times

    def times(self) -> dict[str, float]:
        """Return the seconds of each step that is complete."""
        path = self.folder / "times.json"
        return dict(json.loads(path.read_text())) if path.is_file() else {}

    @contextmanager
    def step(self, name: str) -> Iterator[bool]:
        """Yield whether a step must run; record its time once it is complete."""
        times = self.times()
        if name in times:
            yield False
            return
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {name}\n")
        begin = time.monotonic()
        yield True
        seconds = round(time.monotonic() - begin, 1)
        (self.folder / "times.json").write_text(json.dumps(times | {name: seconds}))


def _records(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(folder.glob("attempt-*.json"), key=lambda path: int(path.stem[8:]))
    return [json.loads(path.read_bytes()) for path in paths]


def restarts(tasks: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[int, int]:
    """Return how many attempts were interrupted and resumed, and how many were killed."""
    outcomes = [record["outcome"] for task in tasks for record in task]
    return outcomes.count("interrupted"), outcomes.count("running")
