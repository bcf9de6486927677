"""A fixed report."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.report import Report, read_report

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def report() -> Report:
    return read_report(GOLDEN / "report.json")
