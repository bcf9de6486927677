"""Plot of a run: ``learning_curve.png``, with the loss of each step and the mAP of validations.

It is drawn from ``metrics.jsonl``, so that a run of any age has one, and never makes a run fail.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from configs.corrupt import reason_of
from configs.errors import MovieNetError, error_text
from configs.runtime.attempt import read_attempts
from configs.runtime.publish import publishing
from training.canvas import (
    BLUE,
    INK,
    LINE,
    SOFT,
    VERMILION,
    new_grid,
    plain,
    plain_text,
    short,
    to_png,
)
from training.metrics_file import iter_metrics
from training.run_summary import best_validation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

NAME = "learning_curve.png"

_EVERY_S = 60.0
"""Shortest time between two plots of an attempt."""

_COST_FACTOR = 100
"""A plot waits for this multiple of the time that the one before took: at most 1 % of a run."""

_POINTS = 400
"""Most points of the loss; with more steps, each point is the mean of several."""

_FEW = 20
"""Points of the loss below which each one is marked."""

_STYLES = (("o", BLUE), ("D", VERMILION))
"""Of the holdout and the monitored split."""


class CurvePlotter:
    """Plots a run while it is trained, at validations that are not too close. Of rank 0 alone."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._due_s = time.monotonic() + _EVERY_S

    def plot_if_due(self) -> None:
        """Draw the plot again unless the last one is recent. It never raises an ``Exception``."""
        began_s = time.monotonic()
        if began_s < self._due_s:
            return
        write_learning_curve(self._run_dir)
        now_s = time.monotonic()
        self._due_s = now_s + max(_EVERY_S, _COST_FACTOR * (now_s - began_s))


def write_learning_curve(run_dir: Path) -> Path | None:
    """Draw the plot of a run unless it shows all its metrics. It never raises an ``Exception``.

    A plot has the time of the metrics that it shows.

    Returns:
        Its path; None if there is nothing to draw or it cannot be written, which logs a warning.
    """
    path = run_dir / NAME
    try:
        # Taken before they are read: with records that follow, the metrics are newer than the plot.
        time_ns = _time_ns(run_dir / "metrics.jsonl")
        if time_ns and _time_ns(path) >= time_ns:
            return path
        png = draw_learning_curve(run_dir)
        if png is None:
            return None
        with publishing(path) as file:
            file.write(png)
            file.flush()
            os.utime(file.fileno(), ns=(time_ns, time_ns))
    except (MovieNetError, OSError) as error:  # e.g. a full disk
        _warn(path, error_text(error))
    except Exception as error:  # noqa: BLE001  # whatever fails in matplotlib, the run continues
        _warn(path, reason_of(error))
    else:
        return path
    return None


def _warn(path: Path, reason: str) -> None:
    logger.warning("%s: not drawn (%s); the run is not affected", path, reason)


def _time_ns(file: Path) -> int:
    """Return when a file was changed; 0 if it does not exist."""
    return file.stat().st_mtime_ns if file.exists() else 0


def draw_learning_curve(run_dir: Path) -> bytes | None:
    """Return the plot as PNG; None before the first step.

    Raises:
        MovieNetError: ``metrics.jsonl`` or an attempt record is corrupt.
    """
    steps, losses, validations = _read(run_dir / "metrics.jsonl")
    if not steps:
        return None
    resumed = [one.from_step for one in read_attempts(run_dir) if one.from_step]
    label = "step; dashed: resumed" if resumed else "step"
    with plain_text():
        rows = 2 if validations else 1
        figure, grid = new_grid(rows, 1, cell=1.7, gap=(0, 0.12), left=0.7, label=label)
        figure.suptitle(short(run_dir.resolve().name, 40), fontsize="medium", color=INK)
        _draw_loss(grid[0][0], np.array(steps), np.array(losses))
        if validations:
            _draw_map(grid[1][0], validations)
            grid[1][0].sharex(grid[0][0])
            grid[0][0].tick_params(labelbottom=False)
        for (axes,) in grid:
            _format(axes, resumed)
        return to_png(figure)


def _read(metrics: Path) -> tuple[list[int], list[float], list[dict[str, Any]]]:
    """Return steps and losses, and the validations with scores. Runs may have millions of steps."""
    steps: list[int] = []
    losses: list[float] = []
    validations = []
    for record in iter_metrics(metrics):
        if record["kind"] == "train" and record.get("loss") is not None:
            steps.append(record["step"])
            losses.append(record["loss"])
        elif record["kind"] == "validation" and any(key.endswith("/map") for key in record):
            validations.append(record)  # without movies to validate on, a record has no scores
    return steps, losses, validations


def _draw_loss(axes: Axes, steps_N: NDArray[np.int64], losses_N: NDArray[np.float64]) -> None:
    points = min(len(steps_N), _POINTS)
    xs = [part.mean() for part in np.array_split(steps_N, points)]
    parts = np.array_split(losses_N, points)
    if points < len(steps_N):
        lows, highs = [part.min() for part in parts], [part.max() for part in parts]
        axes.fill_between(xs, lows, highs, color=BLUE, alpha=0.2, linewidth=0)
    marker = "." if points < _FEW else None  # a single point has no line
    axes.plot(xs, [part.mean() for part in parts], color=BLUE, linewidth=1.2, marker=marker)
    axes.set_ylabel("training loss", fontsize="small", color=INK)


def _draw_map(axes: Axes, validations: Sequence[Mapping[str, Any]]) -> None:
    best = best_validation(validations)
    chosen = best or validations[-1]
    names = dict.fromkeys(key for one in validations for key in one if key.endswith("/map"))
    ordered = sorted(names, key=lambda name: name != "holdout/map")
    for name, (marker, colour) in zip(ordered, _STYLES, strict=False):
        points = [(one["step"], one[name]) for one in validations if one.get(name) is not None]
        value = chosen.get(name)
        axes.plot(
            *([point[axis] for point in points] for axis in (0, 1)),
            color=colour,
            marker=marker,
            markersize=4,
            markevery=max(1, len(points) // 25),
            linewidth=1.2,
            label=name.removesuffix("/map") + ("" if value is None else f" {value:.3f}"),
        )
        if value is not None:
            axes.plot(chosen["step"], value, marker, markersize=9, color=colour, fillstyle="none")
    title = f"{'best' if best else 'last'} (epoch {chosen['epoch']})"
    axes.legend(title=title, frameon=False, fontsize="small", title_fontsize="small")
    axes.set_ylabel("mAP", fontsize="small", color=INK)


def _format(axes: Axes, resumed: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    for step in resumed:
        axes.axvline(step, color=SOFT, linewidth=1, linestyle="--")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.margins(y=0.1)  # markers are not cut
    axes.grid(color=LINE)
    plain(axes)
