"""Average precision per genre."""

from __future__ import annotations

from typing import TYPE_CHECKING

from training.canvas import (
    BLUE,
    GREEN,
    LINE,
    PURPLE,
    VERMILION,
    WASH,
    Picture,
    new_figure,
    plain,
    save,
    short,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from eval.report import GenreRow, Report


def draw_ap(report: Report) -> Picture:
    """Draw the average precision of each genre that has movies, most frequent first.

    It shows the model with its intervals, the mean-pool baseline, and the published figures.
    """
    rows = sorted((row for row in report.genres if row.support), key=lambda row: -row.support)
    figure = new_figure(1.5 + 0.27 * len(rows))
    axes = figure.add_subplot()
    _mark_model(axes, rows)
    _mark_mean_pool(axes, rows)
    _mark_published(axes, rows)
    _format(axes, rows)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize="small")
    return save(figure, name="ap", title="Average precision per genre", alt=_describe(report, rows))


def _describe(report: Report, rows: list[GenreRow]) -> str:
    points = [(row.ap.value, row.genre) for row in rows if row.ap]
    if not points:
        return "Average precision per genre: no genre has a movie."
    (worst, last), (best, first) = min(points), max(points)
    ours = sum(
        row.ap.value > row.mean_pool_ap for row in rows if row.ap and row.mean_pool_ap is not None
    )
    compared = f"; the model is above mean-pool + linear in {ours} of them"
    return (
        f"Average precision of {len(points)} genres, from {100 * worst:.0f} ({last}) to "
        f"{100 * best:.0f} per cent ({first}){compared if report.baselines else ''}. "
        "The table below contains all figures."
    )


def _mark_model(axes: Axes, rows: list[GenreRow]) -> None:
    points = [(y, row.ap) for y, row in enumerate(rows) if row.ap is not None]
    for y, ap in points:
        if ap.low is not None and ap.high is not None:
            axes.plot([100 * ap.low, 100 * ap.high], [y, y], color=BLUE, linewidth=2, alpha=0.45)
    axes.plot(
        [100 * ap.value for _, ap in points],
        [y for y, _ in points],
        linestyle="none",
        marker="o",
        markersize=5.5,
        color=BLUE,
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
            markersize=8,  # large enough to frame the model's marker where both coincide
            markerfacecolor="none",
            markeredgecolor=VERMILION,
            markeredgewidth=1.6,
            label="mean-pool + linear",
            zorder=3,
            clip_on=False,
        )


def _mark_published(axes: Axes, rows: list[GenreRow]) -> None:
    for column, marker, colour, label in (
        ("lstm_ap", "x", GREEN, "published LSTM*"),
        ("resnet_ap", "+", PURPLE, "published ResNet*"),
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
                markersize=6.5,
                markeredgewidth=1.6,
                color=colour,
                label=label,
                zorder=2,
                clip_on=False,
            )


def _format(axes: Axes, rows: list[GenreRow]) -> None:
    names = [
        f"{short(row.genre)}  {row.support}{', too few' if row.too_few else ''}" for row in rows
    ]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    other = "\n* measured on another split" if any(row.published for row in rows) else ""
    axes.set_xlabel(f"AP in per cent; after the names: movies{other}", fontsize="small")
    axes.grid(axis="x", color=LINE)
    for y in range(0, len(rows), 2):
        axes.axhspan(y - 0.5, y + 0.5, color=WASH, zorder=0)
    plain(axes)
