"""From a dump to a report, by the commands of the README."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from configs.schema import GENRES
from tests.end_to_end.pipeline import Pipeline, read_json, read_metrics

pytestmark = pytest.mark.slow

SHORT = ("training.epochs=2", "training.validate_epochs=1")


@pytest.fixture(scope="module")
def trained(demo: Pipeline) -> Path:
    """A short run and its report."""
    demo.run("training", "run", *SHORT, "training.run_name=short")
    printed = demo.run("eval", "report", *SHORT, "training.run_name=short")
    (demo.folder / "printed").write_text(printed)
    return demo.folder / "demo-data" / "runs" / "short"


def test_the_report_prints_every_genre_its_path_and_the_offline_run(
    demo: Pipeline, trained: Path
) -> None:
    printed = (demo.folder / "printed").read_text()
    assert [genre for genre in GENRES if genre not in printed] == []
    assert "report.html" in printed
    for folder in (trained, trained / "report" / "val"):
        (segment,) = folder.glob("wandb/offline-run-*/*.wandb")
        place = segment.relative_to(demo.folder)
        assert f"wandb, offline: wandb leet inspect --summary {place}" in printed
    assert (trained / "report" / "val" / "report.html").is_file()


def test_the_report_compares_the_model_with_published_figures_and_baselines(trained: Path) -> None:
    report = read_json(trained / "report" / "val" / "report.json")
    drama = report["genres"][0]
    assert drama["genre"] == "Drama"
    assert drama["published"]["lstm_ap"] == 80.31
    assert [baseline["name"] for baseline in report["baselines"]] == [
        "class prior",
        "mean-pool + linear",
    ]
    assert report["compared"]["movies"] == 120
    assert report["compared"]["untrained"]


def test_a_run_records_its_configuration_metrics_and_outcome(trained: Path) -> None:
    assert "epochs: 2" in (trained / "config.yaml").read_text()
    assert read_json(trained / "attempt-1.json")["outcome"] == "done"
    steps = [record["step"] for record in read_metrics(trained, "train")]
    assert steps == list(range(1, len(steps) + 1))
    assert len(read_metrics(trained, "validation")) == 2


def test_wandb_leet_shows_the_metrics_of_the_offline_run(trained: Path) -> None:
    (segment,) = trained.glob("wandb/offline-run-*/*.wandb")
    wandb = Path(sys.executable).with_name("wandb")
    inspected = subprocess.run(
        [str(wandb), "leet", "inspect", "--summary", str(segment)],
        capture_output=True,
        text=True,
        check=True,
    )
    for metric in ("loss", "holdout/map", "val/map", "windows_per_s"):
        assert metric in inspected.stdout


def test_wandb_shows_the_pictures_of_the_report_that_name_no_movie(trained: Path) -> None:
    shown = (trained / "report" / "val" / "wandb").glob("offline-run-*/files/media/images/report/*")
    names = sorted(path.name.partition("_")[0] for path in shown)
    assert names == ["ap", "cooccurrence", "curves", "reliability"]


def test_a_finished_run_is_not_changed_by_a_rerun(demo: Pipeline, trained: Path) -> None:
    before = (trained / "metrics.jsonl").read_bytes()
    demo.run("training", "run", *SHORT, "training.run_name=short")
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_a_limit_runs_every_stage_on_a_few_movies(demo: Pipeline) -> None:
    few = ("data.limit=24", *SHORT, "training.run_name=few")
    for package, command in (
        ("sharding", "build"),
        ("encoders", "run"),
        ("training", "run"),
        ("eval", "report"),
    ):
        demo.run(package, command, *few)
    root = demo.folder / "demo-data" / "limit-24"
    assert len(read_json(root / "frames" / "plan.json")["movies"]) == 24
    assert (
        read_json(root / "runs" / "few" / "report" / "val" / "report.json")["compared"]["movies"]
        == 6
    )
