"""READMEs and documentation work as printed: Python and YAML, commands, keys, tables of files."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState

import sharding.__main__
import training.__main__
from configs.schema import EncoderConfig
from sharding.format.plan import PlannedMovie
from sharding.frame_space import needed
from tests.page_checks import (
    MODULES,
    our_command,
    problem_of_command,
    problem_of_peer_code,
    problem_of_yaml,
    problems_of,
)
from tests.snippets import CHECKOUT, PAGES, READMES, run_snippet, snippets, write_user_files


def name_of(page: Path) -> str:
    """Return the path of a page in the repository."""
    return str(page.relative_to(CHECKOUT))


def blocks(language: str) -> list[Any]:
    """Return parameters of a test: page and code of all blocks of a language."""
    return [
        pytest.param(name_of(page), code, id=f"{name_of(page)}: {heading} ({number})")
        for page in PAGES
        for heading, codes in snippets(page, language).items()
        for number, code in enumerate(codes, 1)
    ]


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


@pytest.mark.slow
@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_a_python_snippet_begins_with_its_imports_and_runs_as_printed(
    page: str, code: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_import = [isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(code).body]
    assert is_import[0], page
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


@pytest.mark.slow
@pytest.mark.parametrize(("guide", "file"), [("own-model", "net.py"), ("own-loss", "loss.py")])
def test_the_code_of_a_guide_trains_with_the_configuration_that_it_prints(
    guide: str, file: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = CHECKOUT / "docs" / "how-to" / f"{guide}.md"
    ((code,),) = snippets(page).values()
    ((fragment,),) = snippets(page, "yaml").values()
    folder = shutil.copytree(prepared, tmp_path / "folder")
    (folder / file).write_text(code)
    printed = yaml.safe_load(fragment)
    config = yaml.safe_load((folder / "my.yaml").read_text())
    merged = config | {name: config.get(name, {}) | keys for name, keys in printed.items()}
    (folder / "guide.yaml").write_text(yaml.safe_dump(merged))
    monkeypatch.chdir(folder)
    run = ["run", "--config", "guide.yaml", "training.run_name=guide"]
    assert training.__main__.main(run) == 0


# --- command lines --------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_options_and_keys_of_a_page_exist(page: Path) -> None:
    assert problems_of(page) == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("movienet-train fit --config demo", "movienet-train has no command fit"),
        ("movienet-train run --config demo --fast", "No such option"),
        ("movienet-train run --config", "Option '--config' requires an argument"),
        ("movienet-slurm submit --only tests", "'tests' is not one of"),
        ("movienet-train run training.lrr=1", "unknown key"),
        ("movienet-train run training.epochs=0", "training.epochs: got 0"),
        ("movienet-train run training.epochs=N data.rot=DIR", "unknown key"),
        ("make dmeo", "no target dmeo"),
        ("make demo RANK=2", "no variable RANK"),
    ],
)
def test_a_page_with_an_unknown_command_option_or_key_is_refused(line: str, problem: str) -> None:
    assert problem in str(problem_of_command(line))


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("WANDB_MODE=offline movienet-train run", "movienet-train run"),
        ("accelerate launch --module training run --config my.yaml", "movienet-train run"),
        ("python -m eval report RUN  # comment", "movienet-eval report RUN"),
        ("apptainer exec --nv image.sif movienet-train status DIR", "movienet-train status DIR"),
        ("srun -n 2 movienet-encode run", "movienet-encode run"),
        ("make docs", "make docs"),
        ("movienet-stream.def", "None"),
        ("# make coffee", "None"),
    ],
)
def test_a_command_is_recognised_however_it_is_launched(line: str, command: str) -> None:
    assert str(our_command(line)).startswith(command)


@pytest.mark.parametrize("readme", PAGES, ids=name_of)
def test_a_command_is_printed_with_the_name_of_its_program(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    for package, program in MODULES.items():
        commands = "|".join(importlib.import_module(f"{package}.__main__").commands.commands)
        assert re.findall(rf"`{package} (?:{commands})\b[^`]*`", text) == [], f"want {program}"


# --- figures --------------------------------------------------------------------------------------


def test_the_disk_needs_of_movienet_are_computed_as_the_stages_compute_them() -> None:
    page = (CHECKOUT / "docs" / "movienet.md").read_text()
    rows = page.partition("| on disk |")[2].splitlines()[2:7]
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
    total = page.partition("| in total |")[2].splitlines()[0]
    assert total == f" {round(sum(temporary))} GB | {round(sum(persistent))} GB |"


def test_the_page_about_movienet_prints_the_output_of_check_as_it_is_today() -> None:
    output = (CHECKOUT / "tests" / "golden" / "check.txt").read_text(encoding="utf-8")
    assert output in (CHECKOUT / "docs" / "movienet.md").read_text(encoding="utf-8")


# --- keys and files -------------------------------------------------------------------------------


def test_a_page_with_an_unknown_command_or_key_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n- Set `stream.widow`.\n\n  ```bash\n  movienet-train fit\n  ```\n")
    assert problems_of(page) == [
        "movienet-train fit: movienet-train has no command fit",
        "stream.widow: no key stream.widow",
    ]


@pytest.mark.parametrize(("page", "code"), blocks("yaml"))
def test_a_configuration_of_a_page_loads(page: str, code: str, tmp_path: Path) -> None:
    problem = problem_of_yaml(code, tmp_path)
    assert problem is None, f"{page}: {problem}"


@pytest.mark.parametrize(
    ("fragment", "problem"),
    [
        ("stream: {widow: 64}", "unknown key 'widow'"),
        ("stream: {window: 0}", "stream.window: got 0"),
        ("streams: {window: 64}", "unknown key 'streams'"),
        ("training: {lr: 1, patience: 3, holdout: 0}", "training.patience: got 3"),
    ],
)
def test_a_page_with_a_wrong_configuration_is_refused(
    fragment: str, problem: str, tmp_path: Path
) -> None:
    assert problem in str(problem_of_yaml(fragment, tmp_path))


@pytest.mark.parametrize(("page", "code"), blocks("py"))
def test_code_of_another_project_compiles_and_imports_nothing_of_ours(page: str, code: str) -> None:
    assert problem_of_peer_code(code) is None, page


def test_our_code_is_run_and_not_only_compiled() -> None:
    assert "must be run" in str(problem_of_peer_code("from movienet_stream import Config"))
    assert problem_of_peer_code("for x in") is not None


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
