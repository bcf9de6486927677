"""Rank 0 writes each metric to ``metrics.jsonl`` and to the tracker; other ranks write nothing."""

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
from training.metrics_logger import MetricsLogger


class RecordingTracker(Tracker):
    """Tracker that records its calls."""

    def __init__(self) -> None:
        super().__init__("run-7")
        self.calls: list[Any] = []

    def log(self, values: Any, *, step: int) -> None:
        self.calls.append((step, values))

    def table(self, name: str, columns: Sequence[str], rows: Any, *, step: int) -> None:
        self.calls.append((step, name, columns, rows))

    def finish(self) -> None:
        self.calls.append("finished")


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> RecordingTracker:
    tracker = RecordingTracker()

    def start(_: Config, **arguments: Any) -> Tracker:
        tracker.calls.append((arguments["rank"], arguments["run_id"]))
        return tracker

    monkeypatch.setattr(metrics_logger, "start_tracking", start)
    return tracker


def config(folder: Path) -> Config:
    tree = {
        "version": 1,
        "data": {"root": "unused", "runs": str(folder)},
        "encoder": {"name": "films"},
        "training": {"run_name": "run"},
    }
    (folder / "run").mkdir(parents=True, exist_ok=True)
    return Config.model_validate(tree)


def test_a_metric_has_one_line_and_one_point_with_its_kind_as_prefix(
    tmp_path: Path, tracker: RecordingTracker
) -> None:
    metrics = MetricsLogger(config(tmp_path), rank=0, run_id=None, from_step=0)
    metrics.add("train", Position(epoch=1, step=5), {"loss": 0.5})
    genres, aps, support = ("Drama", "Western"), (0.5, math.nan), (3, 0)
    metrics.add_genres("val", Position(epoch=2, step=8), genres, aps, support)
    metrics.close()
    assert metrics.run_id == "run-7"
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
    started, point, (step, name, columns, rows), ended = tracker.calls
    assert started == (0, None)
    assert point == (5, {"train/loss": 0.5})
    assert (step, name, columns) == (8, "val/genres", ("genre", "ap", "support"))
    assert rows[0] == ("Drama", 0.5, 3)
    assert ended == "finished"


def test_metrics_continue_after_the_checkpoint_in_the_same_tracking_run(
    tmp_path: Path, tracker: RecordingTracker
) -> None:
    for run_id, from_step, last_step in ((None, 0, 4), ("run-7", 3, 6)):
        metrics = MetricsLogger(config(tmp_path), rank=0, run_id=run_id, from_step=from_step)
        for step in range(from_step + 1, last_step + 1):
            metrics.add("train", Position(step=step), {"loss": 0.25})
        metrics.close()
    steps = [line["step"] for line in read_metrics(tmp_path / "run/metrics.jsonl")]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert (0, "run-7") in tracker.calls


def test_steps_that_the_tracker_lost_are_sent_again_each_once(
    tmp_path: Path, tracker: RecordingTracker
) -> None:
    first = MetricsLogger(config(tmp_path), rank=0, run_id=None, from_step=0)
    for step in range(1, 5):
        first.add("train", Position(step=step), {"loss": 0.25})
    first.add("speed", Position(epoch=1, step=4), {"wait": 0.5})
    first.add("validation", Position(epoch=1, step=4), {"val/map": 0.75, "val/micro_ap": math.nan})
    first.close()
    tracker.calls.clear()
    tracker.next_step = 3  # after a kill the service had stored two steps
    MetricsLogger(config(tmp_path), rank=0, run_id="run-7", from_step=4).close()
    assert tracker.calls[1:-1] == [
        (3, {"train/loss": 0.25}),
        (4, {"train/loss": 0.25}),
        (4, {"workload/wait": 0.5, "workload/epoch": 1}),
        (4, {"val/map": 0.75}),
    ]


def test_other_ranks_write_no_metrics(tmp_path: Path, tracker: RecordingTracker) -> None:
    metrics = MetricsLogger(config(tmp_path), rank=1, run_id=None, from_step=0)
    metrics.add("train", Position(step=1), {"loss": 0.5})
    metrics.sync()
    metrics.close()
    assert not (tmp_path / "run/metrics.jsonl").exists()
    assert tracker.calls[0] == (1, None)  # with this rank the tracker writes nothing


def test_the_link_of_an_online_run_is_its_web_page_and_else_a_leet_command(
    tmp_path: Path, tracker: RecordingTracker
) -> None:
    settings = config(tmp_path / "my runs")
    metrics = MetricsLogger(settings, rank=0, run_id=None, from_step=0)
    links = [metrics.link]
    (settings.run_dir / "wandb/offline-run-20260301_120000-run7").mkdir(parents=True)
    links.append(metrics.link)
    tracker.url = "https://wandb.example/run-7"
    links.append(metrics.link)
    metrics.close()
    leet = f"`wandb leet '{settings.run_dir}/wandb'`"
    assert links == [None, leet, "https://wandb.example/run-7"]
