from __future__ import annotations

import errno
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import torch

import movienet_stream
from configs.errors import DataError, Interrupted
from configs.load import load_config
from configs.runtime.cli import CommandGroup, echo, run
from configs.schema import Config
from tests.configs.programs import COMMANDS, PROGRAMS

CHECKOUT = Path(__file__).parents[3]
COLUMNS = 80


def group() -> CommandGroup:
    toy = CommandGroup("movienet-toy", "A program for tests.")

    @toy.command(example="--only frames-00003")
    @click.option("--only", help="One shard.")
    def build(config: Config, only: str | None) -> int | None:
        """Build the planned shards."""
        echo(f"{config.encoder.name} {only}")
        if only == "bad":
            raise DataError("my  file: got\nnothing, want bytes")
        if only == "full":
            raise OSError(errno.ENOSPC, "No space left on device", "frames-00000.tar")
        if only == "array":
            np.empty(2**55)
        if only == "tensor":
            torch.empty(2**55)
        if only == "stop":
            raise Interrupted("saved at step 3; rerun the command to resume")
        return 3 if only == "findings" else None

    @toy.command(hidden=True)
    def probe(config: Config) -> None:
        """Run on a node."""
        echo(config.root)

    return toy


@pytest.mark.parametrize(
    ("only", "code"), [("x", 0), ("findings", 3), ("bad", 1), ("full", 1), ("stop", 75)]
)
def test_each_outcome_of_a_command_has_its_exit_code(only: str, code: int) -> None:
    assert run(group(), ["build", "--config", "demo", "--only", only]) == code


def exit_codes() -> dict[str, str]:
    """Return the exit codes of commands that report a state, as the README lists them."""
    readme = (CHECKOUT / "configs" / "README.md").read_text(encoding="utf-8")
    rows = readme.partition("| command | exit code |\n")[2].partition("\n\n")[0].splitlines()[1:]
    cells = [row.replace("`", "").split("|") for row in rows]
    return {command.strip(): codes.strip() for _, command, codes, _ in cells}


STATES = [(name, command) for name, command in COMMANDS if command in exit_codes()]
"""Programs and those of their commands that report a state."""


@pytest.mark.parametrize(("name", "command"), STATES)
def test_a_command_has_the_exit_codes_of_the_readme_in_all_programs(
    name: str, command: str
) -> None:
    help_text = " ".join((PROGRAMS[name].group.commands[command].help or "").split())
    assert f"Exit code: {exit_codes()[command]}." in help_text


