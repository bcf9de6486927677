"""The READMEs work as printed: Python blocks, command lines, keys and tables of files."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState

import sharding.__main__
import training.__main__
from configs.errors import ConfigError
from configs.load import load_config
from configs.schema import Config, EncoderConfig
from sharding.format.plan import PlannedMovie
from sharding.frame_space import needed
from tests.snippets import CHECKOUT, READMES, run_snippet, snippets, write_user_files

PYTHON = [
    pytest.param(code, id=f"{readme.relative_to(CHECKOUT)}: {heading} ({number})")
    for readme in READMES
    for heading, codes in snippets(readme).items()
    for number, code in enumerate(codes, 1)
]
PROGRAMS: dict[str, str] = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"][
    "scripts"
]
MODULES = {target.partition(".")[0]: program for program, target in PROGRAMS.items()}
"""Package -> its program, for ``python -m PACKAGE``."""

SECTIONS = tuple(name for name in Config.model_fields if name != "version")
GENRES = ("Drama", "Comedy", "Western")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a feature set, two trained and exported models, ``my.yaml`` and ``net.py``."""
    folder = tmp_path_factory.mktemp("examples")
    values = np.random.default_rng(0)
    movies = [f"tt{32138 + number:07d}" for number in range(24)]
    (folder / "arrays").mkdir()
    for movie in movies:
        rows_ND = values.normal(size=(values.integers(4, 30), 8)).astype(np.float32)
        np.save(folder / "arrays" / f"{movie}.npy", rows_ND)
    genres = {movie: [GENRES[number % 3]] for number, movie in enumerate(movies)}
    (folder / "genres.json").write_text(json.dumps(genres))
    split = {"train": movies[:16], "val": movies[16:], "test": []}
    (folder / "split.json").write_text(json.dumps(split))
    data = {"feature_arrays": "arrays", "metadata": "genres.json", "split": "split.json"}
    write_user_files(folder, data=data)
    config = ["--config", "my.yaml"]
    own = ["training.run_name=run", "model.class=./net.py:Net", "model.options={}"]
    with chdir(folder):
        assert sharding.__main__.main(["import-features", *config]) == 0
        for overrides, run in (([], "masked-lstm"), (own, "run")):
            assert training.__main__.main(["run", *config, *overrides]) == 0
            export = ["export", f"data/runs/{run}", "--checkpoint", "last"]
            assert training.__main__.main([*export, "--out", f"{run}.safetensors"]) == 0
    return folder


@pytest.mark.parametrize("code", PYTHON)
def test_a_python_snippet_begins_with_its_imports_and_runs_as_printed(
    code: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_import = [isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(code).body]
    assert is_import[0]
    assert is_import == sorted(is_import, reverse=True)
    folder = shutil.copytree(prepared, tmp_path / "folder")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    try:
        run_snippet(code)
    finally:
        # Accelerate keeps process-wide state, which would affect later tests.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


# --- command lines --------------------------------------------------------------------------------


def command_lines() -> Iterator[tuple[str, str]]:
    """Yield every command of ours in the READMEs: where it is printed, and its text."""
    for readme in READMES:
        text = readme.read_text(encoding="utf-8").replace("\\\n", " ")
        fenced = [code for codes in snippets(readme, "", "bash").values() for code in codes]
        shell = [code.replace("\\\n", " ") for code in fenced]
        indented = re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)
        spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
        lines = [line for code in shell for line in code.splitlines()] + indented + spans
        for line in lines:
            if (command := _our_command(line)) is not None:
                yield str(readme.relative_to(CHECKOUT)), command


def _our_command(line: str) -> str | None:
    """Return ``movienet-… COMMAND …`` in a line, however it is launched; None if there is none."""
    line = re.sub(r"\s+#.*", "", line)
    programs = "|".join(map(re.escape, PROGRAMS))
    if match := re.match(rf"(?:\S+=\S+ )*((?:{programs})\b.*)", line.strip()):
        return match[1]
    packages = "|".join(MODULES)
    if match := re.search(rf"(?:-m|--module) ({packages})\b(.*)", line):
        return MODULES[match[1]] + match[2]
    return None


@pytest.mark.parametrize(("readme", "line"), sorted(set(command_lines())))
def test_a_command_line_names_an_existing_command_options_and_keys(readme: str, line: str) -> None:
    # [--decode] is optional and [--a | --b] a choice: every word in brackets must exist.
    program, *words = shlex.split(line.translate(str.maketrans("[]|…", "    ")))
    module, _, _ = PROGRAMS[program].partition(":")
    group = importlib.import_module(module).commands
    words = [word for word in words if word not in ("(", ")")]
    if not words or words[0] in ("--help", "--version"):
        return
    name, *arguments = words
    assert name in group.commands, f"{readme}: {line}"
    command = group.commands[name]
    for word in _positional(command, arguments, f"{readme}: {line}"):
        if re.match(r"[a-z_]+\.[a-z_.]+=", word):
            problem = _problem_of_key(word)
            assert problem is None, f"{readme}: {line}: {problem}"


def _positional(command: click.Command, arguments: list[str], where: str) -> list[str]:
    """Return the words that are no options; fail at an option that the command lacks."""
    options = {
        name: option
        for option in command.params
        if isinstance(option, click.Option)
        for name in option.opts
    }
    rest = iter(arguments)
    positional = []
    for word in rest:
        if not word.startswith("-"):
            positional.append(word)
            continue
        name, _, value = word.partition("=")
        assert name in options or name == "--help", f"{where}: no option {name}"
        if name in options and not options[name].is_flag and not value:
            next(rest, None)
    return positional


