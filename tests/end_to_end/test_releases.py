"""Files that earlier releases wrote, opened by today's programs (docs/compatibility.md)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from configs.load import load_config
from encoders.__main__ import main as encode
from eval.evaluate import evaluate
from eval.report import Report, read_report
from movienet_stream import open_features
from sharding.__main__ import main as shard
from tests.end_to_end.pipeline import read_json, read_metrics
from tests.golden.releases.make import logits
from training.__main__ import main as train

RELEASES = sorted((Path(__file__).parents[1] / "golden" / "releases").glob("[0-9]*"))
SET = ("--quiet", "--config", "set.yaml")
RUN = Path("data/runs/tiny")


@pytest.fixture(params=RELEASES, ids=lambda release: release.name)
def release(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Files of a release, as its users have them; the current folder is a copy of them."""
    shutil.copytree(request.param, tmp_path / "release")
    monkeypatch.chdir(tmp_path / "release")
    golden: Path = request.param
    return golden


def average_precisions(report: Report) -> list[float]:
    return [genre.ap.value for genre in report.genres if genre.ap]


def test_its_sets_are_complete_and_every_byte_is_intact(release: Path) -> None:
    assert shard(["verify", *SET]) == 0
    assert encode(["verify", *SET]) == 0
    assert shard(["status", *SET]) == 0
    assert encode(["status", *SET]) == 0
    features = open_features("data/features/tiny")
    assert (
        features.digest == read_report(release / RUN / "report/val/report.json").compared.features
    )


def test_its_configurations_load(release: Path) -> None:
    config = load_config("set.yaml")
    assert config.run_dir == RUN
    stored = load_config(RUN / "config.yaml")
    assert stored.training == config.training
    assert stored.model == config.model
    assert read_json(release / RUN / "checkpoints/last/state.json")["position"]["epoch"] == 2


def test_its_export_computes_the_same_logits(release: Path) -> None:
    golden = json.loads((release / "logits.json").read_text())
    today = logits(Path())
    assert list(today) == list(golden)
    for movie, values in golden.items():
        assert today[movie] == pytest.approx(values, abs=1e-5), movie


@pytest.mark.slow
def test_its_run_is_scored_as_then_and_resumes(release: Path) -> None:
    old = read_report(RUN / "report/val/report.json")
    today = evaluate(load_config(RUN / "config.yaml"), RUN)
    assert today is not None
    new = today.report
    assert new.compared.recipe == old.compared.recipe
    assert average_precisions(new) == pytest.approx(average_precisions(old), abs=1e-6)

    assert train(["status", str(RUN)]) == 0
    assert train(["run", *SET, "training.epochs=3"]) == 0
    before, after = (read_metrics(run, "train") for run in (release / RUN, RUN))
    assert after[: len(before)] == before
    assert read_json(RUN / "checkpoints/last/state.json")["position"]["epoch"] == 3
