"""The pictures of a report."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from eval.draw import FILMS, draw_pictures
from eval.report import Calibration, Cooccurrence, Curve, Film, FilmBar, Films, Report
from tests.eval.conftest import GOLDEN

pytestmark = pytest.mark.slow

PROGRAM = """
import hashlib, json, sys
from pathlib import Path
from eval.draw import draw_pictures
from eval.report import read_report

pictures = draw_pictures(read_report(Path(sys.argv[1])))
assert "matplotlib.pyplot" not in sys.modules
print(json.dumps({
    f"{one.name}.{kind}": hashlib.sha256(getattr(one, kind)).hexdigest()
    for one in pictures for kind in ("png", "svg")
}))
"""

NAMES = ("ap", "curves", "reliability", "cooccurrence", "films")


def test_equal_reports_give_equal_bytes_in_any_process_and_pyplot_is_not_used(
    report_files: dict[str, Path],
) -> None:
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(GOLDEN / "report.json")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    digests = json.loads(done.stdout)
    assert sorted(digests) == sorted(f"{name}.{kind}" for name in NAMES for kind in ("png", "svg"))
    for name, digest in digests.items():
        assert hashlib.sha256(report_files[name].read_bytes()).hexdigest() == digest


def test_only_the_picture_of_films_names_movies(
    report: Report, report_files: dict[str, Path]
) -> None:
    # matplotlib writes each text as a comment next to its shapes.
    movies = [film.movie for film in (*report.films.right, *report.films.wrong)]
    for name in NAMES:
        svg = report_files[f"{name}.svg"].read_text("utf-8")
        assert [movie in svg for movie in movies] == [name == FILMS] * len(movies)


def test_no_picture_contains_a_date_or_a_version(report_files: dict[str, Path]) -> None:
    for name in NAMES:
        assert b"dc:date" not in report_files[f"{name}.svg"].read_bytes()
        assert b"tEXt" not in report_files[f"{name}.png"].read_bytes()


def hostile(report: Report, name: str) -> Report:
    """Return a report of one movie and one genre, both called ``name``."""
    bar = FilmBar(genre=name, probability=1, threshold=0.5, labelled=True)
    return report.model_copy(
        update={
            "genres": (report.genres[0].model_copy(update={"genre": name, "support": 1}),),
            "curves": (
                Curve(name="all genres", precision=(1, 1)),
                Curve(name=name, precision=(1, 1)),
            ),
            "calibration": Calibration(error=0, bins=()),
            "cooccurrence": Cooccurrence(labelled=((1,),), predicted=((0,),)),
            "films": Films(right=(Film(movie=name, bars=(bar,)),), wrong=()),
        }
    )


def test_names_are_text_of_any_script_and_length_and_lists_may_be_empty(report: Report) -> None:
    name = "$x^$ & <b> 電影\\frac -->" * 9
    *_, films = draw_pictures(hostile(report, name))
    assert films.alt == (
        f"Most confident right: {name}, {name} 1.00, labelled {name}. Most confident wrong: none."
    )


def test_the_alternative_text_states_what_a_picture_shows(
    report: Report, report_files: dict[str, Path]
) -> None:
    page = report_files["report.html"].read_text("utf-8")
    for text in (
        "Average precision of 19 genres, from 13 (Sport) to 83 per cent (Drama); the model is",
        "Over all genres, precision is ",
        f"Expected calibration error {report.calibration.error:.3f}. Predicted probability and",
        " occur together in 35 movies by label, in 165 by prediction.",
        f"Most confident right: {report.films.right[0].movie}, Drama 0.99, labelled Drama, ",
    ):
        assert f'alt="{text}' in page or text in page.partition('alt="')[2]
