"""Rank 0 writes each figure to metrics.jsonl and to the tracker; other ranks write nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from configs.runtime.tracking import Tracker
from configs.schema import Config
from training import metrics_logger
from training.checkpoint import Position
from training.metrics_file import read_metrics


class Notebook(Tracker):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__("run-7")
        self.seen: list[Any] = []

    def log(self, values: Any, *, step: int) -> None:
        self.seen.append((step, values))

    def table(self, name: str, columns: Sequence[str], rows: Any, *, step: int) -> None:
        self.seen.append((step, name, columns, rows))

    def finish(self) -> None:
        self.seen.append("finished")


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Notebook:
    tracker = Notebook()

    def begin(_: Config, **told: Any) -> Tracker:
        tracker.seen.append((told["rank"], told["run_id"]))
        return tracker

    monkeypatch.setattr(metrics_logger, "start_tracking", begin)
    return tracker


def config(folder: Path) -> Config:
    tree = {
        "version": 1,
        "data": {"root": "unused", "runs": str(folder)},
        "encoder": {"name": "films"},
        "training": {"run_name": "run"},
    }
    (folder / "run").mkdir(exist_ok=True)
    return Config.model_validate(tree)


def test_a_figure_has_one_line_and_one_point_under_the_name_of_its_kind(
    tmp_path: Path, notebook: Notebook
) -> None:
    kept = metrics_logger.MetricsLogger(config(tmp_path), rank=0, run_id=None, from_step=0)
    kept.add("train", Position(epoch=1, step=5), {"loss": 0.5})
    kept.add_genres("val", Position(epoch=2, step=8), ("Drama", "Western"), (0.5, math.nan), (3, 0))
    kept.close()
    assert kept.run_id == "run-7"
    assert read_metrics(tmp_path / "run/metrics.jsonl") == [
        {"step": 5, "epoch": 1, "kind": "train", "loss": 0.5},
        {
            "step": 8,
            "epoch": 2,
            "kind": "genres",
            "part": "val",
            "ap": {"Drama": 0.5, "Western": None},
        },
    ]
    began, point, (step, name, columns, rows), ended = notebook.seen
    assert began == (0, None)
    assert point == (5, {"train/loss": 0.5, "epoch": 1})
    assert (step, name, columns) == (8, "val/genres", ("genre", "ap", "support"))
    assert rows[0] == ("Drama", 0.5, 3)
    assert ended == "finished"


def test_a_record_goes_on_behind_its_checkpoint_in_the_same_tracking_run(
    tmp_path: Path, notebook: Notebook
) -> None:
    for run_id, from_step, step in ((None, 0, 4), ("run-7", 3, 6)):
        kept = metrics_logger.MetricsLogger(
            config(tmp_path), rank=0, run_id=run_id, from_step=from_step
        )
        for done in range(from_step + 1, step + 1):
            kept.add("train", Position(step=done), {"loss": 0.25})
        kept.close()
    steps = [line["step"] for line in read_metrics(tmp_path / "run/metrics.jsonl")]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert (0, "run-7") in notebook.seen


def test_other_ranks_leave_the_record_alone(tmp_path: Path, notebook: Notebook) -> None:
    kept = metrics_logger.MetricsLogger(config(tmp_path), rank=1, run_id=None, from_step=0)
    kept.add("train", Position(step=1), {"loss": 0.5})
    kept.sync()
    kept.close()
    assert not (tmp_path / "run/metrics.jsonl").exists()
    assert notebook.seen[0] == (1, None)  # which tells the tracker to keep nothing
