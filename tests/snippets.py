"""Code blocks of READMEs and documentation, run as printed in a folder with files they open."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent
from typing import Any

import yaml

from configs.runtime.logs import PACKAGES

CHECKOUT = Path(__file__).resolve().parents[1]
READMES = (
    CHECKOUT / "README.md",
    *sorted(readme for name in PACKAGES for readme in (CHECKOUT / name).rglob("README.md")),
)
PAGES = (
    *READMES,
    *(CHECKOUT / name for name in ("RELEASING.md", "CHANGELOG.md", "tests/rehearsal/README.md")),
    *sorted((CHECKOUT / "docs").rglob("*.md")),
)
FENCE = "```"


def snippets(readme: Path, *languages: str) -> dict[str, list[str]]:
    """Return the code blocks by the heading of their section, in order.

    Args:
        readme: A Markdown file.
        languages: Languages of the blocks, "" for none; default: Python.
    """
    sections: dict[str, list[str]] = {}
    heading, language, lines = "", "", list[str]()
    is_code = False
    for line in readme.read_text(encoding="utf-8").splitlines():
        if line.strip().startswith(FENCE):
            if is_code and language in (languages or ("python",)):
                code = dedent("\n".join([*lines, ""]))
                sections.setdefault(heading, []).append(code)
            is_code, language, lines = not is_code, line.strip().removeprefix(FENCE), []
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


def write_user_files(folder: Path, **sections: dict[str, Any]) -> None:
    """Write ``my.yaml`` and ``net.py``, the model of the top README.

    Args:
        folder: Where the snippets run; the configuration stores features in
            ``data/features/vit-b-32``.
        sections: Additional keys of the configuration, by section.
    """
    tree: dict[str, Any] = {
        "data": {"root": "data", "genres": ["Drama", "Comedy", "Western"]},
        "encoder": {"name": "vit-b-32"},
        "stream": {"window": 10, "global_batch": 7, "seed": 3},
        "training": {
            "run_name": "masked-lstm",
            "epochs": 2,
            "holdout": 0,
            "monitor_split": None,
            "device": "cpu",
            "threads": 1,
        },
        "eval": {"checkpoint": "last"},
        "tracking": {"wandb": "off"},
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    (folder / "my.yaml").write_text(yaml.safe_dump({"version": 1, **tree}))
    blocks = [code for codes in snippets(CHECKOUT / "README.md").values() for code in codes]
    (net,) = (code for code in blocks if "# net.py" in code)
    (folder / "net.py").write_text(net)
