"""Write the results of bench_loader.py into a README as a table, and into a chart as SVG.

    python tests/bench/show_loader.py FILE README CHART

FILE is the output of ``bench_loader.py --json``. In README, the lines between
``<!-- bench_loader -->`` and ``<!-- /bench_loader -->`` are replaced, as by ``table.py``. Ways are
grouped by their work.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from table import written


class Group(NamedTuple):
    """Ways that do the same work."""

    title: str
    unit: str
    ways: Sequence[str]


GROUPS = (
    Group(
        "Windows of 256 rows, warm page cache",
        "windows/s",
        (
            *("limit16", "ring", "ours", "memmap", "memmap w2", "tensorstore", "lance"),
            *("litdata temporal", "hf arrow"),
            *("mds w2", "mds w0", "energon w0", "webdataset w2", "webdataset w0"),
        ),
    ),
    Group("The same, page cache evicted", "windows/s", ("limit16 cold", "ours cold")),
    Group(
        "Complete movies, padded",
        "movies/s",
        (
            *("limit16 movies", "ours movies", "memmap movies", "litdata movies", "mds movies"),
            *("energon movies", "webdataset movies", "hf parquet movies"),
        ),
    ),
    Group("Windows of 64 shots, a row per shot", "windows/s", ("ours shots", "memmap shots")),
    Group(
        "Windows over http, 30 ms to the first byte",
        "windows/s",
        ("get64 http", "ours64 http", "get16 http", "ours16 http", "webdataset w2 http"),
    ),
)

NAMES = {
    "limit": "bare `preadv`, 16 threads into one batch",
    "ring": "bare `preadv`, 2 threads into 5 batches",
    "get16": "16 plain ranged GETs in flight",
    "get64": "64 plain ranged GETs in flight",
    "ours": "**this loader**",
    "ours16": "**this loader**, 16 in flight",
    "ours64": "**this loader**, 64 in flight",
    "memmap": "numpy memory map",
    "tensorstore": "TensorStore (zarr3)",
    "lance": "Lance",
    "webdataset": "webdataset",
    "mds": "MosaicML Streaming (MDS)",
    "energon": "Megatron-Energon",
    "litdata": "LitData",
    "hf": "HF datasets",
}
DETAILS = {
    "w0": "",
    "w2": ", 2 workers",
    "temporal": " `read_window`",
    "arrow": " (Arrow)",
    "parquet": " (Parquet stream)",
}


def title_of(way: str) -> str:
    """Return the title of a way in the table."""
    first, *rest = way.replace("limit16", "limit").split()
    return NAMES[first] + "".join(DETAILS.get(word, "") for word in rest)


def rates_of(report: Mapping[str, Any]) -> dict[str, tuple[float, str]]:
    """Return the rate and the CPU milliseconds per item of each way that ran."""
    return {
        row["name"]: (float(row["rate"].split()[0].replace(",", "")), row["cpu_ms"])
        for row in report["rows"]
        if row["name"] in report["turns_s"]
    }


def _present(rates: Collection[str]) -> Iterator[tuple[Group, list[str]]]:
    for group in GROUPS:
        if present := [way for way in group.ways if way in rates]:
            yield group, present


def lines(report: Mapping[str, Any]) -> Iterable[str]:
    """Yield the lines of the tables, of the ratios and of the versions."""
    rates = rates_of(report)
    for group, present in _present(rates):
        yield f"| {group.title} | {group.unit} | CPU ms per item |"
        yield "|---|---|---|"
        for way in present:
            rate, cpu = rates[way]
            yield f"| {title_of(way)} | {rate:,.0f} | {cpu} |"
        yield ""
    yield "| ratio within a turn, median over turns | measured | goal |"
    yield "|---|---|---|"
    for row in report["rows"]:
        if row["name"] not in report["turns_s"]:
            goal = row["goal"].replace(">=", "at least").replace("<=", "at most")
            yield f"| `{row['name']}` | {report['ratios'][row['name']]:.3g} | {goal} |"
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    machine = report["machine"]
    yield ""
    yield f"{report['method'][0].upper()}{report['method'][1:]}."
    yield f"Versions: {versions}. Machine: {machine['cores']} cores ({machine['processor']}),"
    yield f"shared with other work; load average {' '.join(map(str, machine['load']))} at the end."


# --- the chart ------------------------------------------------------------------------------------

WIDTH, LEFT, BAR, GAP, TITLE, NUMBER = 760, 280, 17, 5, 30, 80
OURS, BOUND, PEER = "#1f6feb", "#8b949e", "#d0a03a"


def chart(report: Mapping[str, Any]) -> str:
    """Return bars of the rates on a linear scale per group, as SVG."""
    rates = {way: rate for way, (rate, _) in rates_of(report).items()}
    parts, top = list[str](), 0
    for group, present in _present(rates):
        most = max(rates[way] for way in present)
        parts.append(_text(0, top + 20, f"{group.title}, {group.unit}", "font-weight='bold'"))
        top += TITLE
        for way in sorted(present, key=lambda each: -rates[each]):
            length = rates[way] / most * (WIDTH - LEFT - NUMBER)
            label = title_of(way).replace("**", "").replace("`", "")
            parts += [
                _text(LEFT - 8, top + 13, label, "text-anchor='end'"),
                f"<rect x='{LEFT}' y='{top}' width='{length:.0f}' height='{BAR}' "
                f"fill='{_colour(way)}'/>",
                _text(LEFT + length + 6, top + 13, f"{rates[way]:,.0f}"),
            ]
            top += BAR + GAP
        top += GAP
    head = f"<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{top}' "
    style = (
        "font-family='sans-serif' font-size='12'><rect width='100%' height='100%' fill='white'/>"
    )
    return "\n".join([head + style, *parts, "</svg>", ""])


def _text(x: float, y: float, words: str, more: str = "") -> str:
    return f"<text x='{x:.0f}' y='{y:.0f}' {more}>{words}</text>"


def _colour(way: str) -> str:
    if way.startswith("ours"):
        return OURS
    return BOUND if way.startswith(("limit", "ring", "get")) else PEER


def main() -> None:
    """Write the table and the chart."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("file", "readme", "chart"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    report = json.loads(args.file.read_text())
    args.chart.write_text(chart(report))
    readme = written(args.readme.read_text(), "bench_loader", list(lines(report)))
    args.readme.write_text(readme)


if __name__ == "__main__":
    main()
