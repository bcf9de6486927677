"""Forms of a comparison: terminal text, HTML page, and the files of its folder."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.runtime.publish import publish_bytes
from eval.comparison import Comparison, Difference, RecipeRow, Spread
from eval.intervals import MIN_POSITIVES
from eval.pages import WIDTH, render_template, table_text
from eval.render import percent, with_ends
from eval.report import FEWEST_MOVIES

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = 8
"""Runs per table of genres: as many as fit into 80 columns."""

_CLAIMS: Mapping[str, str] = {
    "yes": "better",
    "no": "worse",
    "unclear": "unclear",
    "not a test": "not a test",
    "too few": "too few movies",
}


def write_comparison(folder: Path, comparison: Comparison) -> dict[str, Path]:
    """Publish ``compare.json`` and ``compare.html``; return their paths by file name."""
    contents = {
        "compare.html": render_html(comparison),
        # Published last: once it exists, the page belongs to it.
        "compare.json": comparison.model_dump_json(indent=1) + "\n",
    }
    paths = {name: folder / name for name in contents}
    for name, text in contents.items():
        publish_bytes(paths[name], text.encode())
    return paths


def render_html(comparison: Comparison) -> str:
    """Return the comparison as one self-contained page."""
    values = {"comparison": comparison, "protocol": protocol, "fewest": MIN_POSITIVES}
    return render_template("compare.html.j2", _filters(), **values)


def render_table(comparison: Comparison, *, width: int = WIDTH) -> str:
    """Return the comparison as text for a terminal; no line is longer than ``width``."""
    tables = [_run_table(comparison), *_recipe_tables(comparison), *_genre_tables(comparison)]
    closing = [
        textwrap.fill(line, width, subsequent_indent="  ", break_on_hyphens=False)
        for line in (*protocol(comparison), *comparison.notes)
    ]
    return "\n\n".join([*(table_text(table, width) for table in tables), "\n".join(closing)])


def protocol(comparison: Comparison) -> Iterator[str]:
    """Yield what the figures mean, as sentences."""
    yield (
        f"All figures are those of the {comparison.movies} movies of split {comparison.split!r} "
        "that all runs have scored."
    )
    if comparison.draws:
        yield (
            f"Intervals (95 %): {comparison.draws} bootstrap draws of these movies, paired: each "
            "draw is the same for all runs. They do not cover the choice of the seeds."
        )
    if any(len(recipe.runs) > 1 for recipe in comparison.recipes):
        yield "± is the standard deviation over runs that differ only in their seeds."
    if rare := [row.genre for row in comparison.genres if 0 < row.support < MIN_POSITIVES]:
        yield f"Too few movies to compare, fewer than {MIN_POSITIVES}: {', '.join(rare)}."
    if comparison.movies < FEWEST_MOVIES:
        yield f"Nothing is claimed from fewer than {FEWEST_MOVIES} movies."


def _run_table(comparison: Comparison) -> Table:
    table = _table(f"runs on {comparison.split}", "", "run", "mAP", "micro-AP", "mAP minus A")
    for run in comparison.runs:
        gap = gap_text(run.difference)
        table.add_row(run.key, run.name, with_ends(run.mean_ap), f"{run.micro_ap.value:.3f}", gap)
    return table


def _recipe_tables(comparison: Comparison) -> Iterator[Table]:
    if len(comparison.recipes) == len(comparison.runs):
        return  # no seeds to average over
    several = len(comparison.recipes) > 1
    names = ["recipe", "runs", "mAP", "micro-AP"]
    names += [f"mAP minus {comparison.recipes[0].name}"] if several else []
    table = _table("mean over seeds", *names)
    for recipe in comparison.recipes:
        cells = [recipe.name, " ".join(recipe.runs), spread(recipe.mean_ap)]
        cells += [spread(recipe.micro_ap), *([gap_text(recipe.difference)] if several else [])]
        table.add_row(*cells)
    yield table


def _genre_tables(comparison: Comparison) -> Iterator[Table]:
    """Yield tables of AP per genre, each with as many runs as fit."""
    for first in range(0, len(comparison.runs), _COLUMNS):
        keys = [run.key for run in comparison.runs[first : first + _COLUMNS]]
        table = _table("AP per genre, in per cent", "genre", "movies", *keys, right=2 + len(keys))
        for row in (row for row in comparison.genres if row.support):
            cells = [percent(ap) for ap in row.aps[first : first + _COLUMNS]]
            table.add_row(row.genre, str(row.support), *cells)
        yield table


def _table(title: str, *names: str, right: int = 0) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for number, name in enumerate(names):
        is_right = 0 < number < right
        table.add_column(
            name, justify="right" if is_right else "left", no_wrap=is_right, overflow="fold"
        )
    return table


def gap_text(difference: Difference | None) -> str:
    """Return a difference with its interval and what it supports: ``−0.080 (−0.1 … −0.06)``."""
    if difference is None:
        return "–"
    gap = difference.mean_ap
    ends = "" if gap.low is None else f" ({gap.low:+.3f} … {gap.high:+.3f})"
    return f"{gap.value:+.3f}{ends} {_CLAIMS[difference.better]}".replace("-0.", "−0.")


def spread(figure: Spread) -> str:
    """Return a mean over seeds with its standard deviation: ``0.322 ± 0.004``."""
    return f"{figure.mean:.3f}" + ("" if figure.std is None else f" ± {figure.std:.3f}")


def seeds(recipe: RecipeRow) -> str:
    """Return the training seeds of a recipe: ``0, 1, 2``."""
    return ", ".join(str(seed) for seed in recipe.seeds)


def best(aps: Sequence[float | None]) -> float | None:
    """Return the highest average precision of a genre; None without one."""
    return max((ap for ap in aps if ap is not None), default=None)


def _filters() -> dict[str, Any]:
    filters = (percent, with_ends, gap_text, spread, seeds, best)
    return {one.__name__: one for one in filters}
