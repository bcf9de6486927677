"""The custom model in the README trains as printed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import forked
from tests.training.conftest import GENRES

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).resolve().parents[2]


def block(language: str, first: str) -> str:
    """Return the code block of the README that starts with this text."""
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    match = re.search(rf"```{language}\n({re.escape(first)}.*?)```", readme, re.DOTALL)
    assert match is not None
    return match[1]


def test_the_model_of_the_readme_trains_from_a_file_next_to_the_config(
    make_films: Callable[..., Any], tmp_path: Path
) -> None:
    make_films([9, 5, 7, 12, 4, 8, 6, 11, 10], folder=tmp_path / "features")
    (tmp_path / "net.py").write_text(block("python", "# net.py"))
    tree = {
        "version": 1,
        "data": {"root": str(tmp_path), "genres": list(GENRES)},
        "encoder": {"name": "films"},
        "stream": {"features_url": str(tmp_path / "features"), "window": 4},
        "training": {"run_name": "custom", "epochs": 2, "device": "cpu", "monitor_split": None},
        "tracking": {"wandb": "off"},
        **yaml.safe_load(block("yaml", "model:")),
    }
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(tree))
    words = ["training", "run", "--config", str(tmp_path / "my.yaml")]
    done = forked.run(words, folder=CHECKOUT, environment=os.environ)
    assert done.returncode == 0, done.stderr
    saved = tmp_path / "runs/custom/checkpoints/last/net.py"
    assert saved.read_text() == (tmp_path / "net.py").read_text()
