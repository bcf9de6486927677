"""The documentation site: `make docs` refuses what leads nowhere, and describes every program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.page_checks import PROGRAMS
from tests.snippets import CHECKOUT

BROKEN = """# Page

[no page](missing.md) [no section](#missing) [no file](../missing.yaml) {confval}`stream.widow`
"""


def test_a_link_to_no_page_section_file_or_key_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(BROKEN)
    command = (CHECKOUT / "Makefile").read_text().partition("$(BIN)/sphinx-build ")[2]
    options = command.partition(" -c ")[0].split()
    build = [sys.executable, "-m", "sphinx", *options, "-c", str(CHECKOUT / "docs")]
    done = subprocess.run(
        [*build, str(tmp_path), str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "WARNING" in line]
    for missing in ("missing.md", "'missing'", "missing.yaml", "stream.widow"):
        assert any(missing in line for line in lines), done.stderr


def test_every_program_is_in_the_reference() -> None:
    page = (CHECKOUT / "docs" / "reference" / "commands.md").read_text()
    described = {f"   :prog: {program}" for program in PROGRAMS}
    assert described <= set(page.splitlines())
