"""The mini dump teaches order: sequence models learn from it, and only from order."""

from __future__ import annotations

from typing import Any

import pytest

from tests.end_to_end.pipeline import Pipeline, read_json

pytestmark = pytest.mark.slow

MLP = ("model.class=training.models.mean:MeanMLP", "model.options={}")


def report(demo: Pipeline, name: str, *overrides: str) -> Any:
    """Train and report."""
    for package, command in (("training", "run"), ("eval", "report")):
        demo.run(package, command, f"training.run_name={name}", *overrides)
    return read_json(demo.folder / "demo-data" / "runs" / name / "report" / "val" / "report.json")


def lead(result: Any, baseline: str) -> Any:
    """Return the paired difference of mAP to a baseline: value, low, high."""
    return next(row["difference"] for row in result["baselines"] if row["name"] == baseline)


def test_the_demo_model_learns_what_only_order_reveals(demo: Pipeline) -> None:
    sequence = report(demo, "sequence")
    assert lead(sequence, "class prior")["value"] >= 0.25
    assert lead(sequence, "mean-pool + linear")["value"] >= 0.05
    assert lead(sequence, "mean-pool + linear")["low"] > 0
    pooled = report(demo, "mean", *MLP)
    assert sequence["mean_ap"]["value"] >= pooled["mean_ap"]["value"] + 0.05


def test_without_order_the_demo_model_is_no_better_than_the_mean(demo: Pipeline) -> None:
    result = report(demo, "shuffled", "training.shuffle_frames=true")
    difference = lead(result, "mean-pool + linear")
    assert difference["value"] < 0.02 or difference["low"] <= 0 <= difference["high"]
