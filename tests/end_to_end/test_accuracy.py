"""The mini dump teaches order: sequence models learn from it, and only from order."""

from __future__ import annotations

from typing import Any

import pytest

from tests.end_to_end.pipeline import Pipeline, read_json

pytestmark = pytest.mark.slow

SEEDS = (0, 1, 2)
MLP = ("model.class=training.models.mean:MeanMLP", "model.options={}")


def report(demo: Pipeline, seed: int, *overrides: str, kind: str = "sequence") -> Any:
    """Train and report with a seed; equal kind and seed share one run."""
    name = f"training.run_name={kind}-{seed}"
    seeds = (f"training.seed={seed}", f"stream.seed={seed}")
    for package, command in (("training", "run"), ("eval", "report")):
        demo.run(package, command, name, *seeds, *overrides)
    folder = demo.folder / "demo-data" / "runs" / name.partition("=")[2]
    return read_json(folder / "report" / "val" / "report.json")


def lead(result: Any, baseline: str) -> Any:
    """Return the paired difference of mAP to a baseline: value, low, high."""
    return next(row["difference"] for row in result["baselines"] if row["name"] == baseline)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_demo_model_learns_what_only_order_reveals(demo: Pipeline, seed: int) -> None:
    result = report(demo, seed)
    assert lead(result, "class prior")["value"] >= 0.25
    assert lead(result, "mean-pool + linear")["value"] >= 0.05
    assert lead(result, "mean-pool + linear")["low"] > 0


def test_the_demo_model_beats_a_network_on_the_mean_row(demo: Pipeline) -> None:
    sequence = report(demo, 0)
    pooled = report(demo, 0, *MLP, kind="mean")
    assert sequence["mean_ap"]["value"] >= pooled["mean_ap"]["value"] + 0.05


@pytest.mark.parametrize("seed", SEEDS)
def test_without_order_the_demo_model_is_no_better_than_the_mean(demo: Pipeline, seed: int) -> None:
    result = report(demo, seed, "training.shuffle_frames=true", kind="shuffled")
    difference = lead(result, "mean-pool + linear")
    assert difference["value"] < 0.02 or difference["low"] <= 0 <= difference["high"]
