"""The README's table "Where to find what" names files that exist."""

from __future__ import annotations

import re
from pathlib import Path

CHECKOUT = Path(__file__).parents[3]
PACKAGE = CHECKOUT / "sharding"


def rows() -> dict[str, list[str]]:
    """Return the paths of each row of the table, by task."""
    readme = (PACKAGE / "README.md").read_text()
    section = readme.partition("## Where to find what\n")[2].partition("\n## ")[0]
    cells = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| ")]
    return {
        task.strip().strip("*"): re.findall(r"`([\w/]+\.(?:py|cfg))`", files)
        for task, files in cells[2:]
    }


def test_every_file_in_the_table_exists() -> None:
    for task, paths in rows().items():
        assert paths, task
        for path in paths:
            if path != "storage/NAME.py":  # the file to add
                assert (PACKAGE / path).is_file() or (CHECKOUT / path).is_file(), path


def test_every_module_of_format_and_dump_is_in_the_table() -> None:
    listed = {path for paths in rows().values() for path in paths}
    modules = [*(PACKAGE / "format").glob("*.py"), *(PACKAGE / "dump").glob("*.py")]
    expected = {str(path.relative_to(PACKAGE)) for path in modules} - {"format/__init__.py"}
    assert expected - listed == {"dump/listing.py"}  # an internal of dump/archives.py


def test_the_table_answers_the_questions_of_a_newcomer() -> None:
    assert "storage/open.py" in rows()["add a storage back end"]
    assert "dump/archives.py" in rows()["read a dump in a new archive format"]
    assert "format/encoding.py" in rows()["change a file format"]
