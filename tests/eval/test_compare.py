"""Runs are compared on the same movies, paired, and averaged over seeds."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import ConfigError, DataError, StateError
from eval.__main__ import main
from eval.compare import Scored, compare, find_reports
from eval.comparison import Comparison
from eval.predictions import Predictions, write_predictions
from eval.report import Report
from tests.eval.conftest import configuration
from training.metrics import mean_ap

pytestmark = pytest.mark.slow

GENRES = ("Drama", "War", "Western")
MOVIES = tuple(f"tt{number:03d}" for number in range(60))
GENERATOR = np.random.default_rng(0)
LABELS = (GENERATOR.random((60, 3)) < [0.6, 0.3, 0.0]).astype(np.uint8)


def scored(report: Report, name: str, *, noise: float, seed: int = 0, **compared: Any) -> Scored:
    """A run whose probabilities are the labels with this much noise."""
    values = np.random.default_rng([seed, round(100 * noise)]).random((60, 3))
    predictions = Predictions(
        movie_id=MOVIES,
        genres=GENRES,
        labels_MG=LABELS,
        probabilities_MG=(LABELS + noise * values) / (1 + noise),
        thresholds_G=np.full(3, 0.5),
        split="val",
    )
    update = {"run": name, "movies": 60, "recipe": str(noise), "training_seed": seed, "draws": 200}
    protocol = report.compared.model_copy(update=update | compared)
    return Scored(name, Path(name), report.model_copy(update={"compared": protocol}), predictions)


def select(run: Scored, movies: slice, columns: list[int]) -> Scored:
    """The run with some of the movies and these genres."""
    one = run.predictions
    return replace(
        run,
        predictions=Predictions(
            movie_id=one.movie_id[movies],
            genres=[one.genres[column] for column in columns],
            labels_MG=one.labels_MG[movies][:, columns],
            probabilities_MG=one.probabilities_MG[movies][:, columns],
            thresholds_G=one.thresholds_G[columns],
            split=one.split,
        ),
    )


def test_a_better_run_is_called_better_and_the_same_run_has_no_difference(report: Report) -> None:
    weak, strong = scored(report, "weak", noise=8), scored(report, "strong", noise=1.1)
    result = compare([weak, strong, replace(weak, name="again")])
    first, second, third = result.runs
    assert first.difference is None
    assert second.difference is not None
    assert third.difference is not None
    assert second.difference.better == "yes"
    assert second.difference.mean_ap.value == pytest.approx(
        second.mean_ap.value - first.mean_ap.value
    )
    # Paired: both see the same movies in every draw, so nothing is left of equal runs.
    gap = third.difference.mean_ap
    assert (gap.value, gap.low, gap.high) == (0, 0, 0)


def test_runs_that_differ_in_seeds_only_are_averaged(report: Report) -> None:
    seeds = [scored(report, f"net-{seed}", noise=4, seed=seed) for seed in (7, 8, 9)]
    other = scored(report, "other", noise=9)
    result = compare([*seeds[:2], other, seeds[2]])
    net, alone = result.recipes
    assert (net.name, net.runs, net.seeds) == ("net", ("A", "B", "D"), (7, 8, 9))
    assert (alone.name, alone.runs, alone.mean_ap.std) == ("other", ("C",), None)
    values = [mean_ap(run.predictions.labels_MG, run.predictions.probabilities_MG) for run in seeds]
    assert net.mean_ap.mean == pytest.approx(np.mean(values))
    assert net.mean_ap.std == pytest.approx(np.std(values, ddof=1))
    assert net.difference is None
    assert alone.difference is not None
    assert alone.difference.mean_ap.value == pytest.approx(alone.mean_ap.mean - net.mean_ap.mean)


@pytest.mark.parametrize("change", [{"recipe": None}, {"checkpoint": "last"}, {"features": "f"}])
def test_runs_of_unknown_recipe_or_scored_in_another_way_are_not_averaged(
    report: Report, change: dict[str, Any]
) -> None:
    one, two = (scored(report, f"net-{seed}", noise=4, seed=seed) for seed in (0, 1))
    changed = scored(report, "net-2", noise=4, seed=2, **change)
    assert [row.runs for row in compare([one, two, changed]).recipes] == [("A", "B"), ("C",)]


def test_only_common_movies_count_and_genres_may_be_in_another_order(report: Report) -> None:
    full = scored(report, "full", noise=4)
    most = select(scored(report, "most", noise=4), slice(10, 60), [2, 0, 1])
    result = compare([full, most])
    assert result.movies == 50
    # The same predictions in the end: both runs have the same figures.
    assert result.runs[0].mean_ap == result.runs[1].mean_ap
    assert [row.support for row in result.genres] == LABELS[10:].sum(axis=0).tolist()
    assert result.genres[2].aps == (None, None)
    assert result.notes == (
        "full: scored 60 movies, 50 of them are common.",
        "most: scored 60 movies, 50 of them are common.",
    )


def test_nothing_is_claimed_on_movies_that_a_run_was_trained_on(report: Report) -> None:
    weak = scored(report, "weak", noise=8, trained_on=3)
    result = compare([weak, scored(report, "strong", noise=1.1)])
    assert result.runs[1].difference is not None
    assert result.runs[1].difference.better == "not a test"
    assert result.notes[0].startswith("weak: 3 of 60 scored movies were trained on")


def test_what_cannot_be_compared_is_one_line(report: Report) -> None:
    one, two = scored(report, "one", noise=4), scored(report, "two", noise=4, seed=1)
    labels_MG = LABELS.copy()
    labels_MG[4, 1] ^= 1
    relabelled = replace(two, predictions=replace(two.predictions, labels_MG=labels_MG))
    elsewhere = replace(
        two, predictions=replace(two.predictions, movie_id=[f"x{movie}" for movie in MOVIES])
    )
    fewer = select(two, slice(0, 60), [0, 1])
    on_test = scored(report, "two", noise=4, split="test")
    for other, message in (
        (relabelled, "two: 1 of 60 common movies have other labels than in one, e.g. tt004 in 'W"),
        (elsewhere, r"no movie was scored by all runs \(one 60, two 60 movies\)"),
        (fewer, "two: got 2 genres, one has 3, and they differ in Western"),
        (on_test, "two: got a report on split 'test', one has 'val'"),
    ):
        with pytest.raises(DataError, match=message):
            compare([one, other])
    with pytest.raises(ConfigError, match="RUN: got 1 run, want two or more to compare"):
        compare([one])
    with pytest.raises(ConfigError, match="RUN: got one twice, want each run once"):
        compare([one, one])


def test_a_run_without_a_report_is_answered_with_the_command_that_writes_it(
    trained: Path, exported: Path
) -> None:
    run = configuration(trained).run_dir
    with pytest.raises(StateError, match=r"mean: no report on split 'test'; run `") as missing:
        find_reports([str(run)], "test", None)
    words = shlex.split(str(missing.value).split("`")[1])
    assert words == [
        *("movienet-eval", "report", "--model", str(run)),
        *("--config", str(run / "config.yaml"), "eval.split=test"),
    ]
    with pytest.raises(StateError, match=f"report --model {exported} --config .* eval.split=test"):
        find_reports([str(exported)], "test", None)
    with pytest.raises(ConfigError, match=r"RUN: got nowhere, want the name of a run in .*runs"):
        find_reports(["nowhere"], "val", run.parent)


def test_a_report_of_an_earlier_step_of_its_run_is_pointed_out(
    report: Report, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(configuration(trained).run_dir / "checkpoints", tmp_path / "a" / "checkpoints")
    write(scored(report, "a", noise=4, checkpoint="last", step=60), tmp_path / "a/report/val")
    write(scored(report, "b", noise=8), tmp_path / "b")
    runs = find_reports([str(tmp_path / "a"), str(tmp_path / "b")], "val", None)
    note, *others = compare(runs).notes
    assert others == []
    assert note.startswith("a: its report is that of step 60, but 'last' is at step 90 now; run `m")


def write(run: Scored, folder: Path) -> None:
    protocol = run.report.compared.model_copy(update={"predictions": run.predictions.digest})
    report = run.report.model_copy(update={"compared": protocol})
    write_predictions(folder, run.predictions)
    (folder / "report.json").write_text(report.model_dump_json())


def test_the_command_compares_runs_and_exports_by_name_or_path(
    report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = []
    for name, noise in (("lr=1e-3", 8.0), ("strong", 1.1)):
        folder = tmp_path / name / "report" / "val"
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        write(scored(report, name, noise=noise), folder)
        folders.append(folder)
    # A run, and the folder of a report
    assert main(["compare", str(tmp_path / "lr=1e-3"), str(folders[1]), "--split", "val"]) == 0
    printed = capsys.readouterr().out
    page = folders[0] / "compare" / "compare.html"
    assert printed.splitlines()[-1] == f"comparison: {page}"
    assert "better" in printed
    result = Comparison.model_validate_json(page.with_suffix(".json").read_bytes())
    assert [run.key for run in result.runs] == ["A", "B"]
    assert main(["compare", "a", "b", "eval.split=test"]) == 2
    assert "--config: missing" in capsys.readouterr().err
