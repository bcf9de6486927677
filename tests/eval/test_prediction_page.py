"""The forms of a prediction: terminal, JSON and page."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from eval.prediction import (
    GenrePrediction,
    KeyFrame,
    ModelFacts,
    Prediction,
    TimelinePoint,
    read_prediction,
)
from eval.prediction_page import clock, render_html, render_text, shown_genres, write_prediction
from tests.videos import scene

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
GENRES = ("Drama", "Comedy", "Action", "Horror", "Music", "War", "Western")
PROBABILITIES = (0.9, 0.62, 0.4, 0.21, 0.1, 0.05, 0.01)


def jpeg(seed: int) -> bytes:
    data: bytes = simplejpeg.encode_jpeg(scene(seed, 240, 426))
    return data


def prediction(title: str = "A film", *, seconds: float | None = 90.0) -> Prediction:
    rng = np.random.default_rng(0)
    stills = {number: jpeg(number) for number in range(12)}
    times = {n: None if seconds is None else seconds * n / 12 for n in stills}

    def frames(genre: int) -> tuple[KeyFrame, ...]:
        return tuple(
            KeyFrame(n, f"shot_{n:04d}_img_1.jpg", n, times[n], 0.5 / (1 + k))
            for k, n in enumerate((genre, 11 - genre, 5))
        )

    return Prediction(
        film=title,
        kind="frames" if seconds is None else "video",
        duration_s=seconds,
        shots=12,
        frames=36,
        scored_frames=36,
        genres=tuple(
            GenrePrediction(name, p, 0.5, p >= 0.5, frames(g) if g < 6 else ())
            for g, (name, p) in enumerate(zip(GENRES, PROBABILITIES, strict=True))
        ),
        timeline=tuple(
            TimelinePoint(
                n,
                times[n],
                None if seconds is None else seconds * (n + 1) / 12,
                tuple(rng.uniform(size=7).tolist()),
            )
            for n in range(12)
        ),
        timeline_genres=GENRES,
        shots_per_point=3,
        strip=times,
        contribution="occlusion",
        model=ModelFacts("training.models.attention:GatedAttention", "run", 3, 9, "ViT", False),
        notes=("2 of 38 frames cannot be decoded.",),
        stills=stills,
    )


def test_a_prediction_is_a_dataclass_and_its_json_contains_all_but_the_pictures(
    tmp_path: Path,
) -> None:
    made = prediction()
    assert dataclasses.is_dataclass(made)
    paths = write_prediction(tmp_path / "A film", made)
    assert [path.name for path in paths] == ["prediction.html", "prediction.json"]
    for path in (paths[1], str(paths[1])):
        assert read_prediction(path) == dataclasses.replace(made, stills={})
    assert b'"version": 1' in paths[1].read_bytes()
    assert made.predicted == ("Drama", "Comedy")
    assert made._repr_html_().startswith('<iframe srcdoc="&lt;!doctype html&gt;')


def test_the_terminal_form_fits_80_columns_and_contains_every_genre() -> None:
    text = render_text(prediction("A very long title of a film about " + "many things " * 6))
    assert max(len(line) for line in text.splitlines()) <= 80
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "Drama ██████████████████·· 0.900 0.500 predicted" in lines
    assert "Western ···················· 0.010 0.500" in lines
    assert "timeline 0:00 … 1:30" in lines
    assert "Drama: 0:00, shot 0: 0.500; 1:22, shot 11: 0.250; 0:37, shot 5: 0.167" in lines
    assert "2 of 38 frames cannot be decoded." in lines


def test_frames_without_times_are_placed_by_their_shot() -> None:
    made = prediction(seconds=None)
    for text in (render_text(made), render_html(made)):
        assert "shot 11: 0.250" in text
        assert "0:00" not in text
        assert "shot 12" not in text  # of 12 shots, the last is shot 11
    assert "shot 0 … shot 11" in render_text(made)


def test_predicted_genres_are_shown_first_and_at_least_six() -> None:
    assert [one.genre for one in shown_genres(prediction())] == list(GENRES[:6])


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0:00"), (67.9, "1:07"), (3723.0, "1:02:03"), (None, "–")]
)
def test_times_are_written_as_a_player_does(seconds: float | None, text: str) -> None:
    assert clock(seconds) == text


class Elements(HTMLParser):
    """Tags of a page with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_the_page_is_self_contained_and_every_picture_has_an_alternative_text() -> None:
    page = render_html(prediction())
    elements = Elements(page)
    assert not {tag for tag, _ in elements.found} & {"script", "link", "iframe", "object"}
    assert len(elements.named("img")) == 12 + 18  # the filmstrip; three for each shown genre
    for picture in elements.named("img"):
        assert str(picture["src"]).startswith("data:image/jpeg;base64,")
        assert picture["alt"]
    charts = elements.named("svg")
    assert len(charts) == 6
    assert all("threshold 0.50" in str(chart["aria-label"]) for chart in charts)
    assert not re.search(r"url\(|@import|https?:", page)


def test_without_stills_the_page_has_no_picture_but_all_figures(tmp_path: Path) -> None:
    page, _ = write_prediction(tmp_path, prediction(), stills=False)
    text = page.read_text("utf-8")
    assert "<img" not in text
    assert "data:" not in text
    assert "Filmstrip" not in text
    assert "1:22, shot 11: 0.250" in text


def test_a_hostile_title_breaks_neither_page_nor_folder() -> None:
    made = prediction("<b>../..</b>\x1b")
    assert "&lt;b&gt;../..&lt;/b&gt;" in render_html(made)
    assert "/" not in made.folder
    assert "\x1b" not in made.folder
    assert prediction("..").folder == "film"


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [1300, 390])
def test_a_browser_shows_the_page_without_scrolling_sideways(tmp_path: Path, width: int) -> None:
    from PIL import Image

    # In a frame of this width: the window of a browser is at least 500 pixels wide.
    frame = f'<iframe srcdoc="{escape(render_html(prediction()))}" width={width} height=4000>'
    script = "onload = () => document.title = frames[0].document.documentElement.scrollWidth"
    page = tmp_path / "page.html"
    page.write_text(
        f"<!doctype html><meta charset=utf-8><body style='margin:0'>{frame}</iframe>"
        f"<script>{script}</script>",
        "utf-8",
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    options += [f"--window-size={width + 10},4000", f"--user-data-dir={tmp_path / 'profile'}"]
    options += ["--enable-logging=stderr", f"--screenshot={tmp_path / 'shot.png'}", "--dump-dom"]
    ran = subprocess.run(
        [str(CHROMIUM), *options, page.as_uri()],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    title = re.search(r"<title>(\d+)</title>", ran.stdout)
    assert title is not None
    assert int(title[1]) <= width
    assert "CONSOLE" not in ran.stderr
    with Image.open(tmp_path / "shot.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    blue = (np.abs(pixels - [31, 95, 191]).sum(axis=2) < 20).sum()
    assert blue > 5_000  # bars and timelines of the predicted genres
