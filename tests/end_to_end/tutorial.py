"""The tutorial: its commands, and what it prints after each of them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from tests.end_to_end.pipeline import CHECKOUT, Pipeline
from tests.page_checks import MODULES
from tests.snippets import snippets

PAGE = CHECKOUT / "docs" / "tutorial.md"


@dataclass(frozen=True)
class Step:
    """One command of the tutorial: package, command and other words, and its stdout."""

    package: str
    command: str
    arguments: tuple[str, ...]
    printed: str

    def run(self, pipeline: Pipeline) -> str:
        """Return the stdout of the command, which is run once per folder."""
        record = pipeline.folder / f"printed-{self.package}-{self.command}-{len(self.arguments)}"
        if not record.exists():
            output = pipeline.run(self.package, self.command, *self.arguments)
            record.write_text(output, encoding="utf-8")
        return record.read_text(encoding="utf-8")


def steps() -> list[Step]:
    """Return the commands of the tutorial in order."""
    blocks = [block for section in snippets(PAGE, "console").values() for block in section]
    return [_step(part) for block in blocks for part in block.split("$ ")[1:]]


def _step(part: str) -> Step:
    line, _, printed = part.replace("\\\n", " ").partition("\n")
    program, command, *arguments = shlex.split(line)
    where = arguments.index("--config")
    if arguments[where + 1] != "demo":
        raise ValueError(f"{line}: want --config demo")
    packages = {name: package for package, name in MODULES.items()}
    others = (*arguments[:where], *arguments[where + 2 :])
    return Step(packages[program], command, others, printed)


def missing_lines(printed: str, output: str) -> list[str]:
    """Return the lines of the page that an output lacks, in order; "…" matches any lines.

    Args:
        printed: What the page prints.
        output: What the command printed.
    """
    lines = [comparable(line) for line in output.splitlines()]
    missing, position, is_gap = [], 0, False
    for line in printed.strip().splitlines():
        if line == "…":
            is_gap = True
            continue
        rest = lines[position:] if is_gap else lines[position : position + 1]
        if comparable(line) in rest:
            position += rest.index(comparable(line)) + 1
        else:
            missing.append(line)
        is_gap = False
    return missing


def comparable(line: str) -> str:
    """Return a line without what differs between machines: rates, scores, digests, widths.

    The last bits of features, and so the scores and the best epoch, depend on the processor.
    """
    line = re.sub(r"\d+\.\d{3}|[\d,]+(?= images/s)|(?<=\(epoch )\d+", "N", line)
    line = re.sub(r"\b(?!6095a6b42e80)[0-9a-f]{12,}", "H", line)  # not that of the frames
    return " ".join(line.split())
