"""The installed programs and their commands, as pyproject.toml defines them."""

from __future__ import annotations

import importlib
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from configs.runtime.cli import CommandGroup

CHECKOUT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Program:
    """One program, e.g. ``movienet-shard``."""

    name: str
    package: str
    main: Callable[[Sequence[str]], int]
    group: CommandGroup

    def takes_config(self, command: str) -> bool:
        """Return whether a command has the option ``--config``."""
        return any("--config" in option.opts for option in self.group.commands[command].params)

    def arguments(self, command: str) -> list[str]:
        """Return a command with a value for each of its required arguments and options."""
        words = [command]
        for option in self.group.commands[command].params:
            if isinstance(option, click.Option) and option.required:
                choices = getattr(option.type, "choices", ["1"])
                words += [option.opts[0], str(choices[0])]
            elif isinstance(option, click.Argument) and option.required:
                words.append("1")
        return words


def programs() -> dict[str, Program]:
    """Return every program by name."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    return {name: _load(name, target) for name, target in project["scripts"].items()}


def _load(name: str, target: str) -> Program:
    module_name, _, function = target.partition(":")
    module = importlib.import_module(module_name)
    return Program(name, module_name.split(".")[0], getattr(module, function), module.commands)


PROGRAMS = programs()


COMMANDS = [(name, command) for name in PROGRAMS for command in PROGRAMS[name].group.commands]
"""Program and command of all commands."""
