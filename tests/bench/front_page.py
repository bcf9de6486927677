"""Draw the chart of the front page, and list the goals that were missed, from all benchmarks.

    python tests/bench/front_page.py [--runs build/bench] [--readme README.md]

Reads every ``bench_*.json`` that ``make bench`` wrote. The chart is ``docs/images/speed.svg`` next
to the README; each of its bars is the fastest way of a library in the run of ``bench_loader``. In
the README, the lines between the marks of ``compared`` and of ``missed`` are replaced, as by
``table.py``.
"""

from __future__ import annotations

import argparse
import json
import operator
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from show_loader import rates_of
from table import written

Report = Mapping[str, Any]
CHECKOUT = Path(__file__).resolve().parents[2]
CHART = Path("docs", "images", "speed.svg")


class Panel(NamedTuple):
    """Bars with a common scale."""

    title: str
    ways: Mapping[str, Sequence[str]]
    """Label of a bar -> names of ways in the JSON file."""


OURS, BOUND = "this loader", "plain reads"
PANELS = (
    Panel(
        "Windows of 256 rows per second, page cache warm",
        {
            "memory map (numpy)": ("memmap", "memmap w2"),
            OURS: ("ours",),
            "TensorStore": ("tensorstore",),
            "Lance": ("lance",),
            "LitData read_window": ("litdata temporal",),
            "HF datasets": ("hf arrow",),
            "MosaicML Streaming": ("mds w0", "mds w2"),
            "webdataset": ("webdataset w0", "webdataset w2"),
            "Megatron-Energon": ("energon w0",),
        },
    ),
    Panel(
        "Complete movies per second",
        {
            "memory map (numpy)": ("memmap movies",),
            OURS: ("ours movies",),
            "LitData": ("litdata movies",),
            "MosaicML Streaming": ("mds movies",),
            "Megatron-Energon": ("energon movies",),
            "webdataset": ("webdataset movies",),
            "HF datasets": ("hf parquet movies",),
        },
    ),
    Panel(
        "Windows per second over HTTP, 30 ms to the first byte",
        {
            f"{BOUND}, 64 in flight": ("get64 http",),
            f"{OURS}, 64 in flight": ("ours64 http",),
            f"{OURS}, 16 in flight": ("ours16 http",),
            "webdataset, 2 workers": ("webdataset w2 http",),
        },
    ),
)

MEANING = {
    "bench_encoding.stub_vs_decode": "a tower that takes no time, against decoding alone",
    "bench_encoding.longest_silence_s": "seconds without a log line (import of OpenCLIP)",
    "bench_loader.warm_vs_limit16": "windows, against bare `preadv` into one buffer",
    "bench_loader.warm_vs_memmap": "windows, against a loop over a numpy memory map",
    "bench_loader.cpu_vs_memmap": "CPU time per window, against the same loop",
    "bench_loader.import_s": "import of the loader, torch included, in seconds",
    "bench_loader.import_vs_torch": "import of the loader, against that of torch alone",
    "bench_sharding.tars_vs_shardwriter": "packing tars, against webdataset's ShardWriter",
    "bench_sharding.tars_and_plan_vs_shardwriter": "the same, with the plan",
    "bench_sharding.folders_vs_shardwriter": "packing folders, against ShardWriter",
    "bench_sharding.two_vs_one_process": "two packing processes, against one",
    "bench_eval.search_gbps_vs_read": "search by text, against reading the same rows",
    "bench_eval.keyframes_vs_realtime": "key frames of a video, against its playing time",
}


COMPARED = {
    "vs_webdataset": "webdataset",
    "vs_mds": "MosaicML Streaming",
    "vs_litdata": "LitData",
    "warm_vs_memmap": "a loop over a numpy memory map",
}
"""Ratios of ``bench_loader`` that the front page names in a sentence."""


