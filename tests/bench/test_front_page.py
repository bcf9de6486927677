"""Chart and missed goals of the front page come from the JSON files of all benchmarks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("front_page.py")


def report(figures: dict[str, tuple[str, float, str]]) -> dict[str, Any]:
    """Return a report of figures: rate, ratio, goal. Those with a rate are ways."""
    return {
        "rows": [
            {"name": name, "rate": rate, "cpu_ms": "", "goal": goal}
            for name, (rate, _, goal) in figures.items()
        ],
        "ratios": {name: ratio for name, (_, ratio, _) in figures.items()},
        "turns_s": {name: [1.0] for name, (rate, _, _) in figures.items() if rate},
    }


def test_the_chart_has_the_fastest_way_of_each_library_and_the_table_the_missed_goals(
    tmp_path: Path,
) -> None:
    runs, readme = tmp_path / "runs", tmp_path / "README.md"
    (tmp_path / "docs" / "images").mkdir(parents=True)
    runs.mkdir()
    ways = {
        "ours": ("20,000 /s", 1.0, ""),
        "webdataset w0": ("400 /s", 1.0, ""),
        "webdataset w2": ("500 /s", 1.0, ""),
        "ours movies": ("30 /s", 1.0, ""),
    }
    goals = {"vs_webdataset": ("", 40.0, ">= 30"), "warm_vs_memmap": ("", 0.86, ">= 1.0")}
    (runs / "bench_loader.json").write_text(json.dumps(report(ways | goals)))
    (runs / "bench_eval.json").write_text(json.dumps(report({"score_s": ("", 12.0, "<= 10")})))
    marks = "<!-- compared -->\nold\n<!-- /compared -->\n<!-- missed -->\nold\n<!-- /missed -->\n"
    readme.write_text(f"before\n{marks}after\n")

    subprocess.run([sys.executable, SCRIPT, "--runs", runs, "--readme", readme], check=True)

    lines = readme.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert " ".join(lines[3:5]) == (
        "Windows of 256 rows in the page cache: 40 times as fast as webdataset, "
        "0.86 times as fast as a loop over a numpy memory map."
    )
    assert [line for line in lines if line.startswith("|")][2:] == [
        "| `bench_eval.score_s` | 12 | <= 10 |",
        "| windows, against a loop over a numpy memory map | 0.86 | >= 1.0 |",
    ]
    chart = (tmp_path / "docs" / "images" / "speed.svg").read_text()
    texts = re.findall(r">([^<]+)</text>", chart)
    assert "20,000" in texts
    assert "500" in texts  # the faster of both ways with webdataset
    assert "400" not in texts
    assert not [text for text in texts if "LitData" in text]  # it was not installed in this run
    widths = re.findall(r'<rect class="\w+" x="\d+" y="\d+" width="(\d+)"', chart)
    assert int(widths[1]) == round(int(widths[0]) / 40)  # the scale is linear
