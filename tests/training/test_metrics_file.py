"""metrics.jsonl has each step once, over any number of restarts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from configs.errors import StateError
from training.metrics_file import MetricsFile, read_metrics


def write(path: Path, first: int, last: int) -> None:
    history = MetricsFile(path, from_step=first - 1)
    for step in range(first, last + 1):
        history.append("train", step=step, epoch=0, loss=step / 10)
    history.close()


def test_a_run_that_goes_on_drops_what_lies_beyond_its_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "whole", 1, 8)
    write(tmp_path / "parts", 1, 5)
    write(tmp_path / "parts", 4, 6)  # checkpoint at 3
    write(tmp_path / "parts", 7, 8)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_damaged_line_is_told_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0" * 9 + b"\n" + lines[2])
    with pytest.raises(StateError, match=r"metrics.jsonl: line 2 is damaged"):
        read_metrics(path)


def test_a_line_that_a_kill_cut_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 3)
    with path.open("ab") as file:
        file.write(b'{"step": 4, "ep')
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    write(path, 4, 4)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4]


def test_every_line_is_json_that_any_tool_reads(tmp_path: Path) -> None:
    history = MetricsFile(tmp_path / "m", from_step=0)
    history.append("genres", step=1, epoch=1, ap={"Drama": 0.5, "Western": math.nan})
    history.sync()
    line = (tmp_path / "m").read_text()
    history.close()
    assert json.loads(line) == {
        "step": 1,
        "epoch": 1,
        "kind": "genres",
        "ap": {"Drama": 0.5, "Western": None},
    }


def test_no_file_is_no_history(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "none") == []
