"""The 95 % intervals of reports cover 92 to 98 %: the published table, and a small simulation."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("study_intervals.py")
README = SCRIPT.parents[2] / "eval" / "README.md"
FIGURES = 6


def test_the_published_simulation_covers_92_to_98_per_cent() -> None:
    table = README.read_text("utf-8").partition("<!-- by tests/bench/study_intervals.py -->")[2]
    shares = re.findall(r"\| (\d+\.\d) %", table.partition("<!-- until here -->")[0])
    assert len(shares) == 2 * FIGURES
    assert all(92 <= float(share) <= 98 for share in shares)


@pytest.mark.slow
def test_a_small_simulation_covers_as_much_within_its_own_error(tmp_path: Path) -> None:
    out = tmp_path / "coverage.json"
    sizes = ["--splits", "30", "--truth", "150", "--draws", "60", "--json", str(out)]
    subprocess.run([sys.executable, str(SCRIPT), *sizes], check=True, capture_output=True)
    coverage = json.loads(out.read_text())["coverage"]
    for population in ("weak", "strong"):
        assert len(coverage[population]) == FIGURES
        # Of 30 splits, 95 % are 28.5 ± 1.2: five of these standard deviations.
        assert min(coverage[population].values()) >= 0.95 - 5 * 1.2 / 30
