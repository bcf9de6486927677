from __future__ import annotations

import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pydantic import ValidationError

from configs.errors import DataError
from eval.draw import draw_ap
from eval.render import render_html, render_markdown, render_table, sentence, write_report
from eval.report import BaselineResult, Figure, GenreRow, Report, read_report, verdict

GOLDEN = Path(__file__).parents[1] / "golden"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture
def report() -> Report:
    return read_report(GOLDEN / "report.json")


def changed(report: Report, **compared: object) -> Report:
    return report.model_copy(update={"compared": report.compared.model_copy(update=compared)})


def compared_by(low: float | None, value: float, high: float | None) -> BaselineResult:
    gap, any_figure = Figure(value=value, low=low, high=high), Figure(value=0.3)
    return BaselineResult(
        name="mean-pool + linear",
        note="",
        mean_ap=any_figure,
        micro_ap=any_figure,
        difference=gap,
        beaten=verdict(gap),
    )


def test_the_markdown_of_a_fixed_report_is_golden(report: Report) -> None:
    text = render_markdown(report)
    if os.environ.get("MOVIENET_WRITE_GOLDEN"):
        (GOLDEN / "report.md").write_text(text, "utf-8")
    assert text == (GOLDEN / "report.md").read_text("utf-8")


def test_everything_is_made_of_report_json_alone(report: Report, tmp_path: Path) -> None:
    first = {name: path.read_bytes() for name, path in write_report(tmp_path, report).items()}
    assert sorted(first) == ["ap.png", "report.html", "report.json", "report.md"]
    again = write_report(tmp_path / "again", read_report(tmp_path / "report.json"))
    assert {name: path.read_bytes() for name, path in again.items()} == first


def test_the_page_needs_nothing_from_elsewhere(report: Report) -> None:
    asked: list[str] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag not in ("script", "link", "iframe")
            asked.extend(value or "" for name, value in attrs if name in ("src", "href"))

    page = render_html(report, b"picture")
    Links().feed(page)
    assert asked == ["data:image/png;base64,cGljdHVyZQ=="]
    assert "url(" not in page
    assert "@import" not in page


def test_names_from_outside_cannot_break_the_page_or_the_tables(report: Report) -> None:
    row = report.genres[0].model_copy(update={"genre": "<b>Film|Noir</b>"})
    odd = report.model_copy(update={"genres": (row, *report.genres[1:])})
    assert "&lt;b&gt;Film|Noir&lt;/b&gt;" in render_html(odd, b"")
    assert "| <b>Film\\|Noir</b> | 143 |" in render_markdown(odd)
    assert "[red]" in render_table(changed(report, run="[red]"))


def test_an_untrained_tower_is_named_at_the_top_of_everything(report: Report) -> None:
    untrained = changed(report, untrained=True)
    assert "UNTRAINED tower" in render_markdown(untrained).split("## Per genre")[0]
    assert "UNTRAINED tower" in render_html(untrained, b"").split("<h2>")[0]
    assert "UNTRAINED tower" in render_table(untrained)
    assert "UNTRAINED" not in render_markdown(report)


def test_a_genre_without_a_film_is_left_out_and_named(report: Report) -> None:
    assert report.absent == ("Animation", "Music")
    for text in (render_markdown(report), render_html(report, b""), render_table(report)):
        assert "Animation, Music" in text


def test_published_columns_are_left_away_where_no_genre_was_published(report: Report) -> None:
    own = tuple(row.model_copy(update={"published": None}) for row in report.genres)
    demo = changed(report, model="net").model_copy(update={"genres": own})
    for text in (render_markdown(demo), render_html(demo, b""), render_table(demo)):
        assert "LSTM" not in text
        assert "ResNet" not in text
    assert draw_ap(demo).startswith(b"\x89PNG")


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
def test_a_comparison_claims_no_more_than_its_interval_shows(
    low: float | None, value: float, high: float | None, beaten: str, words: str
) -> None:
    found = compared_by(low, value, high)
    assert found.beaten == beaten
    assert words in sentence(found)
    assert ("contains 0" in sentence(found)) == (beaten == "unclear" and low is not None)


def test_the_terminal_table_shows_every_genre_with_films_and_both_comparisons(
    report: Report,
) -> None:
    lines = [" ".join(line.split()) for line in render_table(report).splitlines()]
    assert "genre films precision recall AP mean-pool AP LSTM AP* ResNet AP*" in lines
    assert "Drama 143 32.5 6.2 83.0 ± 7.0 83.4 80.3 80.0" in lines
    assert not any(line.startswith("Music ") for line in lines)
    assert any(line.startswith("The model beats class prior") for line in lines)
    assert max(len(line) for line in render_table(report).splitlines()) < 130


def test_the_plot_is_made_without_pyplot() -> None:
    code = (
        "import sys; from pathlib import Path; from eval.draw import draw_ap; "
        "from eval.report import read_report; "
        "draw_ap(read_report(Path(sys.argv[1]))); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(GOLDEN / "report.json")], check=True)


def test_a_missing_or_damaged_report_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with pytest.raises(DataError, match="python -m eval report"):
        read_report(path)
    for text in ("{", "{}", '{"version": 2}'):
        path.write_text(text)
        with pytest.raises(DataError, match="want a report of version 1") as error:
            read_report(path)
        assert "\n" not in str(error.value)


def test_a_report_holds_no_nan_and_no_share_above_1(report: Report) -> None:
    row = report.genres[0].model_dump()
    for wrong in ({"precision": 1.5}, {"recall": float("nan")}, {"other": 1}):
        with pytest.raises(ValidationError):
            GenreRow.model_validate(row | wrong)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_shows_the_page(report: Report, tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    page = write_report(tmp_path, report)["report.html"]
    shot = tmp_path / "shot.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    options += ["--window-size=1200,2600", f"--user-data-dir={tmp_path / 'profile'}"]
    subprocess.run(
        [str(CHROMIUM), *options, f"--screenshot={shot}", page.as_uri()],
        check=True,
        capture_output=True,
        timeout=120,
    )
    with Image.open(shot) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    blue = (np.abs(pixels - [31, 95, 191]).sum(axis=2) < 20).sum()
    assert blue > 10_000  # the card of our own mAP
    ink = (pixels.sum(axis=2) < 300).any(axis=1)
    assert ink[2_300:].any()  # the facts at the foot of the page