@pytest.mark.parametrize("name", [name for name, command in STATES if command == "status"])
def test_a_state_that_does_not_exist_yet_is_not_complete(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ["--config", "demo", f"data.root={tmp_path}", f"data.dump={tmp_path}/dump"]
    assert PROGRAMS[name].main(["status", *config]) == 1
    assert PROGRAMS[name].main(["status", *config, "data.rot=x"]) == 2
    capsys.readouterr()


def test_repair_means_the_same_in_all_programs() -> None:
    texts = {
        option.help
        for name, command in COMMANDS
        for option in PROGRAMS[name].group.commands[command].params
        if isinstance(option, click.Option) and "--repair" in option.opts
    }
    assert texts == {"Mark damaged shards as missing; builds nothing."}


@pytest.mark.parametrize("only", ["array", "tensor"])
def test_a_lack_of_memory_is_one_line_that_names_what_to_lower(
    capsys: pytest.CaptureFixture[str], only: str
) -> None:
    program = group()
    program.name = "movienet-encode"
    assert run(program, ["build", "--config", "demo", "--only", only]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"error: out of memory \(.*\); lower encoder.batch_size or", line)


def test_an_expected_failure_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    run(group(), ["build", "--config", "demo", "--only", "bad"])
    assert capsys.readouterr().err == "error: my  file: got nothing, want bytes\n"


def test_an_error_of_the_system_is_reported_with_the_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(group(), ["build", "--config", "demo", "--only", "full"])
    assert capsys.readouterr().err == "error: frames-00000.tar: No space left on device\n"


def test_a_result_keeps_its_text_and_tabs_but_no_control_codes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    echo("#SBATCH\t-n 2\nAm\u00e9lie\u00a0: \u202f! می\u200cخواهم\x1b[2J\r")
    assert capsys.readouterr().out == (
        "#SBATCH\t-n 2\nAm\u00e9lie\u00a0: \u202f! می\u200cخواهم\\x1b[2J\\r\n"
    )


def test_debug_shows_the_traceback_of_an_expected_failure() -> None:
    with pytest.raises(DataError):
        run(group(), ["build", "--config", "demo", "--only", "bad", "--debug"])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["biuld"], "did you mean 'build'?"),
        (["build"], "--config: missing"),
        (["build", "--config", "demo", "--onyl", "x"], "--onl"),
        (["build", "--config", "demo", "traning.lr=1"], "did you mean 'training'?"),
    ],
)
def test_wrong_use_exits_with_2_and_suggests_the_correction(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(group(), argv) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("movienet-train", ["export", "RUN"]),
        ("movienet-eval", ["report", "RUN"]),
        ("movienet-eval", ["search", "--config", "demo", "a car"]),
        ("movienet-eval", ["predict", "film.mp4", "--model", "RUN"]),
        ("movienet-eval", ["compare", "RUN", "RUN"]),
    ],
)
def test_an_impossible_output_is_refused_before_the_work(
    program: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.touch()
    folder.mkdir()
    wrong, line = (
        (folder, f"{folder} is a folder, want a file")
        if words[0] == "export"
        else (file, f"{file} is a file, want a folder")
    )
    for out, message in ((wrong, line), (file / "new", f"{file} is a file, want a folder")):
        assert PROGRAMS[program].main([*words, "--out", str(out)]) == 2
        assert capsys.readouterr().err == f"error: --out: {message}\n"


def test_a_tilde_in_an_option_is_expanded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    program = CommandGroup("program", "A program.")

    @click.option("--out", help="A folder.")
    def show(config: Config, out: str) -> None:
        echo(f"{config.training.run_name} {out}")

    program.command("show")(show)
    assert run(program, ["show", "--config=demo", "--out=~/films"]) == 0
    assert capsys.readouterr().out == "demo /home/ada/films\n"


def test_print_config_prints_the_resolved_config_and_runs_nothing(
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


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_imports_nothing_heavy(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(group=PROGRAMS[name].package)],
        capture_output=True,
        text=True,
        check=True,
        cwd=CHECKOUT,
    )
    assert done.stdout.splitlines()[-1] == "[] 0"


def help_lines(name: str, *command: str) -> list[str]:
    """Return the help screen of a program or command on a terminal of 80 columns."""
    assert name == PROGRAMS[name].group.name
    with click.Context(PROGRAMS[name].group, info_name=name, terminal_width=COLUMNS) as context:
        if not command:
            return PROGRAMS[name].group.get_help(context).splitlines()
        subcommand = PROGRAMS[name].group.commands[command[0]]
        with click.Context(subcommand, info_name=command[0], parent=context) as inner:
            return subcommand.get_help(inner).splitlines()


def joined(lines: list[str]) -> str:
    return " ".join(" ".join(lines).split())


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_help_of_a_program_lists_every_command_with_its_complete_summary(name: str) -> None:
    screen = joined(help_lines(name))
    assert "..." not in screen.replace("[ARGS]...", "")
    for command in PROGRAMS[name].group.commands.values():
        summary = command.get_short_help_str(limit=500)
        assert summary.endswith(".")
        assert (f"{command.name} {summary}" in screen) is not command.hidden


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_the_help_of_a_command_ends_with_an_example_that_parses(name: str, command: str) -> None:
    example = "\n".join(help_lines(name, command)).partition("Example: ")[2]
    # Like a shell, join lines at a backslash: shlex does not.
    program, first, *words = shlex.split(example.replace("\\\n", ""))
    assert (program, first) == (name, command)
    subcommand = PROGRAMS[name].group.commands[command]
    arguments = subcommand.make_context(command, words).params
    assert arguments.get("config_path", "FILE") in (None, "FILE")
    if overrides := arguments.get("overrides"):
        load_config("demo", overrides)


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_every_option_has_a_help_text(name: str, command: str) -> None:
    for option in PROGRAMS[name].group.commands[command].params:
        assert isinstance(option, click.Argument) or getattr(option, "help", None), option.opts


@pytest.mark.parametrize(("name", "command"), [*((name, "") for name in PROGRAMS), *COMMANDS])
def test_no_line_of_a_help_screen_exceeds_80_columns(name: str, command: str) -> None:
    lines = help_lines(name, *filter(None, [command]))
    assert max(len(line) for line in lines) <= COLUMNS


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_prints_its_version(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert PROGRAMS[name].main(["--version"]) == 0
    assert capsys.readouterr().out == f"{name}, version {movienet_stream.__version__}\n"


def test_a_hidden_command_is_not_listed_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(group(), ["--help"]) == 0
    screen = capsys.readouterr().out
    assert "build" in screen
    assert "probe" not in screen


@pytest.mark.parametrize(
    ("words", "given", "local_rank"),
    [
        (["--local-rank=1", "build"], "", "1"),  # torch.distributed.launch
        (["--local_rank=1", "build"], "", "1"),  # deepspeed
        (["build", "--local_rank", "1"], "", "1"),
        (["--local_rank=1", "build"], "0", "0"),
    ],
)
def test_the_option_of_launchers_is_accepted_and_the_variable_has_priority(
    words: list[str], given: str, local_rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", given)
    assert run(group(), [*words, "--config", "demo"]) == 0
    assert os.environ["LOCAL_RANK"] == local_rank
