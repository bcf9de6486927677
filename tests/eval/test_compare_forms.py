from __future__ import annotations

import re

import pytest

from eval.compare import compare
from eval.compare_forms import render_html, render_table
from eval.comparison import Comparison
from eval.report import Report
from tests.eval.test_compare import scored


@pytest.fixture
def comparison(report: Report) -> Comparison:
    runs = [scored(report, f"attention-{seed}", noise=4, seed=seed) for seed in (0, 1, 2)]
    return compare([*runs, scored(report, "<b>lstm[red]", noise=9, recipe="other")])


def test_the_terminal_shows_runs_seeds_and_genres_in_80_columns(comparison: Comparison) -> None:
    text = render_table(comparison)
    assert max(len(line) for line in text.splitlines()) <= 80
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert any(
        re.match(r"A attention-0 0\.\d+ \(0\.\d+ … \d\.\d+\) 0\.\d+ –", line) for line in lines
    )
    assert any(re.match(r"attention A B C 0\.\d+ ± 0\.\d+", line) for line in lines)
    assert "genre movies A B C D" in lines
    assert not any(line.startswith("Western") for line in lines)  # no movie has it
    assert "<b>lstm[red]" in text


def test_many_runs_with_long_names_fit_into_80_columns(report: Report) -> None:
    runs = [
        scored(report, f"a_run_with_a_rather_long_name/lr=1e-3,seed={seed}", noise=4, seed=seed)
        for seed in range(30)
    ]
    text = render_table(compare(runs))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert " A1 " in text.replace("\n", " ")  # the 27th run


def test_the_page_is_self_contained_and_escapes_names(comparison: Comparison) -> None:
    page = render_html(comparison)
    assert "&lt;b&gt;lstm[red]" in page
    assert "<b>lstm" not in page
    for word in ("src=", "href=", "url(", "@import", "<script"):
        assert word not in page
    assert "± is the standard deviation over runs that differ only in their seeds." in page
