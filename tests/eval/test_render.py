"""The forms of a report: Markdown, page, terminal table and files."""

from __future__ import annotations

import os
import re
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


def test_every_form_is_derived_from_report_json_alone(report: Report, tmp_path: Path) -> None:
    first = {name: path.read_bytes() for name, path in write_report(tmp_path, report).items()}
    assert sorted(first) == ["ap.png", "report.html", "report.json", "report.md"]
    second = write_report(tmp_path / "second", read_report(tmp_path / "report.json"))
    assert {name: path.read_bytes() for name, path in second.items()} == first


def test_the_page_is_self_contained(report: Report) -> None:
    links: list[str] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag not in ("script", "link", "iframe")
            links.extend(value or "" for name, value in attrs if name in ("src", "href"))

    page = render_html(report, b"picture")
    Links().feed(page)
    assert links == ["data:image/png;base64,cGljdHVyZQ=="]
    assert "url(" not in page
    assert "@import" not in page


def test_hostile_names_cannot_break_the_page_or_the_tables(report: Report) -> None:
    row = report.genres[0].model_copy(update={"genre": "<b>Film|Noir</b>"})
    hostile = report.model_copy(update={"genres": (row, *report.genres[1:])})
    assert "&lt;b&gt;Film|Noir&lt;/b&gt;" in render_html(hostile, b"")
    assert "| <b>Film\\|Noir</b> | 143 |" in render_markdown(hostile)
    assert "[red]" in render_table(changed(report, run="[red]"))


def test_an_untrained_tower_is_marked_in_every_form(report: Report) -> None:
    untrained = changed(report, untrained=True)
    assert "UNTRAINED tower" in render_markdown(untrained).split("## Per genre")[0]
    assert "UNTRAINED tower" in render_html(untrained, b"").split("<h2>")[0]
    assert "UNTRAINED tower" in render_table(untrained)
    assert "UNTRAINED" not in render_markdown(report)


def test_a_genre_without_a_movie_is_excluded_and_listed(report: Report) -> None:
    assert report.absent == ("Animation", "Music")
    for text in (render_markdown(report), render_html(report, b""), render_table(report)):
        assert "Animation, Music" in text


def test_genres_with_fewer_than_ten_movies_print_too_few_instead_of_an_interval(
    report: Report,
) -> None:
    assert [row.genre for row in report.genres if row.too_few] == [
        *("Documentary", "Sport", "Musical", "Western")
    ]
    assert "| Sport | 4 | 14 | 42.0 | 75.7 | 12.8 too few |" in render_markdown(report)
    assert re.search(r"Sport +4 +42.0 +75.7 +12.8 too few ", render_table(report))
    assert render_html(report, b"").count(">too few</td>") == 4


def test_published_columns_are_omitted_if_no_genre_was_published(report: Report) -> None:
    own = tuple(row.model_copy(update={"published": None}) for row in report.genres)
    unpublished = changed(report, model="net").model_copy(update={"genres": own})
    for text in (
        render_markdown(unpublished),
        render_html(unpublished, b""),
        render_table(unpublished),
    ):
        assert "LSTM" not in text
        assert "ResNet" not in text
    assert draw_ap(unpublished).startswith(b"\x89PNG")


def test_the_terminal_table_shows_every_genre_with_movies_and_both_comparisons(
    report: Report,
) -> None:
    lines = [" ".join(line.split()) for line in render_table(report).splitlines()]
    assert "genre movies precision recall AP AP AP* AP*" in lines
    assert "mean-pool LSTM ResNet" in lines
    assert "Drama 143 32.5 6.2 83.0 (76–90) 83.4 80.3 80.0" in lines
    assert not any(line.startswith("Music ") for line in lines)
    assert any(line.startswith("The model beats class prior") for line in lines)
    assert "model 0.314 (0.268 … 0.360) 0.498 (0.458 … 0.537)" in lines


def test_no_line_of_the_terminal_report_is_longer_than_80_columns(report: Report) -> None:
    first, *others = report.genres
    verbose = first.model_copy(update={"genre": "Historical drama of the sixties"})
    for genres in (report.genres, (verbose, *others)):
        text = render_table(report.model_copy(update={"genres": genres}))
        assert max(len(line) for line in text.splitlines()) <= 80
        # A long name wraps; the figures stay complete.
        assert "143       32.5     6.2  83.0 (76–90)       83.4  80.3    80.0" in text


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
    assert blue > 10_000  # the card of the model's mAP
    ink = (pixels.sum(axis=2) < 300).any(axis=1)
    assert ink[2_300:].any()  # the protocol at the bottom of the page
