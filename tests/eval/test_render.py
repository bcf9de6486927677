"""A report as Markdown, page, table and files."""

from __future__ import annotations

import os
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from eval.draw import draw_ap
from eval.render import render_html, render_markdown, render_table, write_report
from eval.report import Report, read_report
from tests.eval.conftest import GOLDEN

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def changed(report: Report, **compared: object) -> Report:
    return report.model_copy(update={"compared": report.compared.model_copy(update=compared)})


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


def test_the_terminal_table_shows_every_genre_with_films_and_both_comparisons(
    report: Report,
) -> None:
    lines = [" ".join(line.split()) for line in render_table(report).splitlines()]
    assert "genre films precision recall AP mean-pool AP LSTM AP* ResNet AP*" in lines
    assert "Drama 143 32.5 6.2 83.0 ± 7.0 83.4 80.3 80.0" in lines
    assert not any(line.startswith("Music ") for line in lines)
    assert any(line.startswith("The model beats class prior") for line in lines)
    assert max(len(line) for line in render_table(report).splitlines()) < 130


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
