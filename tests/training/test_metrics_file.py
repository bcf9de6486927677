"""``metrics.jsonl`` contains each step once, over any number of restarts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given

from configs.errors import StateError
from tests.damage import damaged, reads_or_reports
from training.metrics_file import MetricsFile, read_metrics


def write(path: Path, first: int, last: int) -> None:
    metrics = MetricsFile(path, from_step=first - 1)
    for step in range(first, last + 1):
        metrics.append("train", step=step, epoch=0, loss=step / 10)
    metrics.close()


def test_a_resumed_run_drops_the_records_after_its_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "uninterrupted", 1, 8)
    write(tmp_path / "resumed", 1, 5)
    write(tmp_path / "resumed", 4, 6)  # checkpoint at 3
    write(tmp_path / "resumed", 7, 8)
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "uninterrupted").read_bytes()


def test_a_corrupt_line_is_reported_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0" * 9 + b"\n" + lines[2])
    with pytest.raises(StateError, match=r"metrics.jsonl: line 2: corrupt"):
        read_metrics(path)


def test_a_truncated_last_line_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 3)
    with path.open("ab") as file:
        file.write(b'{"step": 4, "ep')
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    write(path, 4, 4)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4]


def test_every_line_is_standard_json_with_null_for_nan(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "m", from_step=0)
    metrics.append("genres", step=1, epoch=1, ap={"Drama": 0.5, "Western": math.nan})
    metrics.sync()
    line = (tmp_path / "m").read_text()
    metrics.close()
    assert json.loads(line) == {
        "step": 1,
        "epoch": 1,
        "kind": "genres",
        "ap": {"Drama": 0.5, "Western": None},
    }


def test_a_missing_file_has_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "none") == []


@pytest.mark.parametrize(
    "line", [b"null", b"[]", b"1", b"{}", b'{"step": null}', b"[" * 100_000, b"\xff"]
)
def test_a_line_that_is_no_record_is_reported_by_its_number(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(line + b"\n")
    with pytest.raises(StateError, match=r"jsonl: line 1: corrupt \(.*\); delete this line"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_damaged_file_is_read_or_a_one_line_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 3)

    @given(damaged(path.read_bytes()))
    def check(corrupt: bytes) -> None:
        path.write_bytes(corrupt)
        assert reads_or_reports(lambda: read_metrics(path))

    check()
