"""Observed frequency over predicted probability."""

from __future__ import annotations

from typing import TYPE_CHECKING

from training.canvas import BLUE, INK, LINE, SOFT, Picture, new_figure, plain, save

if TYPE_CHECKING:
    from eval.report import Report


def draw_reliability(report: Report) -> Picture:
    """Draw, per bin, how often genres of this probability are right, and how many pairs it has."""
    bins, error = report.calibration.bins, report.calibration.error
    figure = new_figure(4.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    above.plot([0, 100], [0, 100], color=SOFT, linestyle="--", linewidth=1, label="perfect")
    above.plot(
        [100 * one.predicted for one in bins],
        [100 * one.observed for one in bins],
        color=BLUE,
        marker="o",
        markersize=5.5,
        label=f"this model, ECE {error:.3f}",
        clip_on=False,
    )
    above.set_xlim(0, 100)
    above.set_ylim(0, 100)
    above.set_ylabel("movies that have the genre, per cent", fontsize="small", color=INK)
    above.legend(frameon=False, fontsize="small", loc="upper left")
    below.bar(
        [50 * (one.low + one.high) for one in bins],
        [one.pairs for one in bins],
        width=9,
        color=BLUE,
    )
    below.set_yscale("log")
    below.yaxis.set_major_formatter("{x:,.0f}")
    below.yaxis.set_minor_formatter("")
    below.set_ylabel("pairs", fontsize="small", color=INK)
    below.set_xlabel("predicted probability in per cent", fontsize="small", color=INK)
    for axes in (above, below):
        axes.grid(color=LINE)
        plain(axes)
    title = "Reliability of the probabilities"
    return save(figure, name="reliability", title=title, alt=_describe(report))


def _describe(report: Report) -> str:
    bins, error = report.calibration.bins, report.calibration.error
    points = ", ".join(f"{100 * one.predicted:.0f}: {100 * one.observed:.0f}" for one in bins)
    return (
        f"Expected calibration error {error:.3f}. Predicted probability and observed frequency in "
        f"per cent, per bin: {points}."
    )
