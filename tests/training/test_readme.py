"""The table "Where to find what" of training/README.md lists every file of the package."""

from __future__ import annotations

import re
from pathlib import Path

TRAINING = Path(__file__).parents[2] / "training"


def test_every_file_of_the_package_is_in_the_table() -> None:
    readme = (TRAINING / "README.md").read_text(encoding="utf-8")
    table = readme.partition("\n## Where to find what\n")[2].partition("\n## ")[0]
    listed = set(re.findall(r"`(\w+\.py)`", table))
    files = {file.name for file in TRAINING.glob("*.py")}
    assert files - {"__init__.py", "__main__.py"} == listed - {"schema.py"}
