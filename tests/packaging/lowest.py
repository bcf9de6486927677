"""Print the lowest versions that pyproject.toml allows, one requirement per word.

They are installed without their own dependencies, which are those of .venv: pip would search for
minutes. Torch is left out: it takes gigabytes, and tests run with the newest.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"

REQUIRED_BY_THEM = (
    "pydantic-core==2.27.0",  # pydantic 2.10.0 accepts no other
    *("protobuf<7", "sentry-sdk", "gitpython", "gitdb", "smmap"),  # of wandb 0.22
)


def lowest_versions() -> list[str]:
    """Return ``NAME==VERSION`` per dependency, without those of the extras."""
    requirements = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    pairs = (re.fullmatch(r"([\w-]+)>=([\d.]+)", text) for text in requirements)
    return [f"{pair[1]}=={pair[2]}" for pair in pairs if pair and pair[1] != "torch"]


if __name__ == "__main__":
    print(*lowest_versions(), *REQUIRED_BY_THEM)
