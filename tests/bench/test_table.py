"""The table of a benchmark in a README comes from the JSON file of its run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("table.py")

REPORT = {
    "rows": [
        {"name": "fast", "rate": "9 img/s", "cpu_ms": "0.5", "goal": ">= 3.3"},
        {"name": "loss", "rate": "", "cpu_ms": "", "goal": ""},
        {"name": "memory_mb", "rate": "", "cpu_ms": "", "goal": "<= 2000"},
    ],
    "ratios": {"fast": 3.4444, "loss": 5.21e-8, "memory_mb": 1024.6},
    "machine": {"cores": 2, "processor": "x86_64", "load": [1.0, 1.5, 2.5]},
    "versions": {"torch": "2.0"},
    "method": "in turn",
}


def write(folder: Path, readme: str, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "bench_some.json").write_text(json.dumps(REPORT))
    (folder / "README.md").write_text(readme)
    command = [sys.executable, str(SCRIPT), *options, str(folder / "bench_some.json")]
    return subprocess.run(
        [*command, str(folder / "README.md")], capture_output=True, text=True, check=False
    )


def test_a_new_table_replaces_the_previous_one_and_nothing_else(tmp_path: Path) -> None:
    before = "# A\n<!-- bench_some -->\nold\n<!-- /bench_some -->\n\n<!-- bench_other -->\nB\n"
    assert write(tmp_path, before).returncode == 0
    first = (tmp_path / "README.md").read_text()
    assert "old" not in first
    assert "| `fast` | 9 img/s | 0.5 | 3.44 | >= 3.3 |\n" in first
    assert "| `memory_mb` |  |  | 1,025 | <= 2000 |\n" in first
    assert "2 cores, x86_64, load 2.5 over" in first
    assert first.startswith("# A\n<!-- bench_some -->\n\n| figure |")
    assert first.endswith("torch 2.0.\n\n<!-- /bench_some -->\n\n<!-- bench_other -->\nB\n")
    assert write(tmp_path, first).returncode == 0
    assert (tmp_path / "README.md").read_text() == first


def test_with_goals_figures_without_a_goal_are_omitted(tmp_path: Path) -> None:
    readme = "<!-- bench_some -->\n<!-- /bench_some -->\n"
    write(tmp_path, readme)
    assert "| `loss` |  |  | 5.21e-08 |  |\n" in (tmp_path / "README.md").read_text()
    write(tmp_path, readme, "--goals")
    assert "`loss`" not in (tmp_path / "README.md").read_text()
    assert "`fast`" in (tmp_path / "README.md").read_text()


def test_a_readme_without_the_marks_is_not_changed(tmp_path: Path) -> None:
    done = write(tmp_path, "# A\n")
    assert done.returncode != 0
    assert "got 0 places for bench_some, want one" in done.stderr
    assert (tmp_path / "README.md").read_text() == "# A\n"
