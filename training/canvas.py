"""Colours, and figures saved with equal bytes for equal content.

Figures are drawn without pyplot's global state and without a window system. They are 4.4 inches
wide, so that their text remains readable on a phone, where pages scale them to about 350 pixels.

Colours are those of Okabe and Ito (Color Universal Design, 2008), which remain distinct for readers
with any kind of colour blindness. Every meaning also has its own shape.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, LINE, WASH = "#1c2430", "#5d6878", "#dde2e9", "#f5f7fa"
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"

WIDTH = 4.4
"""Inches."""


@dataclass(frozen=True)
class Picture:
    """A picture in both formats."""

    name: str
    """File name without suffix."""

    title: str
    alt: str
    """What the picture shows, for readers who do not see it."""

    png: bytes
    svg: bytes


def short(name: str, longest: int = 18) -> str:
    """Return a name that fits into a margin; the page and the alternative text have it complete."""
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def plain_text() -> AbstractContextManager[None]:
    """Return a context in which "$" in a name is text, and ids in SVG are not random."""
    from matplotlib import rc_context

    return rc_context({"text.parse_math": False, "svg.hashsalt": "movienet"})


def new_figure(height: float) -> Figure:
    """Return an empty figure of ``height`` inches, whose margins fit its text."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), dpi=200, layout="constrained")


def new_grid(
    rows: int, columns: int, *, cell: float, gap: tuple[float, float], left: float, label: str
) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure of equal panels and its axes by row. All lengths are inches.

    A layout that measures the text of 20 panels would take seconds, so these margins are fixed.

    Args:
        rows: Panels from top to bottom.
        columns: Panels from left to right.
        cell: Height of a panel.
        gap: Horizontal and vertical distance of panels, for their ticks and titles.
        left: Margin for the ticks of the first column.
        label: Text below all panels.
    """
    from matplotlib.figure import Figure

    top, bottom, right = 0.3, 0.55, 0.15
    height = top + rows * cell + (rows - 1) * gap[1] + bottom
    width = (WIDTH - left - right - (columns - 1) * gap[0]) / columns
    figure = Figure(figsize=(WIDTH, height), dpi=200)
    figure.subplots_adjust(
        left=left / WIDTH,
        right=1 - right / WIDTH,
        top=1 - top / height,
        bottom=bottom / height,
        wspace=gap[0] / width,
        hspace=gap[1] / cell,
    )
    grid = figure.subplots(rows, columns, squeeze=False)
    figure.supxlabel(label, y=0.08 / height, va="bottom", fontsize="small", color=INK)
    return figure, [list(row) for row in grid]


def save(figure: Figure, *, name: str, title: str, alt: str) -> Picture:
    """Return the figure as a picture."""
    png, svg = to_png(figure), io.BytesIO()
    with _missing_glyphs_allowed():
        figure.savefig(svg, format="svg", metadata={"Creator": None, "Date": None})
    return Picture(name, title, alt, png, svg.getvalue())


def to_png(figure: Figure) -> bytes:
    """Return the figure as PNG. Without names and dates, equal figures have equal bytes."""
    png = io.BytesIO()
    with _missing_glyphs_allowed():
        if figure.get_layout_engine():
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # measured once for all formats
        figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()


@contextmanager
def _missing_glyphs_allowed() -> Iterator[None]:
    """Draw names in scripts that the font lacks as boxes; a page has them as text."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def plain(axes: Axes) -> None:
    """Remove the frame and soften the ticks."""
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.tick_params(which="both", length=0, colors=INK, labelsize="small")
    axes.set_axisbelow(True)
