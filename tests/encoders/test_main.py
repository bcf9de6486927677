"""Commands of movienet-encode: output, exit codes, hints and log lines."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from configs.schema import Config
from encoders.__main__ import commands, main
from sharding.features import open_features

REPOSITORY = Path(__file__).parents[2]


def hints(text: str) -> list[list[str]]:
    """Commands in backticks, split as a shell splits them."""
    return [shlex.split(each) for each in re.findall(r"`(movienet-[^`]+)`", text)]


@pytest.mark.slow
def test_the_commands_report_plan_progress_and_result(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(tmp_path / "config.yaml")]
    assert main(["status", *arguments]) == 1
    assert "; run `movienet-encode plan --config" in capsys.readouterr().err
    assert main(["plan", *arguments]) == 0
    output = capsys.readouterr().out
    assert "UNTRAINED weights of seed 0" in output
    assert "images 93" in output
    assert main(["status", *arguments]) == 1
    assert "missing shards: 0-4\n" in capsys.readouterr().out
    assert main(["run", *arguments, "--task", "0/1"]) == 0
    output = capsys.readouterr().out
    assert "waited for data" in output
    assert open_features(config.features_dir).digest in output
    assert main(["seal", *arguments]) == 0
    assert open_features(config.features_dir).digest in capsys.readouterr().out
    assert main(["status", *arguments]) == 0
    assert main(["fetch", *arguments]) == 0
    assert "nothing to fetch" in capsys.readouterr().out
    assert main(["models", "b-32-quickgelu"]) == 0
    assert "openai" in capsys.readouterr().out


def test_printed_hints_can_be_pasted_and_keep_config_and_overrides(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "my config.yaml"
    (tmp_path / "config.yaml").rename(file)
    assert main(["status", "--config", str(file), "encoder.name=other"]) == 1
    (planning,) = hints(capsys.readouterr().err)
    assert planning[:2] == ["movienet-encode", "plan"]
    assert main(planning[1:]) == 0
    (running,) = hints(capsys.readouterr().out)
    assert main(running[1:]) == 0
    assert open_features(str(Path(config.features_dir).with_name("other")))
    assert not Path(config.features_dir).exists()


@pytest.mark.usefixtures("config")
@pytest.mark.parametrize("task", ["2/2", "1", "-1/2", "a/b"])
def test_an_invalid_task_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    arguments = ["run", "--config", str(tmp_path / "config.yaml"), f"--task={task}"]
    assert main(arguments) == 2
    assert "want I/N" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("config")
def test_the_encoder_and_its_library_are_named_before_slow_imports(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "encoders", "plan"]
    done = subprocess.run(
        [*command, "--config", str(tmp_path / "config.yaml")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        check=True,
        timeout=300,
    )
    lines = (
        r"loading encoder tiny\.json \(16 values\), weights none \(untrained\)\n",
        r"\| +torch[.\w]*\n",
        r"importing OpenCLIP\n",
        r"\| +open_clip[.\w]*\n",
    )
    matches = [re.search(line, done.stderr) for line in lines]
    positions = [match.start() for match in matches if match]
    assert len(positions) == len(lines)
    assert positions == sorted(positions)


def test_a_deeply_nested_model_file_ends_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000)
    assert main(["fetch", "--config", "demo", f"encoder.model={deep}"]) == 2
    logged, *_, error = capsys.readouterr().err.splitlines()
    assert logged.endswith("fetching encoder deep.json, weights none (untrained)")
    assert error.startswith(f"error: encoder.model: {deep}: not an OpenCLIP model (RecursionError")


@pytest.mark.parametrize("name", sorted(commands.commands))
def test_the_help_of_each_command_fits_80_columns_and_has_an_example(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.strip().startswith(f"Example: movienet-encode {name}") for line in lines)
