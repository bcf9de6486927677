"""The commands of encoders, their output and their exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.schema import Config
from encoders.__main__ import main
from sharding.features import open_features


def test_the_commands_tell_plan_progress_and_result(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(tmp_path / "config.yaml")]
    assert main(["status", *arguments]) == 1
    assert "run `movienet-encode plan` first" in capsys.readouterr().err
    assert main(["plan", *arguments]) == 0
    said = capsys.readouterr().out
    assert "UNTRAINED weights of seed 0" in said
    assert "images 93" in said
    assert main(["status", *arguments]) == 1
    assert "missing: --array=0-" in capsys.readouterr().out
    assert main(["run", *arguments, "--task", "0/1"]) == 0
    said = capsys.readouterr().out
    assert "waited" in said
    assert open_features(config.features_dir).digest in said
    assert main(["seal", *arguments]) == 0
    assert open_features(config.features_dir).digest in capsys.readouterr().out
    assert main(["status", *arguments]) == 0
    assert main(["fetch", *arguments]) == 0
    assert "nothing to fetch" in capsys.readouterr().out
    assert main(["models", "b-32-quickgelu"]) == 0
    assert "openai" in capsys.readouterr().out


@pytest.mark.usefixtures("config")
@pytest.mark.parametrize("task", ["2/2", "1", "-1/2", "a/b"])
def test_a_share_that_is_none_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    arguments = ["run", "--config", str(tmp_path / "config.yaml"), f"--task={task}"]
    assert main(arguments) == 2
    assert "want I/N" in capsys.readouterr().err
