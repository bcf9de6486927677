"""Which genres occur together, labelled and predicted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from eval.cooccurrence import given_first, most_different
from training.canvas import INK, WIDTH, Picture, new_figure, save, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage
    from numpy.typing import NDArray

    from eval.report import Report

_COLOURS = "cividis"  # Nuñez, Anderton and Renslow 2018: the same for colour-blind readers


def draw_cooccurrence(report: Report) -> Picture:
    """Draw the share of the movies of a genre (row) that also have another genre (column)."""
    genres = [row.genre for row in report.genres]
    labelled, predicted = (
        np.array(counts).reshape(len(genres), len(genres))
        for counts in (report.cooccurrence.labelled, report.cooccurrence.predicted)
    )
    shown = np.flatnonzero(labelled.diagonal() + predicted.diagonal())
    names, cells = [short(genres[g]) for g in shown], np.ix_(shown, shown)
    figure = new_figure(1.2 + 2 * WIDTH * 0.86)
    for axes, title, counts in zip(
        figure.subplots(2, 1), ("labelled", "predicted"), (labelled, predicted), strict=True
    ):
        image = _panel(axes, names, given_first(counts)[cells])
        axes.set_title(title, fontsize="medium", color=INK)
    bar = figure.colorbar(image, ax=figure.axes, location="bottom", shrink=0.7, aspect=30, pad=0.01)
    bar.set_label("movies of the row that have the column, per cent", fontsize="small")
    return save(
        figure,
        name="cooccurrence",
        title="Genres that occur together",
        alt=_describe(genres, labelled, predicted),
    )


def _panel(axes: Axes, names: list[str], shares_GG: NDArray[np.float64]) -> AxesImage:
    shares_GG = shares_GG.copy()
    np.fill_diagonal(shares_GG, np.nan)  # always 100
    image = axes.imshow(100 * shares_GG, cmap=_COLOURS, vmin=0, vmax=100)
    axes.set_facecolor("#ffffff")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize="x-small", color=INK)
    axes.set_yticks(range(len(names)), names, fontsize="x-small", color=INK)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def _describe(genres: list[str], labelled: NDArray[np.int64], predicted: NDArray[np.int64]) -> str:
    pair = most_different(labelled, predicted)
    if pair is None:
        return "Every two genres are predicted together as often as they are labelled together."
    return (
        "The largest difference between labels and predictions: "
        f"{genres[pair.first]} and {genres[pair.second]} occur together in {pair.labelled} movies "
        f"by label, in {pair.predicted} by prediction."
    )
