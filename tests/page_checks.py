"""What a page may print: commands, options and keys that exist, and configurations that load."""

from __future__ import annotations

import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import yaml

from configs.errors import ConfigError
from configs.load import load_config
from configs.renamed import REMOVED
from configs.schema import Config
from tests.snippets import CHECKOUT, snippets

PROGRAMS: dict[str, str] = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"][
    "scripts"
]
MODULES = {target.partition(".")[0]: program for program, target in PROGRAMS.items()}
"""Package -> its program, for ``python -m PACKAGE``."""

SECTIONS = tuple(name for name in Config.model_fields if name != "version")
SHELL = ("", "bash", "console")

_PROGRAM = "|".join(map(re.escape, PROGRAMS))
_MAKEFILE = (CHECKOUT / "Makefile").read_text()
_REQUIRED: dict[str, Any] = {
    "version": 1,
    "data": {"root": "data"},
    "encoder": {"name": "vit"},
    "training": {"run_name": "run"},
}
"""A configuration to which a fragment is added."""

_UNKNOWN = "unknown key|renamed|is a value|is a section"


# --- finding --------------------------------------------------------------------------------------


def commands_of(page: Path) -> Iterator[str]:
    """Yield every ``movienet-… COMMAND …`` and ``make TARGET`` that a page prints."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = [code for codes in snippets(page, *SHELL).values() for code in codes]
    printed = [line for block in blocks for line in _typed(block.replace("\\\n", " "))]
    indented = re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)
    prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S)
    for line in [*printed, *indented, *re.findall(r"`([^`\n]+)`", prose)]:
        if (command := our_command(line)) is not None:
            yield command


def _typed(block: str) -> list[str]:
    """Return what the user types: the lines after a prompt, or all lines if there is none."""
    lines = block.splitlines()
    typed = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return typed or lines


def our_command(line: str) -> str | None:
    """Return the command of ours in a line, however it is launched; None if there is none."""
    line = re.sub(r"(^|\s+)#.*", "", line).strip()
    if match := re.match(rf"(?:\S+=\S+ )*((?:{_PROGRAM}|make)\b(?![\w.:/-]).*)", line):
        return match[1]
    if match := re.search(rf"(?:-m|--module) ({'|'.join(MODULES)})\b(.*)", line):
        return MODULES[match[1]] + match[2]
    if match := re.match(rf"(?:apptainer|docker|mpi\w+|podman|srun)\b.* ((?:{_PROGRAM}) .*)", line):
        return match[1]
    return None


def keys_of(page: Path) -> Iterator[str]:
    """Yield every ``section.key`` of the configuration that a page mentions."""
    # Neither a file, such as model.safetensors or tracking.py, nor a path to a class.
    pattern = rf"`((?:{'|'.join(SECTIONS)})\.(?!py\b|safetensors\b)\w+)(?=[`=:])"
    yield from re.findall(pattern, page.read_text("utf-8"))


# --- checking -------------------------------------------------------------------------------------


def problems_of(page: Path) -> list[str]:
    """Return what is wrong with the commands and keys of a page, each with its text."""
    commands = {line: problem_of_command(line) for line in commands_of(page)}
    keys = {key: problem_of_key(key) for key in keys_of(page)}
    return [f"{text}: {problem}" for text, problem in (commands | keys).items() if problem]


def problem_of_command(line: str) -> str | None:
    """Return what is wrong with a command of ours; None if nothing is."""
    # [--decode] is optional and [--a | --b] a choice: every word in brackets must exist.
    program, *words = shlex.split(line.translate(str.maketrans("[]|…", "    ")))
    words = [word for word in words if word not in ("(", ")")]
    if program == "make":
        return _problem_of_make(words)
    if not words or words[0] in ("--help", "--version"):
        return None
    module, _, _ = PROGRAMS[program].partition(":")
    name, *arguments = words
    command = importlib.import_module(module).commands.commands.get(name)
    if command is None:
        return f"{program} has no command {name}"
    try:
        positional, options = _parse(command, arguments)
    except click.UsageError as error:
        return error.format_message()
    return _problem_of_overrides(options.get("config_path"), positional)


def _parse(command: click.Command, arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Return positional arguments and options; click raises its error for a wrong option."""
    context = click.Context(command)
    values, _, _ = command.make_parser(context).parse_args(list(arguments))
    positional: list[Any] = []
    for parameter in command.params:
        value = values.get(str(parameter.name))
        if isinstance(parameter, click.Argument):
            positional += value if isinstance(value, tuple) else [value]
        elif isinstance(parameter.type, click.Choice) and isinstance(value, str):
            parameter.type.convert(value, parameter, context)
    return [word for word in positional if isinstance(word, str)], values


def _is_placeholder(value: object) -> bool:
    """Return whether a reader replaces a value: N, FILE, a name with three dots."""
    return re.search(r"\b[A-Z]+\b|\.\.\.", str(value)) is not None


def _problem_of_overrides(config: object, words: list[str]) -> str | None:
    is_preset = isinstance(config, str) and (CHECKOUT / "configs" / f"{config}.yaml").is_file()
    preset = str(config) if is_preset else "demo"
    overrides = [word for word in words if re.match(r"[a-z_]+\.[a-z_.]+=", word)]
    exact = [word for word in overrides if not _is_placeholder(word)]
    placeholders = [[word] for word in overrides if _is_placeholder(word)]
    for group in (exact, *placeholders):
        try:
            load_config(preset, group)
        except ConfigError as error:
            if group == exact or re.search(_UNKNOWN, str(error)):
                return str(error)
    return None


def _problem_of_make(words: list[str]) -> str | None:
    for word in words:
        name, equals, _ = word.partition("=")
        pattern = rf"^{re.escape(name)} [?:]?=|\$\({name}\)" if equals else rf"^{re.escape(name)}:"
        if not re.search(pattern, _MAKEFILE, re.MULTILINE):
            return f"the Makefile has no {'variable' if equals else 'target'} {name}"
    return None


def problem_of_key(dotted: str) -> str | None:
    """Return that a key is unknown; a module of the same name, e.g. training.models, is none."""
    section, _, name = dotted.partition(".")
    fields: dict[str, Any] = getattr(Config.model_fields[section].annotation, "model_fields", {})
    is_key = name in fields or name in {field.alias for field in fields.values()}
    is_key = is_key or dotted in REMOVED  # a page may state what became of it
    package = CHECKOUT / section
    is_module = (package / name).is_dir() or (package / f"{name}.py").is_file()
    return None if is_key or is_module else f"no key {dotted}"


def problem_of_yaml(text: str, folder: Path) -> str | None:
    """Return why a configuration, or a fragment of one, does not load; None if it does."""
    tree = yaml.safe_load(text)
    if "apiVersion" in tree:  # of Kubernetes
        return None
    merged = dict(_REQUIRED)
    for name, section in tree.items():
        is_mapping = isinstance(section, dict)
        merged[name] = merged.get(name, {}) | section if is_mapping else section
    file = folder / "fragment.yaml"
    file.write_text(yaml.safe_dump(merged))
    try:
        load_config(file)
    except ConfigError as error:
        return str(error)
    return None


def problem_of_peer_code(code: str) -> str | None:
    """Return what is wrong with code of another project, which is compiled, but not run."""
    try:
        compile(code, "page", "exec")
    except SyntaxError as error:
        return str(error)
    ours = re.findall(rf"^(?:import|from) ({'|'.join(MODULES)}|movienet_stream)\b", code, re.M)
    return f"a block that imports {ours[0]} must be run: mark it as python" if ours else None
