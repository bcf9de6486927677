"""The commands of the README, run as a user runs them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import forked

CHECKOUT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Pipeline:
    """A folder in which the stages run, and their configuration."""

    folder: Path
    config: Path

    def run(self, package: str, command: str, *overrides: str, ranks: int = 1) -> str:
        """Run a command; return its stdout, or fail with its stderr."""
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),  # without the developer's wandb key and Accelerate defaults
            "PYTHONPATH": str(CHECKOUT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        done = forked.run(
            [package, command, "--config", str(self.config), *overrides],
            folder=self.folder,
            environment=environment,
            ranks=ranks,
        )
        if done.returncode:
            pytest.fail(f"{package} {command}: exit {done.returncode}\n{done.stderr[-4000:]}")
        return done.stdout


def read_json(path: Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(path.read_text())


def read_metrics(run: Path, kind: str) -> list[dict[str, Any]]:
    """Return the records of one kind of a run's ``metrics.jsonl``."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == kind]
