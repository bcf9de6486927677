"""Forms of a report: Markdown, HTML page, terminal text, and the files of ``RUN/report``."""

from __future__ import annotations

import base64
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from configs.runtime.publish import publish_bytes
from eval.pages import WIDTH, render_template, table_text
from eval.report import FEWEST_MOVIES, BaselineResult, Figure, GenreRow, Report, ThresholdRow

if TYPE_CHECKING:
    from eval.draw import Picture

_NO_CLAIM: Mapping[str, str] = {
    "not a test": "no claim, as the model was trained on scored movies",
    "too few": f"no claim from fewer than {FEWEST_MOVIES} movies",
}


def sentence(baseline: BaselineResult) -> str:
    """Return the comparison with one baseline as a sentence that its interval supports."""
    gap = baseline.difference
    if gap.low is None or gap.high is None:
        return f"Against {baseline.name}: {gap.value:+.3f} mAP, without an interval."
    ends = f"95 % interval {gap.low:+.3f} … {gap.high:+.3f}"
    if baseline.beaten in _NO_CLAIM:
        reason = _NO_CLAIM[baseline.beaten]
        return f"Against {baseline.name}: {gap.value:+.3f} mAP, {ends}; {reason}.".replace(
            "-0.", "−0."
        )
    verb = {
        "yes": "beats",
        "no": "does not beat, and is worse than,",
        "unclear": "does not clearly beat" if gap.value > 0 else "does not beat",
    }[baseline.beaten]
    caveat = ", which contains 0" if baseline.beaten == "unclear" else ""
    return (f"The model {verb} {baseline.name}: {gap.value:+.3f} mAP, {ends}{caveat}.").replace(
        "-0.", "−0."
    )


def write_report(folder: Path, report: Report) -> dict[str, Path]:
    """Publish ``report.json`` and the files derived from it; return their paths by file name."""
    from eval.draw import draw_pictures

    pictures = draw_pictures(report)
    contents = {f"{one.name}.png": one.png for one in pictures}
    contents |= {f"{one.name}.svg": one.svg for one in pictures}
    contents |= {
        "report.md": render_markdown(report, pictures).encode(),
        "report.html": render_html(report, pictures).encode(),
        # Published last: once it exists, the other files belong to it.
        "report.json": (report.model_dump_json(indent=1) + "\n").encode(),
    }
    paths = {name: folder / name for name in contents}
    for name, data in contents.items():
        publish_bytes(paths[name], data)
    return paths


def uploads(
    paths: Mapping[str, Path], upload: Literal["metrics", "report"]
) -> tuple[dict[str, Path], tuple[Path, ...]]:
    """Return the PNG files by name, and the other files, that may leave the machine.

    Args:
        paths: Files of a report by file name.
        upload: ``tracking.upload``. With ``metrics`` nothing that names a movie.
    """
    from eval.draw import FILMS

    allowed = {name: path for name, path in paths.items() if path.suffix == ".png"}
    if upload == "metrics":
        del allowed[f"{FILMS}.png"]
    pictures = {f"report/{path.stem}": path for path in allowed.values()}
    return pictures, tuple(paths.values()) if upload == "report" else ()


def render_markdown(report: Report, pictures: Sequence[Picture]) -> str:
    """Return the report as Markdown; it links to the PNG files of the pictures."""
    return render_template("report.md.j2", _filters(), report=report, pictures=pictures)


def render_html(report: Report, pictures: Sequence[Picture]) -> str:
    """Return the report as one self-contained page, with the SVG of the pictures."""
    return render_template("report.html.j2", _filters(), report=report, pictures=pictures)


def render_table(report: Report, *, width: int = WIDTH) -> str:
    """Return the per-genre table and the comparisons as text for a terminal.

    Genres without a movie in the split have no row; they are listed below the table.

    Args:
        report: The data.
        width: Columns of the terminal; no line is longer.
    """
    caveat = [textwrap.fill(report.caveat, width)] if report.caveat else []
    blocks = [*caveat, _genre_table(report, width), _summary_table(report, width)]
    closing = [
        textwrap.fill(line, width, subsequent_indent="  ", break_on_hyphens=False)
        for line in _closing_lines(report)
    ]
    return "\n\n".join([*blocks, "\n".join(closing)])


