"""The tutorial, and what it shows: sequence models learn from order, and only from order."""

from __future__ import annotations

from typing import Any

import pytest

from tests.end_to_end.pipeline import Pipeline, read_json
from tests.end_to_end.tutorial import Step, missing_lines, steps

pytestmark = pytest.mark.slow


def read_report(demo: Pipeline, name: str) -> Any:
    """Return the report of a run."""
    return read_json(demo.folder / "demo-data" / "runs" / name / "report" / "val" / "report.json")


@pytest.fixture(scope="module")
def printed(demo: Pipeline) -> list[tuple[Step, str]]:
    """Every command of the tutorial, in order, and its output."""
    return [(step, step.run(demo)) for step in steps()]


def lead(result: Any, baseline: str) -> Any:
    """Return the paired difference of mAP to a baseline: value, low, high."""
    return next(row["difference"] for row in result["baselines"] if row["name"] == baseline)


def test_the_commands_of_the_tutorial_print_what_it_shows(
    printed: list[tuple[Step, str]],
) -> None:
    missing = [
        f"{step.package} {step.command}: {line}"
        for step, output in printed
        for line in missing_lines(step.printed, output)
    ]
    assert missing == []


def test_the_demo_model_learns_what_only_order_reveals(
    demo: Pipeline, printed: list[tuple[Step, str]]
) -> None:
    assert len(printed) == len(steps())
    sequence = read_report(demo, "demo")
    assert lead(sequence, "class prior")["value"] >= 0.25
    assert lead(sequence, "mean-pool + linear")["value"] >= 0.05
    assert lead(sequence, "mean-pool + linear")["low"] > 0
    pooled = read_report(demo, "mean")  # of MeanMLP
    assert sequence["mean_ap"]["value"] >= pooled["mean_ap"]["value"] + 0.05


@pytest.mark.parametrize(
    ("page", "output", "missing"),
    [
        ("mAP 0.998\n…\nend", "mAP 0.997\na\nb\nend", []),
        ("movies 480", "movies 479", ["movies 480"]),
        ("a\nb", "a\nx\nb", ["b"]),
        ("data 6095a6b42e80", "data 0000a6b42e80", ["data 6095a6b42e80"]),
    ],
)
def test_a_line_of_the_tutorial_that_is_not_printed_is_found(
    page: str, output: str, missing: list[str]
) -> None:
    assert missing_lines(page, output) == missing


def test_without_order_the_demo_model_is_no_better_than_the_mean(demo: Pipeline) -> None:
    changes = ("training.run_name=shuffled", "training.shuffle_frames=true")
    for package, command in (("training", "run"), ("eval", "report")):
        demo.run(package, command, *changes)
    result = read_report(demo, "shuffled")
    difference = lead(result, "mean-pool + linear")
    assert difference["value"] < 0.02 or difference["low"] <= 0 <= difference["high"]
