"""Write the results of soak_loader.py into a README as a table, and into a picture.

    python tests/bench/show_soak.py FILE README PICTURE

FILE is the output of ``soak_loader.py --json``. In README, the lines between
``<!-- soak_loader -->`` and ``<!-- /soak_loader -->`` are replaced, as by ``table.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, installed or not

from soak_loader import BATCH, BATCHES_PER_S, MOVIES, TOLERANCES, WINDOWS_PER_MOVIE, growth
from table import written

from training.canvas import BLUE, LINE, new_figure, plain, plain_text, to_png

SERIES = {"memory_mb": "memory, MB", "files": "open files", "threads": "threads"}


def series(report: Mapping[str, Any], name: str) -> list[float]:
    """Return the samples of one figure."""
    return [sample[name] for sample in report["samples"]]


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the tables and the method of measurement, as lines of Markdown."""
    requests, rates = report["requests"], report["rates"]
    yield "| fault | rate per request | injected |"
    yield "|---|---|---|"
    for fault, times in report["faults"].items():
        yield f"| {_title(fault, report)} | {rates[fault]:.1%} | {times:,} |"
    yield ""
    yield "| | median of the middle third | median of the last third | peak | limit of growth |"
    yield "|---|---|---|---|---|"
    for name, title in SERIES.items():
        values = series(report, name)
        last, grown = median(values[-(len(values) // 3) :]), growth(values)
        limit = f"{TOLERANCES[name]:g}"
        yield f"| {title} | {last - grown:,.0f} | {last:,.0f} | {max(values):,.0f} | {limit} |"
    yield ""
    stats, machine = report["stats"], report["machine"]
    yield (
        f"{report['seconds'] / 60:.0f} minutes, {report['epochs']:,} epochs of "
        f"{MOVIES * WINDOWS_PER_MOVIE} windows: {report['exact_epochs']:,} of them had every "
        f"window exactly once, with correct values. {requests:,} requests, {stats['retries']:,} "
        f"retries, {stats['cache_hits']:,.0f} windows from the cache and "
        f"{stats['cache_misses']:,.0f} by ranged requests. The consumer took {BATCHES_PER_S:g} "
        f"batches of {BATCH} windows per second and used {report['cpu_s'] / report['seconds']:.0%} "
        f"of a core ({machine['cores']} cores, {machine['processor']}, shared with other work)."
    )


def _title(fault: str, report: Mapping[str, Any]) -> str:
    titles = {
        "truncated": "second half of the body missing",
        "reset": "connection reset after half of the body",
        "stall": f"no byte for {report['stall_s']:g} s",
    }
    return titles.get(fault, f"status {fault}")


def picture(report: Mapping[str, Any]) -> bytes:
    """Return the samples over time as PNG."""
    minutes = [seconds / 60 for seconds in series(report, "seconds")]
    with plain_text():
        figure = new_figure(3.6)
        axes = figure.subplots(len(SERIES), 1, sharex=True)
        for panel, (name, title) in zip(axes, SERIES.items(), strict=True):
            values = series(report, name)
            panel.plot(minutes, values, color=BLUE, linewidth=1)
            panel.set_ylim(0, 1.25 * max(values))
            panel.set_title(title, loc="left", fontsize="small")
            panel.grid(axis="y", color=LINE)
            plain(panel)
        axes[-1].set_xlabel("minutes", fontsize="small")
        return to_png(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("json", type=Path, help="file that the soak wrote")
    parser.add_argument("readme", type=Path, help="README to update")
    parser.add_argument("picture", type=Path, help="PNG to write")
    args = parser.parse_args()
    report = json.loads(args.json.read_text())
    table = list(lines(report))
    args.readme.write_text(written(args.readme.read_text(), "soak_loader", table))
    args.picture.write_bytes(picture(report))
