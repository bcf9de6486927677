"""The README's tables of files name all modules, and only files that exist."""

from __future__ import annotations

import re
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
PACKAGE = CHECKOUT / "encoders"
README = (PACKAGE / "README.md").read_text(encoding="utf-8")


def rows() -> dict[str, list[str]]:
    """Return the paths in each row of "Where to find what", by task."""
    section = README.partition("## Where to find what\n")[2].partition("\n## ")[0]
    cells = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| ")]
    return {task.strip(): re.findall(r"`([\w/]+\.py)`", files) for task, files in cells[1:]}


def test_every_file_in_where_to_find_what_exists() -> None:
    for task, paths in rows().items():
        assert paths, task
        for path in paths:
            assert (PACKAGE / path).is_file() or (CHECKOUT / path).is_file(), path


def test_where_to_find_what_answers_the_questions_of_a_newcomer() -> None:
    assert "custom.py" in rows()["use a custom encoder"]
    assert "decode.py" in rows()["change preprocessing, e.g. another crop or resize"]
    assert "shard_reader.py" in rows()["add a reader, e.g. for frames in another container"]


def test_the_table_of_files_lists_every_module() -> None:
    listed = re.findall(r"^\| `(\w+\.py)` \|", README, flags=re.MULTILINE)
    modules = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert sorted(listed) == sorted(modules)
