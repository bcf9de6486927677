from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import click
import pytest

from configs.errors import DataError, Interrupted
from configs.runtime.cli import CommandGroup, echo, run
from configs.schema import Config

CHECKOUT = Path(__file__).parents[3]
ROOMS = ["sharding", "encoders", "training", "eval"]


def group() -> CommandGroup:
    made = CommandGroup("python -m toy", "A room for tests.")

    @made.command()
    @click.option("--only", help="One shard.")
    def build(config: Config, only: str | None) -> int | None:
        """Build what is planned."""
        echo(f"{config.encoder.name} {only}")
        if only == "bad":
            raise DataError("toy: got\nnothing, want bytes")
        if only == "full":
            raise OSError(errno.ENOSPC, "No space left on device", "frames-00000.tar")
        if only == "stop":
            raise Interrupted("saved at step 3; run again")
        return 3 if only == "findings" else None

    return made


@pytest.mark.parametrize(
    ("only", "code"), [("x", 0), ("findings", 3), ("bad", 1), ("full", 1), ("stop", 75)]
)
def test_the_exit_code_tells_how_a_command_ended(only: str, code: int) -> None:
    assert run(group(), ["build", "--config", "demo", "--only", only]) == code


def test_an_expected_failure_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    run(group(), ["build", "--config", "demo", "--only", "bad"])
    assert capsys.readouterr().err == "error: toy: got nothing, want bytes\n"


def test_a_full_disk_is_told_with_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    run(group(), ["build", "--config", "demo", "--only", "full"])
    assert capsys.readouterr().err == "error: frames-00000.tar: No space left on device\n"


def test_debug_shows_the_traceback_of_an_expected_failure() -> None:
    with pytest.raises(DataError):
        run(group(), ["build", "--config", "demo", "--only", "bad", "--debug"])


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["biuld"], "did you mean 'build'?"),
        (["build"], "--config: missing"),
        (["build", "--config", "demo", "--onyl", "x"], "--onl"),
        (["build", "--config", "demo", "traning.lr=1"], "did you mean 'training'?"),
    ],
)
def test_wrong_use_exits_with_2_and_says_what_to_do(
    argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(group(), argv) == 2
    assert says in capsys.readouterr().err


def test_the_resolved_config_is_printed_and_nothing_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["build", "--config", "demo", "training.lr=0.5", "--only", "bad", "--print-config"]
    assert run(group(), argv) == 0
    assert "  lr: 0.5\n" in capsys.readouterr().out


PROBE = """
import sys
from {group}.__main__ import main
code = main(["--help"])
heavy = {{"torch", "numpy", "pydantic", "yaml", "wandb", "accelerate", "sklearn", "rich"}}
print(sorted(heavy & set(sys.modules)), code)
"""


@pytest.mark.parametrize("name", ROOMS)
def test_help_imports_nothing_heavy(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(group=name)],
        capture_output=True,
        text=True,
        check=True,
        cwd=CHECKOUT,
    )
    assert done.stdout.splitlines()[-1] == "[] 0"
