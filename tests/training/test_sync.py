"""``movienet-train sync`` finds the offline runs of a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.__main__ import main


def test_sync_takes_all_runs_below_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [
        tmp_path / run / "wandb" / "offline-run-20260101_000000-ab12cd34" / "run-ab12cd34.wandb"
        for run in ("demo-encode/task-0-of-2", "demo-encode/task-1-of-2", "lstm", "lstm/report")
    ]
    for part in parts:
        part.parent.mkdir(parents=True)
        part.touch()
    assert main(["sync", "--dry-run", str(tmp_path)]) == 0
    *named, total = capsys.readouterr().out.splitlines()
    assert sorted(named) == sorted(str(part) for part in parts)
    assert total == f"{tmp_path}: 4 of 4 segments to upload"
