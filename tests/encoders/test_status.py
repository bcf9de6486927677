"""Progress of a set, in all and by task."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.runtime.attempt import TaskAttempt
from configs.schema import Config
from encoders.__main__ import main
from encoders.progress_report import task_dir
from encoders.task import run_task
from sharding.format.names import MANIFEST


def test_status_tells_each_task_and_what_is_missing(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_task(config, task=(1, 2))
    assert main(["status", "--config", str(tmp_path / "config.yaml")]) == 1
    whole, task, missing = capsys.readouterr().out.splitlines()
    assert "shards 3 of 5   images 45 of 93" in whole
    assert whole.endswith("not sealed")
    assert task.startswith("task 1/2   shards 3 of 3   images 45 of 45")
    assert "attempt 1 done" in task
    assert missing.startswith("missing: --array=")
    TaskAttempt.begin(task_dir(config, (0, 2))).tell("running", 0, ended=False)
    main(["status", "--config", str(tmp_path / "config.yaml")])
    assert "task 0/2   shards 0 of 2" in (said := capsys.readouterr().out)
    assert "attempt 1 running" in said
    run_task(config)
    assert main(["status", "--config", str(tmp_path / "config.yaml")]) == 0
    assert "shards 5 of 5   images 93 of 93   sealed" in capsys.readouterr().out


def test_status_exits_with_1_until_a_set_without_missing_shards_is_sealed(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["status", "--config", str(tmp_path / "config.yaml")]
    assert main(command) == 1, "there is no plan"
    run_task(config)
    (Path(config.features_dir) / MANIFEST).unlink()
    assert main(command) == 1
    assert "shards 5 of 5   images 93 of 93   not sealed" in capsys.readouterr().out
    assert main(["seal", *command[1:]]) == 0
    assert main(command) == 0
