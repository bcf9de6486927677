"""Fixtures with a small dump, its configuration and the commands of sharding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sharding.__main__ import main
from tests.sharding.films import write_dump

Run = Callable[..., tuple[int, str, str]]


def write_config(tmp_path: Path, *, root: str = "root", dump: str = "dump") -> Path:
    config = tmp_path / f"{root}.yaml"
    config.write_text(
        f"version: 1\ndata:\n  dump: {tmp_path}/{dump}\n  root: {tmp_path}/{root}\n"
        "sharding: {shard_bytes: 6000}\nencoder: {name: x}\ntraining: {run_name: x}\n"
        "tracking: {wandb: 'off'}\n"
    )
    return config


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    write_dump(tmp_path / "dump", 12)
    write_config(tmp_path)

    def call(*args: str, config: str = "root") -> tuple[int, str, str]:
        code = main([*args, "--config", str(tmp_path / f"{config}.yaml")])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a set, including temporary ones."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def expected(run: Run, tmp_path: Path) -> dict[str, bytes]:
    """Files of a set built by one process without interruption."""
    write_config(tmp_path, root="alone")
    assert run("build", config="alone")[0] == 0
    return contents(tmp_path / "alone" / "frames")
