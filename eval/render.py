"""``report.json`` as Markdown, HTML page, terminal table and files."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from configs.runtime.publish import publish_bytes
from eval.report import BaselineResult, Figure, GenreRow, Report


def sentence(baseline: BaselineResult) -> str:
    """Return the comparison with one baseline in words that claim no more than was seen."""
    gap = baseline.difference
    if gap.low is None or gap.high is None:
        return f"Against {baseline.name}: {gap.value:+.3f} mAP, without an interval."
    words = {
        "yes": "beats",
        "no": "does not beat, and is worse than,",
        "unclear": "does not clearly beat" if gap.value > 0 else "does not beat",
    }[baseline.beaten]
    ends = f"{gap.low:+.3f} … {gap.high:+.3f}"
    seen = ", which contains 0" if baseline.beaten == "unclear" else ""
    return (
        f"The model {words} {baseline.name}: {gap.value:+.3f} mAP, 95 % interval {ends}{seen}."
    ).replace("-0.", "−0.")


def write_report(folder: Path, report: Report) -> dict[str, Path]:
    """Publish ``report.json`` and what is made of it; return the paths by file name."""
    from eval.draw import draw_ap

    picture = draw_ap(report)
    contents = {
        "ap.png": picture,
        "report.md": render_markdown(report).encode(),
        "report.html": render_html(report, picture).encode(),
        # Last: where it lies, the others are of it.
        "report.json": (report.model_dump_json(indent=1) + "\n").encode(),
    }
    paths = {name: folder / name for name in contents}
    for name, data in contents.items():
        publish_bytes(paths[name], data)
    return paths


def render_markdown(report: Report) -> str:
    """Return the report as Markdown; the plot is named, not embedded."""
    return _render("report.md.j2", report)


def render_html(report: Report, picture: bytes) -> str:
    """Return the report as one page that needs nothing else.

    Args:
        report: What is told.
        picture: PNG of the plot, embedded.
    """
    return _render("report.html.j2", report, picture=base64.b64encode(picture).decode())


def render_table(report: Report, *, width: int = 100) -> str:
    """Return the per-genre table and the comparisons as text for a terminal.

    Genres without a film in the split are not rows here; they are named below the table.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report.compared.run} on {report.compared.split}, per cent", box=None)
    table.add_column("genre")
    names = ["films", "precision", "recall", "AP", "mean-pool AP"]
    names += ["LSTM AP*", "ResNet AP*"] if report.has_published else []
    for name in names:
        table.add_column(name, justify="right")
    for row in (row for row in report.genres if row.support):
        cells = [str(row.support), percent(row.precision), percent(row.recall), with_half(row.ap)]
        cells.append(percent(row.mean_pool_ap))
        if report.has_published:
            cells += [published(row, "lstm_ap"), published(row, "resnet_ap")]
        table.add_row(row.genre, *cells)
    text = io.StringIO()
    Console(file=text, width=width, markup=False, emoji=False).print(table)
    return "\n".join([text.getvalue().rstrip(), "", *_closing_lines(report)])


def _closing_lines(report: Report) -> list[str]:
    lines = [f"mAP {with_ends(report.mean_ap)}   micro-AP {with_ends(report.micro_ap)}"]
    lines += [
        f"{one.name}: mAP {with_ends(one.mean_ap)}   micro-AP {with_ends(one.micro_ap)}"
        for one in report.baselines
    ]
    lines += [sentence(one) for one in report.baselines]
    lines += [
        f"micro-F1 {percent(one.micro_f1)}, weighted F1 {percent(one.weighted_f1)} at threshold "
        f"{one.threshold:.2f} ({one.origin})"
        for one in report.thresholds
    ]
    if report.absent:
        lines.append(f"left out of mAP, no film in this split: {', '.join(report.absent)}")
    if report.compared.untrained:
        lines.append("UNTRAINED tower: these figures say nothing about films")
    if report.has_published:
        lines.append("* published on another split: not comparable film by film")
    return lines


def percent(share: float | None) -> str:
    """Return a share as per cent with one decimal; a dash for None."""
    return "–" if share is None else f"{100 * share:.1f}"


def with_half(figure: Figure | None) -> str:
    """Return per cent with half the interval's width: ``57.1 ± 8.2``."""
    if figure is None:
        return "–"
    if figure.low is None or figure.high is None:
        return percent(figure.value)
    return f"{percent(figure.value)} ± {50 * (figure.high - figure.low):.1f}"


def with_ends(figure: Figure) -> str:
    """Return a figure with the ends of its interval: ``0.323 (0.277 … 0.369)``."""
    if figure.low is None or figure.high is None:
        return f"{figure.value:.3f}"
    return f"{figure.value:.3f} ({figure.low:.3f} … {figure.high:.3f})"


def published(row: GenreRow, column: str) -> str:
    """Return one published figure with one decimal; a dash where none was published."""
    value = getattr(row.published, column) if row.published else None
    return "–" if value is None else f"{value:.1f}"


def _render(template: str, report: Report, **more: Any) -> str:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(_template),
        undefined=StrictUndefined,
        autoescape=template.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= _filters()
    return environment.get_template(template).render(report=report, **more)


def _template(name: str) -> str:
    return files("eval").joinpath("templates", name).read_text("utf-8")


def _filters() -> Mapping[str, Any]:
    shown = (percent, with_half, with_ends, published, sentence)
    return {one.__name__: one for one in shown} | {"cell": _markdown_cell}


def _markdown_cell(text: str) -> str:
    return str(text).replace("|", "\\|")