def _genre_table(report: Report, width: int) -> str:
    from rich.table import Table

    table = Table(
        title=f"{report.compared.run} on {report.compared.split}, in per cent",
        box=None,
        pad_edge=False,
    )
    table.add_column("genre")
    names = ["movies", "precision", "recall", "AP", "mean-pool\nAP"]
    names += ["LSTM\nAP*", "ResNet\nAP*"] if report.has_published else []
    for name in names:
        table.add_column(name, justify="right", vertical="bottom", no_wrap=True)
    for row in (row for row in report.genres if row.support):
        cells = [str(row.support), percent(row.precision), percent(row.recall), ap_cell(row)]
        cells.append(percent(row.mean_pool_ap))
        if report.has_published:
            cells += [published(row, "lstm_ap"), published(row, "resnet_ap")]
        table.add_row(row.genre, *cells)
    return table_text(table, width)


def _summary_table(report: Report, width: int) -> str:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("", "mAP", "micro-AP"):
        table.add_column(name)
    table.add_row("model", with_ends(report.mean_ap), with_ends(report.micro_ap))
    for one in report.baselines:
        table.add_row(one.name, with_ends(one.mean_ap), with_ends(one.micro_ap))
    return table_text(table, width)


def _closing_lines(report: Report) -> list[str]:
    lines = [sentence(one) for one in report.baselines]
    lines += [
        f"At {threshold(one)} ({one.origin}): micro precision {percent(one.micro.precision)}, "
        f"recall {percent(one.micro.recall)}, F1 {percent(one.micro.f1)}; macro F1 "
        f"{percent(one.macro.f1)}, weighted F1 {percent(one.weighted.f1)}."
        for one in report.thresholds
    ]
    lines.append(f"Expected calibration error: {report.calibration.error:.3f}.")
    if report.absent:
        names = ", ".join(report.absent)
        lines.append(f"Excluded from the mAP, no movie in this split: {names}.")
    lines += report.notes  # e.g. where the baselines come from, or why there are none
    if report.compared.untrained:
        lines.append("UNTRAINED tower: these figures carry no information about movies.")
    if report.has_published:
        lines.append("* Published for another split, so not comparable movie by movie.")
    return lines


def threshold(row: ThresholdRow) -> str:
    """Return the name of a decision rule: ``threshold 0.50``."""
    return "thresholds per genre" if row.threshold is None else f"threshold {row.threshold:.2f}"


def percent(fraction: float | None) -> str:
    """Return a fraction in per cent with one decimal; a dash for None."""
    return "–" if fraction is None else f"{100 * fraction:.1f}"


def ap_cell(row: GenreRow) -> str:
    """Return a genre's AP in per cent with its interval: ``57.1 (49–65)``, ``8.2 too few``."""
    return f"{percent(row.ap.value)} {range_cell(row)}".rstrip() if row.ap else "–"


def range_cell(row: GenreRow) -> str:
    """Return the interval of the AP of a genre, in per cent: ``(49–65)``, or why it has none."""
    if row.too_few:
        return "too few"
    if row.ap is None or row.ap.low is None or row.ap.high is None:
        return ""
    return f"({100 * row.ap.low:.0f}–{100 * row.ap.high:.0f})"


def with_ends(figure: Figure) -> str:
    """Return a figure with the ends of its interval: ``0.323 (0.277 … 0.369)``."""
    if figure.low is None or figure.high is None:
        return f"{figure.value:.3f}"
    return f"{figure.value:.3f} ({figure.low:.3f} … {figure.high:.3f})"


def published(row: GenreRow, column: str) -> str:
    """Return a published figure with one decimal; a dash if it was not published."""
    value = getattr(row.published, column) if row.published else None
    return "–" if value is None else f"{value:.1f}"


def _filters() -> Mapping[str, Any]:
    filters = (percent, threshold, ap_cell, range_cell, with_ends, published, sentence)
    return {one.__name__: one for one in filters} | {"cell": _markdown_cell, "data_url": _data_url}


def _data_url(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _markdown_cell(text: str) -> str:
    return str(text).replace("|", "\\|")
