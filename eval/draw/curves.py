"""Precision over recall, one small panel per genre."""

from __future__ import annotations

import math
from itertools import chain
from typing import TYPE_CHECKING

from training.canvas import BLUE, INK, LINE, VERMILION, Picture, new_grid, plain, save, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from eval.report import Curve, Report

_COLUMNS = 3
_LABEL = "recall in per cent; dashed: share of movies that have the genre"


def draw_curves(report: Report) -> Picture:
    """Draw precision over recall for all pairs, then per genre, most frequent first.

    The dashed line is the share of movies that have the genre: the precision of a random order.
    """
    support = {row.genre: row.support for row in report.genres}
    pooled, *genres = report.curves
    genres.sort(key=lambda one: -support[one.name])
    movies = report.compared.movies
    shares = [sum(support.values()) / (len(support) * movies)]
    shares += [support[one.name] / movies for one in genres]
    rows = math.ceil((1 + len(genres)) / _COLUMNS)
    figure, grid = new_grid(rows, _COLUMNS, cell=1.15, gap=(0.2, 0.36), left=0.62, label=_LABEL)
    panels = list(chain.from_iterable(grid))
    for number, (axes, curve, share) in enumerate(
        zip(panels, [pooled, *genres], shares, strict=False)
    ):
        _panel(axes, curve, share)
        # Ticks at the edges only: nothing is below the panels of the last row.
        axes.tick_params(labelleft=number % _COLUMNS == 0, labelbottom=number > len(genres) - 3)
    for axes in panels[1 + len(genres) :]:
        axes.set_axis_off()
    figure.supylabel("precision in per cent", x=0.01, fontsize="small", color=INK)
    title = "Precision over recall"
    return save(figure, name="curves", title=title, alt=_describe(pooled, genres))


def _panel(axes: Axes, curve: Curve, share: float) -> None:
    steps = len(curve.precision) - 1
    recalls = [100 * step / steps for step in range(steps + 1)]
    axes.plot(recalls, [100 * one for one in curve.precision], color=BLUE, linewidth=1.6)
    axes.axhline(100 * share, color=VERMILION, linewidth=1, linestyle="--")
    axes.set_title(short(curve.name, 14), fontsize="small", color=INK, pad=3)
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 103)
    axes.set_xticks([0, 50, 100], ["0", "50", "100 "])
    axes.set_yticks([0, 50, 100])
    axes.grid(color=LINE)
    plain(axes)


def _describe(pooled: Curve, genres: list[Curve]) -> str:
    half = len(pooled.precision) // 2
    line = f"Over all genres, precision is {100 * pooled.precision[half]:.0f} per cent at recall 50"
    if not genres:
        return f"{line}."
    ranked = sorted((one.precision[half], one.name) for one in genres)
    (low, last), (high, first) = ranked[0], ranked[-1]
    return (
        f"{line}; per genre it is between {100 * low:.0f} ({last}) and {100 * high:.0f} ({first})."
    )
