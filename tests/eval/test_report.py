"""A report is read back unchanged and claims no more than its intervals support."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from pydantic import ValidationError

from configs.errors import DataError
from eval.render import sentence
from eval.report import BaselineResult, Figure, GenreRow, Report, read_report, verdict
from tests.damage import damaged, reads_or_reports


def compared_by(
    low: float | None, value: float, high: float | None, *, movies: int = 30, trained_on: int = 0
) -> BaselineResult:
    gap, any_figure = Figure(value=value, low=low, high=high), Figure(value=0.3)
    return BaselineResult(
        name="mean-pool + linear",
        note="",
        mean_ap=any_figure,
        micro_ap=any_figure,
        difference=gap,
        beaten=verdict(gap, movies=movies, trained_on=trained_on),
    )


@pytest.mark.parametrize(
    ("low", "value", "high", "beaten", "words"),
    [
        (0.01, 0.05, 0.09, "yes", "The model beats mean-pool + linear: +0.050 mAP"),
        (-0.01, 0.05, 0.11, "unclear", "does not clearly beat mean-pool + linear: +0.050 mAP"),
        (-0.05, -0.01, 0.03, "unclear", "The model does not beat mean-pool + linear: −0.010 mAP"),
        (-0.09, -0.05, -0.01, "no", "does not beat, and is worse than, mean-pool + linear: −0.050"),
        (None, 0.5, None, "unclear", "+0.500 mAP, without an interval"),
    ],
)
def test_a_comparison_claims_no_more_than_its_interval_supports(
    low: float | None, value: float, high: float | None, beaten: str, words: str
) -> None:
    baseline = compared_by(low, value, high)
    assert baseline.beaten == beaten
    assert words in sentence(baseline)
    assert ("contains 0" in sentence(baseline)) == (beaten == "unclear" and low is not None)


@pytest.mark.parametrize(
    ("movies", "trained_on", "words"),
    [(29, 0, "no claim from fewer than 30 movies"), (500, 1, "trained on scored movies")],
)
def test_few_movies_or_train_movies_support_no_claim(
    movies: int, trained_on: int, words: str
) -> None:
    baseline = compared_by(0.01, 0.05, 0.09, movies=movies, trained_on=trained_on)
    assert sentence(baseline).startswith("Against mean-pool + linear: +0.050 mAP, 95 % interval")
    assert words in sentence(baseline)


def test_a_missing_or_damaged_report_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with pytest.raises(DataError, match="movienet-eval report"):
        read_report(path)
    for text in ("{", "{}", '{"version": 2}'):
        path.write_text(text)
        with pytest.raises(DataError, match="want a report of version 2") as error:
            read_report(path)
        assert "\n" not in str(error.value)


def test_a_report_of_an_earlier_version_is_refused_by_its_version(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text('{"version": 1, "thresholds": []}')
    with pytest.raises(
        DataError, match=r"report.json: version: .* want a report of version 2; run"
    ):
        read_report(path)


def test_a_report_contains_no_nan_and_no_fraction_above_1(report: Report) -> None:
    row = report.genres[0].model_dump()
    for wrong in ({"precision": 1.5}, {"recall": float("nan")}, {"other": 1}):
        with pytest.raises(ValidationError):
            GenreRow.model_validate(row | wrong)


def test_a_damaged_report_is_read_or_a_one_line_error(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.json"

    @settings(max_examples=40)
    @given(damaged(report.model_dump_json(indent=1).encode()))
    def check(corrupt: bytes) -> None:
        path.write_bytes(corrupt)
        assert reads_or_reports(lambda: read_report(path))

    check()
