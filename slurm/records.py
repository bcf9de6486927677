"""What the stages record about their attempts, as the scripts and ``status`` need it."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from configs.corrupt import report_corrupt
from configs.errors import DataError
from configs.schema import Config
from slurm.outcome import Life, first_failure

_NAME = re.compile(r"attempt-([1-9][0-9]*)\.json")

_LOG_BYTES = 4_000_000
"""End of a log that is searched."""


def record_dir(config: Config, stage: str, task: tuple[int, int]) -> Path:
    """Return the folder of a task's attempts."""
    if stage == "train":
        return config.run_dir
    name = f"{config.encoder.name}-encode" if stage == "encode" else "shard"
    return config.run_dir.parent / name / f"task-{task[0]}-of-{task[1]}"


def read_lives(folder: Path) -> tuple[Life, ...]:
    """Return the attempts recorded in a folder, oldest first; a damaged one counts as killed."""
    if not folder.is_dir():
        return ()
    names = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    numbers = sorted(int(name[1]) for name in names if name)
    return tuple(_read(folder / f"attempt-{number}.json") for number in numbers)


def failure_in(log: str | None, token: str) -> str | None:
    """Return the first error of a life in its log file; None where there is none to read."""
    if log is None or not Path(log).is_file():
        return None
    with Path(log).open("rb") as file:
        file.seek(max(0, Path(log).stat().st_size - _LOG_BYTES))
        return first_failure(file.read().decode(errors="replace"), token)


def _read(path: Path) -> Life:
    with suppress(DataError), report_corrupt(path, "it counts as killed"):
        return _life(json.loads(path.read_bytes()))
    return _life({})


def _life(tree: dict[str, Any]) -> Life:
    return Life(
        token=tree.get("token"),
        job=tree.get("job"),
        outcome=str(tree.get("outcome", "running")),
        step=tree.get("step"),
        message=str(tree.get("message", "")),
        seconds=_seconds(tree.get("started"), tree.get("ended")),
    )


def _seconds(started: str | None, ended: str | None) -> float | None:
    if not started or not ended:
        return None
    return (datetime.fromisoformat(ended) - datetime.fromisoformat(started)).total_seconds()
