"""The plot of a report."""

from __future__ import annotations

import subprocess
import sys

from tests.eval.conftest import GOLDEN


def test_the_plot_is_drawn_without_pyplot() -> None:
    code = (
        "import sys; from pathlib import Path; from eval.draw import draw_ap; "
        "from eval.report import read_report; "
        "draw_ap(read_report(Path(sys.argv[1]))); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(GOLDEN / "report.json")], check=True)