def _problem_of_key(override: str) -> str | None:
    try:
        load_config("demo", [override])
    except ConfigError as error:
        # A placeholder such as K or FILE may be a wrong value; the key must exist.
        if re.search(r"unknown key|renamed|is a value|is a section", str(error)):
            return str(error)
    return None


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_a_command_is_printed_with_the_name_of_its_program(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    for package, program in MODULES.items():
        commands = "|".join(importlib.import_module(f"{package}.__main__").commands.commands)
        assert re.findall(rf"`{package} (?:{commands})\b[^`]*`", text) == [], f"want {program}"


# --- figures --------------------------------------------------------------------------------------


def test_the_disk_needs_of_movienet_are_computed_as_the_stages_compute_them() -> None:
    rows = (CHECKOUT / "README.md").read_text().partition("| on disk |")[2].splitlines()[2:7]
    temporary, persistent = (
        [float(match[1]) if (match := re.match(r" ([\d.]+) GB", row.split("|")[column])) else 0
         for row in rows]
        for column in (2, 3)
    )  # fmt: skip
    n_movies, images = 1_100, 4_800_000
    movies = [
        PlannedMovie(f"tt{k}", "", "", "", images // n_movies, 161 * 10**9 // n_movies, k // 3)
        for k in range(n_movies)
    ]
    frames = needed(movies).n_bytes or 0
    features = images * (2 * 512 + 4)
    scratch = EncoderConfig.model_fields["scratch_bytes"].default
    weights_and_run = 1.0
    assert persistent == [161, round(frames / 1e9), 0, round(features / 1e9, 1), weights_and_run]
    assert temporary == [161, 0, round(scratch / 1e9, 1), *persistent[3:]]
    total = (CHECKOUT / "README.md").read_text().partition("| in total |")[2].splitlines()[0]
    assert total == f" {round(sum(temporary))} GB | {round(sum(persistent))} GB |"


# --- keys and files -------------------------------------------------------------------------------


def keys() -> Iterator[tuple[str, str]]:
    """Yield every ``section.key`` of the configuration that a README mentions."""
    sections = "|".join(SECTIONS)
    for readme in READMES:
        # Neither a file, such as model.safetensors or tracking.py, nor a path to a class.
        pattern = rf"`((?:{sections})\.(?!py\b|safetensors\b)\w+)(?=[`=:])"
        for key in re.findall(pattern, readme.read_text("utf-8")):
            yield str(readme.relative_to(CHECKOUT)), key


@pytest.mark.parametrize(("readme", "key"), sorted(set(keys())))
def test_a_key_of_the_configuration_exists(readme: str, key: str) -> None:
    section, _, name = key.partition(".")
    model = Config.model_fields[section].annotation
    fields: dict[str, Any] = getattr(model, "model_fields", {})
    is_key = name in fields or name in {field.alias for field in fields.values()}
    package = CHECKOUT / section  # the name of a module, e.g. training.models
    is_module = (package / name).is_dir() or (package / f"{name}.py").is_file()
    assert is_key or is_module, f"{readme}: no key {key}"


def tables() -> Iterator[tuple[Path, str, str]]:
    """Yield the rows of every "Where to find what" table: README, task, cell of files."""
    for readme in READMES:
        text = readme.read_text(encoding="utf-8")
        section = text.partition("\n## Where to find what\n")[2].partition("\n## ")[0]
        rows = [line for line in section.splitlines() if line.startswith("|")]
        for task, files in (row.strip("| ").split("|", 1) for row in rows[2:]):
            yield readme, task.strip(), files


def paths_in(cell: str) -> list[str]:
    """Return the existing files and folders of a table's cell; NAME.py is one to be added."""
    paths = re.findall(r"`([\w./-]+(?:\.(?:py|md|csv|j2|cfg|yaml|json)|/))`", cell)
    return [path for path in paths if "NAME" not in path]


def test_every_path_in_the_tables_of_files_exists() -> None:
    missing = [
        f"{readme.relative_to(CHECKOUT)}: {path}"
        for readme, _, cell in tables()
        for path in paths_in(cell)
        if not (readme.parent / path).exists() and not (CHECKOUT / path).exists()
    ]
    assert missing == []


@pytest.mark.parametrize(
    ("package", "task", "file"),
    [
        ("sharding", "storage back end", "sharding/storage/open.py"),
        ("sharding", "archive format", "sharding/dump/archives.py"),
        ("training", "custom loss", "training/loss.py"),
    ],
)
def test_a_newcomer_finds_the_file_of_a_task_by_its_name(
    package: str, task: str, file: str
) -> None:
    cells = [
        cell
        for readme, name, cell in tables()
        if readme.parent.name == package and task in name.lower()
    ]
    assert len(cells) == 1, f"{package}/README.md: want one row of {task!r}"
    assert CHECKOUT / file in [CHECKOUT / package / path for path in paths_in(cells[0])]


@pytest.mark.parametrize(
    "package", ["configs", "sharding", "encoders", "training", "training/stream", "eval"]
)
def test_a_package_has_a_table_of_its_files(package: str) -> None:
    assert CHECKOUT / package / "README.md" in {readme for readme, _, _ in tables()}
