"""The films with the most confident right and wrong predictions, with their genres as bars."""

from __future__ import annotations

from typing import TYPE_CHECKING

from training.canvas import BLUE, INK, SOFT, VERMILION, Picture, new_grid, save, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from eval.report import Film, Report

_LABEL = "probability; filled: labelled, hollow: not; line: threshold"


def draw_films(report: Report) -> Picture:
    """Draw the films of both lists: filled bars are genres that the film has by label."""
    columns = (report.films.right, report.films.wrong)
    rows = max(*map(len, columns), 1)
    figure, grid = new_grid(rows, 2, cell=1.4, gap=(0.95, 0.42), left=0.95, label=_LABEL)
    by_column = zip(*grid, strict=True)
    for films, axes_column, heading in zip(columns, by_column, ("right", "wrong"), strict=True):
        for axes in axes_column[max(len(films), 1) :]:
            axes.set_axis_off()
        if not films:
            axes_column[0].set_axis_off()
            axes_column[0].text(0.5, 0.5, f"no film is {heading}", ha="center", color=SOFT)
        for axes, film in zip(axes_column, films, strict=False):
            _panel(axes, film, heading)
    title = "Most confident right and wrong films"
    return save(figure, name="films", title=title, alt=_describe(report))


def _panel(axes: Axes, film: Film, heading: str) -> None:
    colour = BLUE if heading == "right" else VERMILION
    ys = range(len(film.bars))
    axes.barh(
        ys,
        [bar.probability for bar in film.bars],
        height=0.72,
        color=[colour if bar.labelled else "none" for bar in film.bars],
        edgecolor=colour,
    )
    for y, bar in zip(ys, film.bars, strict=True):
        axes.plot([bar.threshold] * 2, [y - 0.45, y + 0.45], color=INK, linewidth=1.2)
    axes.set_title(
        f"{heading}: {short(film.movie, 14)}", fontsize="small", color=INK, loc="left", pad=3
    )
    axes.set_yticks(ys, [short(bar.genre, 13) for bar in film.bars], fontsize="x-small", color=INK)
    axes.set_ylim(len(film.bars) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"], fontsize="x-small", color=INK)
    axes.tick_params(length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(SOFT)


def _describe(report: Report) -> str:
    return " ".join(
        f"Most confident {name}: {'; '.join(map(_film, films)) or 'none'}."
        for name, films in (("right", report.films.right), ("wrong", report.films.wrong))
    )


def _film(film: Film) -> str:
    first = film.bars[0]
    labelled = ", ".join(bar.genre for bar in film.bars if bar.labelled) or "no genre"
    return f"{film.movie}, {first.genre} {first.probability:.2f}, labelled {labelled}"
