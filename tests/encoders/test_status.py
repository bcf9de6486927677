"""Progress of a set, in total and per task."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from configs.runtime.attempt import AttemptRecord, TaskAttempt, task_dir
from configs.schema import Config
from encoders.__main__ import main
from encoders.status import Done, SetStatus, TaskStatus
from encoders.task import run_task
from sharding.format.names import MANIFEST

pytestmark = pytest.mark.slow


def test_status_shows_each_task_and_the_missing_shards(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    run_task(config, task=(1, 2))
    assert main(["status", "--config", str(file)]) == 1
    location, *table = capsys.readouterr().out.splitlines()
    assert location == f"{config.features_dir}: not sealed"
    assert table[:3] == [
        "           shards   images   done",
        "set           3/5    45/93    48%",
        "task 1/2      3/3    45/45   100%   done",
    ]
    assert table[3].startswith("missing shards: ")
    numbers = table[3].removeprefix("missing shards: ")
    assert table[4:] == [
        f"next: `movienet-encode run --config {file}`",
        f"or as a Slurm array, --array={numbers}:",
        f"    `movienet-encode run --only $SLURM_ARRAY_TASK_ID --config {file}`",
    ]
    TaskAttempt.begin(task_dir(config, "encode", (0, 2))).report("running", 0, ended=False)
    main(["status", "--config", str(file)])
    lines = capsys.readouterr().out.splitlines()
    (row,) = [number for number, line in enumerate(lines) if line.startswith("task 0/2")]
    assert lines[row].split() == ["task", "0/2", "0/2", "0/48", "0%", "running"]
    assert lines[row + 1].startswith("    attempt 1 on ")
    (task_dir(config, "encode", (0, 2)) / "attempt-1.json").write_bytes(b"{")
    assert main(["status", "--config", str(file)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[row].endswith("unknown"), "a corrupt record hides neither set nor tasks"
    wrapped = "".join("".join(lines[row + 1 :]).split())
    assert "attempt-1.json:corrupt" in wrapped
    run_task(config)
    assert main(["status", "--config", str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == [
        f"{config.features_dir}: sealed",
        "           shards   images   done",
        "set           5/5    93/93   100%",
    ]


def test_status_exits_with_1_until_a_set_without_missing_shards_is_sealed(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["status", "--config", str(tmp_path / "config.yaml")]
    assert main(command) == 1, "there is no plan"
    run_task(config)
    (Path(config.features_dir) / MANIFEST).unlink()
    assert main(command) == 1
    output = capsys.readouterr().out
    assert ": not sealed\n" in output
    assert output.endswith(f"next: `movienet-encode seal --config {tmp_path / 'config.yaml'}`\n")
    assert main(["seal", *command[1:]]) == 0
    assert main(command) == 0
    capsys.readouterr()
    # A new plan removes the manifest of the frames: the set is complete only for the old one.
    (Path(config.frames_dir) / MANIFEST).unlink()
    assert main(command) == 1
    assert "; the frame set is missing or not sealed yet: run" in capsys.readouterr().err
    # Frame shards may be deleted once all are encoded, but are needed to encode one again.
    shutil.rmtree(config.frames_dir)
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{config.features_dir}: sealed",
        "      shards   images   done",
        "set      5/5        -   100%",
    ]
    (Path(config.features_dir) / "features-00001.json").unlink()
    assert main(command) == 1
    assert "; the frame set is missing or not sealed yet: run" in capsys.readouterr().err


def test_the_table_of_a_large_set_fits_80_columns() -> None:
    done = Done(12_345, 23_456, 12_345_678, 23_456_789)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    interrupted = AttemptRecord(
        12, "interrupted", 0, "SIGUSR1: " + "words " * 40, started, started, "node-" + "x" * 30, 1
    )
    running = AttemptRecord(3, "running", 0, "", started, None, "node017.cluster.example", 1)
    tasks = (TaskStatus((7, 128), done, interrupted), TaskStatus((127, 128), done, running))
    lines = list(SetStatus("/data/features/clip", done, False, tasks, ()).lines())
    assert max(len(line) for line in lines if not line.startswith("next: ")) <= 80
    assert lines[3].endswith("12,345,678/23,456,789    52%   interrupted")
