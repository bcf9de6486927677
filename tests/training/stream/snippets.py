"""Python snippets of a README, run as printed, in a folder with the files that they open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FENCE = "```"


def snippets(readme: Path) -> dict[str, list[str]]:
    """Return the Python snippets by the heading of their section, in order."""
    sections: dict[str, list[str]] = {}
    heading, language, lines = "", "", list[str]()
    is_code = False
    for line in readme.read_text().splitlines():
        if line.startswith(FENCE):
            if is_code and language == "python":
                sections.setdefault(heading, []).append("\n".join([*lines, ""]))
            is_code, language, lines = not is_code, line.removeprefix(FENCE), []
        elif is_code:  # a line that starts with "#" is a comment here, not a heading
            lines.append(line)
        elif line.startswith("#"):
            heading = line.lstrip("#").strip()
    return sections


def snippet(readme: Path, heading: str) -> str:
    """Return the only Python snippet of a section."""
    (code,) = snippets(readme)[heading]
    return code


def run_snippet(code: str, **variables: Any) -> dict[str, Any]:
    """Run a snippet in the current folder; return its variables.

    Args:
        code: The snippet.
        **variables: Names that are defined in advance, e.g. by an earlier snippet.
    """
    scope = {"__name__": "__main__", **variables}
    exec(code, scope)  # noqa: S102  # code of our own README
    return scope
