"""The table and the chart of bench_loader.py come from the JSON file of its run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("show_loader.py")
REPORT = {
    "rows": [
        {"name": "limit16", "rate": "40,000 /s", "cpu_ms": "0.041", "goal": ""},
        {"name": "ours", "rate": "31,000 /s", "cpu_ms": "0.053", "goal": ""},
        {"name": "memmap", "rate": "20,000 /s", "cpu_ms": "0.050", "goal": ""},
        {"name": "webdataset w2", "rate": "1,000 /s", "cpu_ms": "1.500", "goal": ""},
        {"name": "vs_webdataset", "rate": "31,000 /s", "cpu_ms": "0.053", "goal": ">= 30"},
    ],
    "ratios": {
        "limit16": 1.0,
        "ours": 1.0,
        "memmap": 1.0,
        "webdataset w2": 1.0,
        "vs_webdataset": 31.04,
    },
    "turns_s": {key: [1.0] for key in ("limit16", "ours", "memmap", "webdataset w2")},
    "versions": {"python": "3.11.7", "webdataset": "1.0.2"},
    "machine": {"cores": 2, "processor": "x86_64", "load": [0.5, 0.4, 0.3]},
    "method": "400 movies",
}


def test_table_and_chart_are_written_from_the_file_and_the_rest_of_the_readme_is_unchanged(
    tmp_path: Path,
) -> None:
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    readme, chart = tmp_path / "README.md", tmp_path / "speed.svg"
    readme.write_text("before\n<!-- bench_loader -->\nold\n<!-- /bench_loader -->\nafter\n")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "report.json"), str(readme), str(chart)]
    for _ in range(2):  # the second time replaces its own output
        subprocess.run(command, check=True)
        lines = readme.read_text().splitlines()
        assert (lines[0], lines[-1]) == ("before", "after")
        assert "old" not in lines
        assert "| **this loader** | 31,000 | 0.053 |" in lines
        assert "| numpy memory map | 20,000 | 0.050 |" in lines
        assert "| webdataset, 2 workers | 1,000 | 1.500 |" in lines
        assert "| `vs_webdataset` | 31 | at least 30 |" in lines
        assert any("webdataset 1.0.2" in line for line in lines)
    widths = [
        int(width)
        for width in re.findall(r"<rect x='\d+' y='\d+' width='(\d+)'", chart.read_text())
    ]
    longest = widths[0]  # the scale is linear: twice the rate, twice the length
    assert widths == [round(longest * rate / 40) for rate in (40, 31, 20, 1)]