def compared(report: Report) -> Iterator[str]:
    """Yield the sentence about the loader's rates, as lines of Markdown."""
    ratios = [
        f"{report['ratios'][figure]:.3g} times as fast as {name}"
        for figure, name in COMPARED.items()
        if figure in report["ratios"]
    ]
    yield from textwrap.wrap(f"Windows of 256 rows in the page cache: {', '.join(ratios)}.", 100)


def missed(reports: Mapping[str, Report]) -> Iterator[str]:
    """Yield a table of the figures that miss their goal, as lines of Markdown."""
    yield "| goal that was missed | measured | goal |"
    yield "|---|---|---|"
    for name, report in reports.items():
        for row in report["rows"]:
            value, goal = report["ratios"][row["name"]], row["goal"]
            if goal and not _is_met(value, goal):
                figure = f"{name}.{row['name']}"
                yield f"| {MEANING.get(figure, f'`{figure}`')} | {value:.3g} | {goal} |"


def _is_met(value: float, goal: str) -> bool:
    sign, bound = goal.split()
    compare = {">=": operator.ge, "<=": operator.le}[sign]
    return bool(compare(value, float(bound)))


# --- the chart ------------------------------------------------------------------------------------

WIDTH, LEFT, BAR, GAP, TITLE, NUMBER = 760, 230, 24, 7, 40, 80
STYLE = """<style>
text { font: 17px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #1f2328 }
.title { font-weight: 600 } .page { fill: #ffffff }
.ours { fill: #0969da } .bound { fill: #818b98 } .peer { fill: #bf8700 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .page { fill: #0d1117 } .ours { fill: #4493f8 } .peer { fill: #d29922 }
}
</style>"""


def chart(report: Report) -> str:
    """Return bars of the rates, on a linear scale per panel, as SVG."""
    rates = {way: rate for way, (rate, _) in rates_of(report).items()}
    parts, top = list[str](), 4
    for panel in PANELS:
        bars = {
            label: max(rates[way] for way in ways if way in rates)
            for label, ways in panel.ways.items()
            if any(way in rates for way in ways)
        }
        if bars:
            parts += _panel(panel.title, bars, top)
            top += TITLE + len(bars) * (BAR + GAP)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + 6}" role="img">'
    title = "<title>Rates of this loader and of other libraries</title>"
    page = f'<rect class="page" width="{WIDTH}" height="{top + 6}" rx="10"/>'
    return "\n".join([head, title, STYLE, page, *parts, "</svg>", ""])


def _panel(title: str, bars: Mapping[str, float], top: int) -> Iterator[str]:
    yield f'<text class="title" x="12" y="{top + 26}">{title}</text>'
    most = max(bars.values())
    for place, label in enumerate(sorted(bars, key=lambda each: -bars[each])):
        y = top + TITLE + place * (BAR + GAP)
        length = bars[label] / most * (WIDTH - LEFT - NUMBER)
        kind = "ours" if OURS in label else "bound" if BOUND in label else "peer"
        yield f'<text x="{LEFT - 10}" y="{y + 18}" text-anchor="end">{label}</text>'
        yield f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{length:.0f}" height="{BAR}"/>'
        yield f'<text x="{LEFT + length + 8:.0f}" y="{y + 18}">{bars[label]:,.0f}</text>'


def main() -> None:
    """Write the chart, the sentence and the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, default=CHECKOUT / "build" / "bench")
    parser.add_argument("--readme", type=Path, default=CHECKOUT / "README.md")
    args = parser.parse_args()
    files = sorted(args.runs.glob("bench_*.json"))
    reports = {path.stem: json.loads(path.read_text()) for path in files}
    (args.readme.parent / CHART).write_text(chart(reports["bench_loader"]))
    text = args.readme.read_text(encoding="utf-8")
    text = written(text, "compared", list(compared(reports["bench_loader"])))
    args.readme.write_text(written(text, "missed", list(missed(reports))), encoding="utf-8")


if __name__ == "__main__":
    main()
