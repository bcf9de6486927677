"""The forms of a report: Markdown, page, terminal table and files."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from eval.draw import Picture
from eval.draw.genre_ap import draw_ap
from eval.render import render_html, render_markdown, render_table, uploads
from eval.report import Report, read_report
from tests.eval.conftest import GOLDEN

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


PICTURE = Picture("ap", "Title", 'What it "shows"', b"png", b"<svg/>")


def changed(report: Report, **compared: object) -> Report:
    return report.model_copy(update={"compared": report.compared.model_copy(update=compared)})


def test_the_markdown_of_a_fixed_report_is_golden(report: Report) -> None:
    text = render_markdown(report, [PICTURE])
    if os.environ.get("MOVIENET_WRITE_GOLDEN"):
        (GOLDEN / "report.md").write_text(text, "utf-8")
    assert text == (GOLDEN / "report.md").read_text("utf-8")


def test_every_form_is_written_and_report_json_is_read_back_unchanged(
    report: Report, report_files: dict[str, Path]
) -> None:
    pictures = ("ap", "cooccurrence", "curves", "films", "reliability")
    names = [f"{name}.{kind}" for name in pictures for kind in ("png", "svg")]
    assert sorted(report_files) == sorted(["report.html", "report.json", "report.md", *names])
    assert read_report(report_files["report.json"]) == report


def test_every_picture_is_linked_by_the_markdown_and_contained_in_the_page(
    report_files: dict[str, Path],
) -> None:
    markdown, page = (report_files[f"report.{kind}"].read_text("utf-8") for kind in ("md", "html"))
    for name in ("ap", "curves", "reliability", "cooccurrence", "films"):
        assert f"]({name}.png)" in markdown
        assert base64.b64encode(report_files[f"{name}.svg"].read_bytes()).decode() in page


def test_pictures_that_name_no_movie_may_be_uploaded_and_all_files_only_on_request(
    report_files: dict[str, Path],
) -> None:
    pictures, files = uploads(report_files, "metrics")
    assert sorted(pictures) == [
        f"report/{n}" for n in ("ap", "cooccurrence", "curves", "reliability")
    ]
    assert files == ()
    pictures, files = uploads(report_files, "report")
    assert pictures["report/films"] == report_files["films.png"]
    assert set(files) == set(report_files.values())


def test_the_page_is_self_contained(report: Report) -> None:
    links: list[str] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag not in ("script", "link", "iframe")
            links.extend(value or "" for name, value in attrs if name in ("src", "href"))

    page = render_html(report, [PICTURE])
    Links().feed(page)
    assert links == ["data:image/svg+xml;base64,PHN2Zy8+"]
    assert "url(" not in page
    assert "@import" not in page


def test_hostile_names_cannot_break_the_page_or_the_tables(report: Report) -> None:
    row = report.genres[0].model_copy(update={"genre": "<b>Film|Noir</b>"})
    hostile = report.model_copy(update={"genres": (row, *report.genres[1:])})
    assert "&lt;b&gt;Film|Noir&lt;/b&gt;" in render_html(hostile, [])
    assert "| <b>Film\\|Noir</b> | 143 |" in render_markdown(hostile, [])
    assert "[red]" in render_table(changed(report, run="[red]"))


def test_an_untrained_tower_is_marked_in_every_form(report: Report) -> None:
    untrained = changed(report, untrained=True)
    assert "UNTRAINED tower" in render_markdown(untrained, []).split("## Per genre")[0]
    assert "UNTRAINED tower" in render_html(untrained, []).split("<h2>")[0]
    assert "UNTRAINED tower" in render_table(untrained)
    assert "UNTRAINED" not in render_markdown(report, [PICTURE])


def test_a_genre_without_a_movie_is_excluded_and_listed(report: Report) -> None:
    assert report.absent == ("Animation", "Music")
    for text in (render_markdown(report, [PICTURE]), render_html(report, []), render_table(report)):
        assert "Animation, Music" in text


def test_genres_with_fewer_than_ten_movies_print_too_few_instead_of_an_interval(
    report: Report,
) -> None:
    assert [row.genre for row in report.genres if row.too_few] == [
        *("Documentary", "Sport", "Musical", "Western")
    ]
    assert "| Sport | 4 | 14 | 42.0 | 75.7 | 12.8 too few |" in render_markdown(report, [PICTURE])
    assert re.search(r"Sport +4 +42.0 +75.7 +12.8 too few ", render_table(report))
    assert render_html(report, []).count(">too few</td>") == 4


def test_published_columns_are_omitted_if_no_genre_was_published(report: Report) -> None:
    own = tuple(row.model_copy(update={"published": None}) for row in report.genres)
    unpublished = changed(report, model="net").model_copy(update={"genres": own})
    for text in (
        render_markdown(unpublished, []),
        render_html(unpublished, []),
        render_table(unpublished),
    ):
        assert "LSTM" not in text
        assert "ResNet" not in text
    assert b"LSTM" not in draw_ap(unpublished).svg


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


def browse(page: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    common = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    common += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr"]
    done = subprocess.run(
        [str(CHROMIUM), *common, *options, page.as_uri()],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr  # no error and no warning of the page
    return done


def test_every_form_states_the_notes(report: Report) -> None:
    noted = report.model_copy(update={"notes": ("No baseline could be fitted.",)})
    for text in (render_markdown(noted, []), render_html(noted, []), render_table(noted)):
        assert "No baseline could be fitted." in text


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_shows_the_page(report_files: dict[str, Path], tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    shot = tmp_path / "shot.png"
    browse(report_files["report.html"], tmp_path, "--window-size=1200,6000", f"--screenshot={shot}")
    with Image.open(shot) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    for card in ([31, 95, 191], [0, 114, 178], [213, 94, 0]):  # mAP, pictures, wrong films
        assert (np.abs(pixels - card).sum(axis=2) < 20).sum() > 3_000
    ink = (pixels.sum(axis=2) < 300).any(axis=1)
    assert ink[4_500:].any()  # the protocol at the bottom of the page


MEASURE = """<script>
addEventListener("load", () => parent.postMessage([
  document.documentElement.scrollWidth,
  [...document.images].filter(image => image.naturalWidth > 0 && image.width <= 390).length,
  performance.getEntriesByType("resource").filter(one => !one.name.startsWith("data:")).length,
].join(), "*"));
</script>"""

PHONE = """<!doctype html><iframe src="page.html" width="390" height="844" frameborder="0"></iframe>
<script>addEventListener("message", event => document.body.dataset.measured = event.data);</script>
"""
"""A frame, since the window of a browser has a minimum width."""


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_phone_shows_the_page_without_sideways_scrolling_and_without_requests(
    report_files: dict[str, Path], tmp_path: Path
) -> None:
    text = report_files["report.html"].read_text("utf-8")
    (tmp_path / "page.html").write_text(text.replace("</body>", f"{MEASURE}</body>"), "utf-8")
    (tmp_path / "phone.html").write_text(PHONE)
    shown = browse(tmp_path / "phone.html", tmp_path, "--virtual-time-budget=9000", "--dump-dom")
    assert re.findall('data-measured="(.*?)"', shown.stdout) == ["390,5,0"]  # width, images, loads


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_page_is_printed_in_few_sheets(report_files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "page.pdf"
    browse(report_files["report.html"], tmp_path, f"--print-to-pdf={out}")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", out.read_bytes())) <= 10
