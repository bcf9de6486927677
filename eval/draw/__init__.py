"""Pictures of a report, as PNG and SVG."""

from __future__ import annotations

from eval.draw.cooccurrence import draw_cooccurrence
from eval.draw.curves import draw_curves
from eval.draw.films import draw_films
from eval.draw.genre_ap import draw_ap
from eval.draw.reliability import draw_reliability
from eval.report import Report
from training.canvas import Picture, plain_text

__all__ = ["FILMS", "Picture", "draw_pictures"]

FILMS = "films"
"""Name of the one picture that names movies."""


def draw_pictures(report: Report) -> tuple[Picture, ...]:
    """Return the pictures of a report; equal reports give equal bytes."""
    draw = (draw_ap, draw_curves, draw_reliability, draw_cooccurrence, draw_films)
    with plain_text():
        return tuple(one(report) for one in draw)
