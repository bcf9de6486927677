"""Old names of keys, values, commands and options are answered with the new ones."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs import renamed
from configs.errors import ConfigError
from configs.load import dump_config, load_config
from configs.renamed import KEYS, OPTIONS, VALUES
from configs.schema import Config
from tests.configs.programs import COMMANDS, PROGRAMS

OLD_CONFIG = Path(__file__).with_name("old_config.yaml")
WITH_CONFIG = [
    (name, command) for name, command in COMMANDS if PROGRAMS[name].takes_config(command)
]
OLD_VALUES = [(key, old, new) for key, values in VALUES.items() for old, new in values.items()]


def is_key(dotted: str) -> bool:
    section, _, key = dotted.partition(".")
    model: Any = Config.model_fields[section].annotation
    return any(key == (field.alias or name) for name, field in model.model_fields.items())


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_old_config_contains_every_renamed_key() -> None:
    tree = yaml.safe_load(OLD_CONFIG.read_text())
    keys = {f"{section}.{key}" for section in tree if section != "version" for key in tree[section]}
    assert keys - {"data.root", "encoder.name"} == set(KEYS)


@pytest.mark.parametrize(("program", "command"), WITH_CONFIG)
def test_each_command_answers_an_old_config_with_all_new_names_in_one_line(
    program: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = PROGRAMS[program].arguments(command)
    assert PROGRAMS[program].main([*arguments, "--config", str(OLD_CONFIG)]) == 2
    line = error_line(capsys)
    assert line.startswith(f"error: {OLD_CONFIG}: renamed, change to the new names: ")
    for old, new in KEYS.items():
        if new not in VALUES:
            assert f"{old} -> {new}" in line
    assert "encoder.frames: keep -> encoder.frame_storage: persistent" in line
    assert "stream.sample: windows -> stream.sampling: random_window" in line


@pytest.mark.parametrize(("old", "new"), KEYS.items())
def test_a_renamed_key_is_a_key_of_the_schema_under_its_new_name_only(old: str, new: str) -> None:
    assert is_key(new)
    assert not is_key(old)


@pytest.mark.parametrize(("old", "new"), KEYS.items())
def test_an_override_of_an_old_key_is_answered_with_the_new_key(old: str, new: str) -> None:
    with pytest.raises(ConfigError, match=rf"^override '{old}=1': renamed, .*: {old} -> {new}$"):
        load_config("demo", [f"{old}=1"])


@pytest.mark.parametrize(("key", "old", "new"), OLD_VALUES)
def test_an_old_value_is_answered_with_the_new_value_which_is_valid(
    key: str, old: str, new: str
) -> None:
    with pytest.raises(ConfigError, match=rf"renamed, .*: {key}: {old} -> {key}: {new}$"):
        load_config("demo", [f"{key}={old}"])
    section, _, name = key.partition(".")
    assert getattr(getattr(load_config("demo", [f"{key}={new}"]), section), name) == new


@pytest.mark.parametrize(("old", "new"), renamed.COMMANDS.items())
def test_an_old_command_is_answered_with_the_new_one_and_the_users_arguments(
    old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (program, old_command), (new_program, new_command) = old.split(), new.split()
    arguments = ["--config", "my config.yaml", "data.limit=20"]
    assert PROGRAMS[program].main([old_command, *arguments]) == 2
    line = error_line(capsys)
    assert line.startswith(f"error: {old}: renamed, run `{new} ")
    assert shlex.split(line.split("`")[1]) == [new_program, new_command, *arguments]
    assert new_command in PROGRAMS[new_program].group.commands
    assert old_command not in PROGRAMS[program].group.commands


@pytest.mark.parametrize(("old", "new"), OPTIONS.items())
def test_an_old_option_is_answered_with_the_new_one_by_each_command_that_has_it(
    old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with_new = [
        (program, command)
        for program, command in COMMANDS
        if any(new in option.opts for option in PROGRAMS[program].group.commands[command].params)
    ]
    assert with_new
    for program, command in with_new:
        assert PROGRAMS[program].main([command, "--config", "demo", old, "1"]) == 2
        assert error_line(capsys) == f"error: {program} {command}: {old}: renamed, pass {new}"


@pytest.mark.parametrize(("value", "lines"), [("exact", 0), ("fast", 1)])
def test_a_removed_key_of_a_stored_configuration_is_ignored_with_a_line_if_it_has_no_effect(
    value: str, lines: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    demo = load_config("demo")
    tree = yaml.safe_load(dump_config(demo))
    tree["encoder"]["preprocess"] = value
    stored = tmp_path / "config.yaml"
    stored.write_text(yaml.safe_dump(tree))
    assert load_config(stored) == demo
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == lines
    assert all(
        f"{stored}: encoder.preprocess: {value} has no effect" in message for message in messages
    )
    assert Config.model_validate(tree) == demo  # as in checkpoints


def test_an_override_of_a_removed_key_is_answered_with_its_replacement() -> None:
    with pytest.raises(ConfigError, match=r"^override .*: encoder\.preprocess was removed: "):
        load_config("demo", ["encoder.preprocess=fast"])
