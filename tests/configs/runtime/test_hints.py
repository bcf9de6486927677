from __future__ import annotations

import shlex
from threading import Thread

import pytest

from configs.errors import DataError
from configs.runtime.cli import CommandGroup, echo, run
from configs.runtime.hints import hint, remember_arguments, remembered_arguments
from configs.schema import Config


def words(hint_text: str) -> list[str]:
    """Split a hint as a shell does after pasting the text between the backticks."""
    assert hint_text[0] == hint_text[-1] == "`"
    return shlex.split(hint_text.strip("`"))


def test_a_hint_repeats_the_users_config_and_overrides() -> None:
    remember_arguments("my.yaml", ["data.limit=20", "training.lr=3e-4"])
    assert hint("movienet-shard plan --replace") == (
        "`movienet-shard plan --replace --config my.yaml data.limit=20 training.lr=3e-4`"
    )


def test_a_hint_is_quoted_for_a_shell() -> None:
    arguments = ["--config", "my films/a$b.yaml", "data.limit=[tt1, tt2]", "data.root=it's"]
    remember_arguments(arguments[1], arguments[2:])
    assert words(hint("movienet-shard build")) == ["movienet-shard", "build", *arguments]


def test_an_override_of_the_hint_replaces_the_users_own() -> None:
    remember_arguments("my.yaml", ["data.limit=20", "data.limit_x=1", "stream.window=8"])
    assert words(hint("movienet-train run", "data.limit=5"))[2:] == [
        *("--config", "my.yaml", "data.limit_x=1", "stream.window=8", "data.limit=5"),
    ]


def test_without_a_config_a_hint_contains_a_placeholder() -> None:
    assert hint("movienet-shard build") == "`movienet-shard build --config FILE`"


def test_a_hint_from_a_thread_contains_the_users_arguments() -> None:
    remember_arguments("my.yaml", [])
    hints: list[str] = []
    thread = Thread(target=lambda: hints.append(hint("movienet-shard build")))
    thread.start()
    thread.join()
    assert hints == ["`movienet-shard build --config my.yaml`"]


def test_remembered_arguments_can_be_restored_in_another_process() -> None:
    remember_arguments("my.yaml", ["data.limit=20"])
    _, config, *overrides = remembered_arguments()
    remember_arguments(None, ())
    remember_arguments(config, overrides)
    assert hint("movienet-shard build") == "`movienet-shard build --config my.yaml data.limit=20`"


def test_a_pasted_hint_runs_with_the_same_configuration(
    capsys: pytest.CaptureFixture[str],
) -> None:
    group = CommandGroup("toy", "A program for tests.")

    @group.command()
    def check(config: Config) -> None:
        """Fail with a hint."""
        raise DataError(f"no plan for {config.encoder.name}; run {hint('toy plan')}")

    @group.command()
    def plan(config: Config) -> None:
        """Print the root."""
        echo(config.root)

    assert run(group, ["check", "--config", "demo", "data.root=my films", "data.limit=20"]) == 1
    pasted = shlex.split(capsys.readouterr().err.split("`")[1])
    assert pasted[0] == group.name
    assert run(group, pasted[1:]) == 0
    assert capsys.readouterr().out == "my films/limit-20\n"
