"""What is installed and shipped: the wheel's files, versions, notices and container recipes.

`make installed` and `make lowest` install the wheel and run the demo with it.
"""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import movienet_stream
from configs.load import PRESETS, preset_files
from sharding.__main__ import main as shard
from slurm.freeze import PACKAGES

CHECKOUT = Path(__file__).resolve().parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def test_the_version_is_that_of_the_distribution() -> None:
    assert movienet_stream.__version__ == version("movienet-stream")


def test_the_citation_has_no_version_that_could_differ() -> None:
    assert "version" not in yaml.safe_load((CHECKOUT / "CITATION.cff").read_text())


def test_every_data_file_of_a_package_is_in_the_wheel() -> None:
    globs: dict[str, list[str]] = PYPROJECT["tool"]["setuptools"]["package-data"]
    for package in PACKAGES:
        patterns = [*globs["*"], *globs.get(package, [])]
        # Neither code, also compiled, nor pictures of READMEs.
        others = (".py", ".pyc", ".so", ".svg")
        data_files = [
            file.relative_to(CHECKOUT / package)
            for file in (CHECKOUT / package).rglob("*")
            if file.is_file() and file.suffix not in others
        ]
        missing = [file for file in data_files if not any(map(file.match, patterns))]
        assert missing == [], f"add them to package-data of {package} in pyproject.toml"


# --- presets --------------------------------------------------------------------------------------


def test_the_path_of_a_preset_can_be_used_in_a_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert shard(["presets", "movienet"]) == 0
    assert capsys.readouterr().out == f"{PRESETS / 'movienet.yaml'}\n"


def test_all_presets_are_listed_with_their_paths(capsys: pytest.CaptureFixture[str]) -> None:
    assert shard(["presets"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert {"demo", "movienet", "accelerate/gpu", "accelerate/cpu-2", "towers/demo"} <= set(rows)
    assert rows == {name: str(path) for name, path in preset_files().items()}


def test_for_a_mistyped_preset_the_nearest_is_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    assert shard(["presets", "accelerate/gpus"]) == 2
    expected = "error: presets: unknown key 'accelerate/gpus'; did you mean 'accelerate/gpu'?\n"
    assert capsys.readouterr().err == expected


# --- notices --------------------------------------------------------------------------------------


def test_every_library_that_users_install_is_listed_with_its_license() -> None:
    extras = PROJECT["optional-dependencies"]
    installed = [*PROJECT["dependencies"]]
    installed += [text for extra in set(extras) - {"dev", "docs"} for text in extras[extra]]
    rows = (CHECKOUT / "THIRD-PARTY.md").read_text().splitlines()
    listed = [row.split()[1] for row in rows if row.startswith("| ") and not row.startswith("| -")]
    assert sorted(listed[1:]) == sorted(Requirement(text).name for text in installed)


def test_the_license_files_exist() -> None:
    assert all((CHECKOUT / name).is_file() for name in PROJECT["license-files"])


def test_the_citation_names_the_software_its_license_and_the_dataset() -> None:
    citation = yaml.safe_load((CHECKOUT / "CITATION.cff").read_text())
    required = ("cff-version", "message", "title", "authors")
    assert all(citation[key] for key in required)
    assert (citation["title"], citation["license"]) == (PROJECT["name"], PROJECT["license"])
    assert any("MovieNet" in reference["title"] for reference in citation["references"])


# --- container recipes ----------------------------------------------------------------------------


def docker_lines() -> list[tuple[str, str]]:
    """Return instruction and arguments of each line of the Dockerfile, joined at backslashes."""
    text = (CHECKOUT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def apptainer_sections() -> dict[str, str]:
    """Return the sections of the definition file by name; "" is its header."""
    text = (CHECKOUT / "movienet-stream.def").read_text()
    parts = re.split(r"^%(\w+)\n", text, flags=re.MULTILINE)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def copied() -> dict[str, set[str]]:
    """Return what each recipe copies from the checkout."""
    docker = [rest.split()[:-1] for word, rest in docker_lines() if word == "COPY"]
    files = apptainer_sections()["files"].split()
    return {"docker": {name for names in docker for name in names}, "apptainer": {*files[::2]}}


@pytest.mark.parametrize("recipe", ["docker", "apptainer"])
def test_an_image_is_built_from_all_packages_and_notices(recipe: str) -> None:
    needed = {"pyproject.toml", "setup.py", "README.md", *PROJECT["license-files"], *PACKAGES}
    assert copied()[recipe] == needed
    assert all((CHECKOUT / name).exists() for name in copied()[recipe])


def test_the_context_of_docker_contains_what_it_copies() -> None:
    lines = (CHECKOUT / ".dockerignore").read_text().splitlines()
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == copied()["docker"]


def shell_scripts() -> Iterator[tuple[str, str]]:
    """Yield name and text of every shell script of the two recipes."""
    for word, rest in docker_lines():
        if word == "RUN":
            yield "docker", re.sub(r"^(--\S+\s+)+", "", rest)
    for name in ("post", "test", "runscript"):
        yield f"apptainer %{name}", apptainer_sections()[name]


@pytest.mark.parametrize(("name", "script"), list(shell_scripts()))
def test_the_commands_of_a_recipe_are_valid_in_a_posix_shell(name: str, script: str) -> None:
    done = subprocess.run(["sh", "-n"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{name}: {done.stderr}"


def test_both_images_have_the_same_python_and_extras() -> None:
    docker = "\n".join(f"{word} {rest}" for word, rest in docker_lines())
    apptainer = "\n".join(apptainer_sections().values())
    for text in (docker, apptainer):
        (extras,) = set(re.findall(r"\[([a-z\d,]+)\]\"", text))
        (python,) = set(re.findall(r"python:([\d.]+)-slim", text))
        assert set(extras.split(",")) == {"s3", "tensorboard", "video"}
        assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
        assert python in SpecifierSet(PROJECT["requires-python"])
