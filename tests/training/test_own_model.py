"""The README's model of one's own, run as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.training.conftest import GENRES

CHECKOUT = Path(__file__).resolve().parents[2]


def block(language: str, first: str) -> str:
    """The README's block of code that begins with a line."""
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"```{language}\n({re.escape(first)}.*?)```", readme, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_readmes_model_trains_from_a_file_beside_the_config(
    make_films: Callable[..., Any], tmp_path: Path
) -> None:
    make_films([9, 5, 7, 12, 4, 8, 6, 11, 10], folder=tmp_path / "features")
    (tmp_path / "net.py").write_text(block("python", "# net.py"))
    given = {
        "version": 1,
        "data": {"root": str(tmp_path), "genres": list(GENRES)},
        "encoder": {"name": "films"},
        "stream": {"features_url": str(tmp_path / "features"), "window": 4},
        "training": {"run_name": "own", "epochs": 2, "device": "cpu", "monitor_split": None},
        "tracking": {"wandb": "off"},
        **yaml.safe_load(block("yaml", "model:")),
    }
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(given))
    command = [sys.executable, "-m", "training", "run", "--config", str(tmp_path / "my.yaml")]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kept = tmp_path / "runs/own/checkpoints/last/net.py"
    assert kept.read_text() == (tmp_path / "net.py").read_text()
