"""The table "Where to find what" of configs/README.md is complete and names existing files."""

from __future__ import annotations

import re
from pathlib import Path

CONFIGS = Path(__file__).parents[2] / "configs"
NEW_FILE = "NAME.yaml"


def listed_files() -> set[str]:
    """Return the paths in the second column of the table, relative to configs/."""
    readme = (CONFIGS / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## Where to find what\n")[2].partition("\n## ")[0]
    cells = [line.split("|")[2] for line in section.splitlines() if line.startswith("| ")]
    return {path for cell in cells for path in re.findall(r"`([\w/-]+\.(?:py|yaml|json))`", cell)}


def test_every_file_in_the_table_exists() -> None:
    for path in listed_files() - {NEW_FILE}:
        assert (CONFIGS / path).is_file() or (CONFIGS.parent / path).is_file(), path


def test_every_file_of_the_package_is_in_the_table() -> None:
    files = {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.[pyj]*") if path.is_file()}
    own = {path for path in files if not path.endswith(("__init__.py", ".pyc"))}
    assert own <= listed_files()
