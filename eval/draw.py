"""The plot of a report, and the only file that imports matplotlib.

Figures are drawn on the Agg canvas directly, without a window system and without pyplot's global
state.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from eval.report import GenreRow, Report

_INK, _SOFT, _BLUE, _ORANGE, _GREEN = "#1c2430", "#5d6878", "#1f5fbf", "#d9730d", "#3d8b5f"


def draw_ap(report: Report) -> bytes:
    """Return a PNG: average precision of each genre that has movies, most frequent first.

    It shows the model with its intervals, the mean-pool baseline, and the published figures.
    """
    from matplotlib.figure import Figure  # without pyplot, a figure uses the Agg canvas

    rows = sorted((row for row in report.genres if row.support), key=lambda row: -row.support)
    figure = Figure(figsize=(9.6, 1.4 + 0.3 * len(rows)), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    _mark_model(axes, rows)
    _mark_mean_pool(axes, rows)
    _mark_published(axes, rows)
    _format(axes, rows)
    picture = io.BytesIO()
    # Without the software name and its version, equal reports give equal bytes.
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def _mark_model(axes: Axes, rows: list[GenreRow]) -> None:
    points = [(y, row.ap) for y, row in enumerate(rows) if row.ap is not None]
    for y, ap in points:
        if ap.low is not None and ap.high is not None:
            axes.plot([100 * ap.low, 100 * ap.high], [y, y], color=_BLUE, linewidth=2, alpha=0.45)
    axes.plot(
        [100 * ap.value for _, ap in points],
        [y for y, _ in points],
        linestyle="none",
        marker="o",
        markersize=7,
        color=_BLUE,
        label="this model, with 95 % interval",
        zorder=4,
        clip_on=False,
    )


def _mark_mean_pool(axes: Axes, rows: list[GenreRow]) -> None:
    baseline = [(y, row.mean_pool_ap) for y, row in enumerate(rows) if row.mean_pool_ap is not None]
    if baseline:
        ys, aps = zip(*baseline, strict=True)
        axes.plot(
            [100 * ap for ap in aps],
            ys,
            linestyle="none",
            marker="D",
            markersize=9,  # large enough to frame the model's marker where both coincide
            markerfacecolor="none",
            markeredgecolor=_ORANGE,
            markeredgewidth=1.6,
            label="mean-pool + linear",
            zorder=3,
            clip_on=False,
        )


def _mark_published(axes: Axes, rows: list[GenreRow]) -> None:
    for column, marker, colour, label in (
        ("lstm_ap", "x", _GREEN, "published LSTM (another split)"),
        ("resnet_ap", "+", _SOFT, "published ResNet (another split)"),
    ):
        values = [getattr(row.published, column) if row.published else None for row in rows]
        points = [(value, y) for y, value in enumerate(values) if value is not None]
        if points:
            xs, ys = zip(*points, strict=True)
            axes.plot(
                xs,
                ys,
                linestyle="none",
                marker=marker,
                markersize=7,
                markeredgewidth=1.6,
                color=colour,
                label=label,
                zorder=2,
                clip_on=False,
            )


def _format(axes: Axes, rows: list[GenreRow]) -> None:
    axes.set_yticks(range(len(rows)), [f"{row.genre}  ({row.support})" for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel("average precision in per cent (in brackets: movies of the scored split)")
    axes.grid(axis="x", color="#dde2e9")
    for y in range(0, len(rows), 2):
        axes.axhspan(y - 0.5, y + 0.5, color="#f5f7fa", zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False, colors=_INK)
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, fontsize="small"
    )
