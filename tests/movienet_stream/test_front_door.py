"""The Python interface: names, laziness and what they refer to."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import movienet_stream
from configs.runtime.logs import PACKAGES

CHECKOUT = Path(__file__).parents[2]


def python(code: str) -> str:
    """Run code in a fresh interpreter; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CHECKOUT
    )
    return done.stdout


def test_importing_the_interface_loads_no_other_package_of_ours_and_no_torch() -> None:
    code = "import sys, movienet_stream; print(*sys.modules)"
    loaded = {name.partition(".")[0] for name in python(code).split()}
    assert loaded & {"torch", "numpy", "pydantic", *PACKAGES} == {"movienet_stream", "__main__"}


@pytest.mark.slow
def test_names_that_need_no_torch_load_none() -> None:
    code = """
import sys
from movienet_stream import Config, FeatureSet, MovieNetError, load_config, open_features
print("torch" in sys.modules)
from movienet_stream import load_exported
print("torch" in sys.modules, load_exported.__module__)
"""
    assert python(code).split() == ["False", "True", "training.export"]


@pytest.mark.parametrize("name", movienet_stream.__all__)
def test_each_name_is_the_object_of_its_package_and_is_described(name: str) -> None:
    exported = getattr(movienet_stream, name)
    assert exported is getattr(import_module(exported.__module__), name)
    assert exported.__doc__
    assert name in dir(movienet_stream)


def test_the_distribution_contains_the_types_of_each_package() -> None:
    settings = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "py.typed" in settings["package-data"]["*"]
    for package in settings["packages"]["find"]["include"]:
        assert (CHECKOUT / package.removesuffix("*") / "py.typed").is_file()


def test_type_checkers_see_the_same_names_as_programs() -> None:
    source = (CHECKOUT / "movienet_stream" / "__init__.py").read_text()
    imported = {
        alias.name: node.module
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.level == 0
        for alias in node.names
        if node.module not in ("__future__", "importlib", "importlib.metadata", "typing")
    }
    assert sorted(imported) == movienet_stream.__all__
    for name, module in imported.items():
        assert getattr(movienet_stream, name).__module__ == module


def test_the_names_of_the_interface_are_frozen() -> None:
    # Programs of users import them: a name may be added here, never renamed or removed.
    assert movienet_stream.__all__ == [
        "Batch",
        "Config",
        "Exported",
        "FeatureSet",
        "FeatureStream",
        "MovieNetError",
        "MovieRows",
        "Prediction",
        "Predictor",
        "View",
        "WebDatasetStream",
        "load_config",
        "load_exported",
        "open_features",
        "read_prediction",
        "score_batches",
    ]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'open_frames'"):
        _ = getattr(movienet_stream, "open_frames")  # noqa: B009  # mypy rejects the plain access


def test_load_config_accepts_a_path_and_text() -> None:
    path = CHECKOUT / "configs" / "demo.yaml"
    config = movienet_stream.load_config(str(path), ["stream.window=8"])
    assert config == movienet_stream.load_config(path, ["stream.window=8"])
    assert config.stream.window == 8
