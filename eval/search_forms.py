"""Forms of a search: ``search.json``, page and terminal table."""

from __future__ import annotations

import base64
import json
import re
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from configs.runtime.publish import publish_bytes
from eval.pages import WIDTH, render_template, table_text

if TYPE_CHECKING:
    from eval.text_search import FoundShot, SearchResult

_NAME_CHARACTERS = 40
"""Longest folder name of a query."""


def search_folder(runs: Path, query: str) -> Path:
    """Return the folder of a query: ``RUNS/search/a-car-chase-at-night``."""
    name = re.sub(r"\W+", "-", query.lower()).strip("-")[:_NAME_CHARACTERS].strip("-")
    return runs / "search" / (name or "query")


def write_search(folder: Path, result: SearchResult) -> dict[str, Path]:
    """Publish ``search.html`` and ``search.json``; return their paths by file name."""
    tree = asdict(result)
    del tree["stills"]
    contents = {
        "search.html": render_html(result),
        "search.json": json.dumps({"version": 1, **tree}, indent=1, ensure_ascii=False) + "\n",
    }
    paths = {name: folder / name for name in contents}
    for name, text in contents.items():
        publish_bytes(paths[name], text.encode())
    return paths


def render_html(result: SearchResult) -> str:
    """Return the result as one self-contained page."""
    stills = [still and base64.b64encode(still).decode() for still in result.stills]
    return render_template(
        "search.html.j2",
        {"shot_name": shot_name},
        result=result,
        cards=list(zip(result.shots, stills, strict=True)),
        has_stills=any(stills),
    )


def render_table(result: SearchResult, *, width: int = WIDTH) -> str:
    """Return the result as text for a terminal; no line is longer than ``width``."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("", "similarity", "movie", "shot", "position", "genres"):
        is_text = name in ("movie", "genres")
        table.add_column(name, justify="left" if is_text else "right", overflow="fold")
    for one in result.shots:
        table.add_row(
            str(one.rank),
            f"{one.similarity:.3f}",
            one.movie,
            "–" if one.shot is None else str(one.shot),
            f"{one.position:.0%}",
            ", ".join(one.genres),
        )
    head = f"“{result.query}” in {result.rows:,} rows of {result.movies:,} movies"
    lines = [head, table_text(table, width), *result.notes]
    return "\n\n".join(
        line if "\n" in line else textwrap.fill(line, width, subsequent_indent="  ")
        for line in lines
        if line
    )


def shot_name(shot: FoundShot) -> str:
    """Return how a page names a shot: ``tt0032138, shot 4``."""
    place = f"row {shot.row}" if shot.shot is None else f"shot {shot.shot}"
    return f"{shot.movie}, {place}"
