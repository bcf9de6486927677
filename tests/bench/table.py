"""Write the figures of a benchmark into a README, from the JSON of its run.

    python tests/bench/table.py --goals build/bench/bench_encoding.json encoders/README.md

With ``--goals`` only the figures that have a goal. The table stands between two marks that name the
benchmark: <!-- bench_encoding --> and <!-- /bench_encoding -->.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLUMNS = ("figure", "rate", "CPU ms an item", "value", "goal")


def lines(found: Mapping[str, Any], *, goals: bool) -> list[str]:
    """Return the table of a run, and how it was measured, as lines of Markdown.

    Args:
        found: The JSON.
        goals: Leave out the figures that have no goal.
    """
    machine, versions = found["machine"], found["versions"]
    rows = [
        f"| `{row['name']}` | {row['rate']} | {row['cpu_ms']} | {found['ratios'][row['name']]:.3g} "
        f"| {row['goal']} |"
        for row in found["rows"]
        if row["goal"] or not goals
    ]
    used = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    return [
        f"| {' | '.join(COLUMNS)} |",
        "|---|---|---|---|---|",
        *rows,
        "",
        f"{found['method']}. {machine['cores']} cores, {machine['processor']}, load "
        f"{machine['load'][-1]} over the last 15 minutes; {used}.",
    ]


def written(readme: str, name: str, table: list[str]) -> str:
    """Return a README with another table between the marks of a benchmark.

    Raises:
        ValueError: it has no such marks.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    text = begin + "\n".join(["", *table, ""]) + "\n" + end
    place = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    made, times = place.subn(lambda _: text, readme)
    if times != 1:
        raise ValueError(f"got {times} places for {name}, want one: {begin.strip()} {end.strip()}")
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--goals", action="store_true", help="only the figures that have a goal")
    parser.add_argument("json", type=Path, help="what the benchmark wrote")
    parser.add_argument("readme", type=Path)
    args = parser.parse_args()
    table = lines(json.loads(args.json.read_text()), goals=args.goals)
    args.readme.write_text(written(args.readme.read_text(), args.json.stem, table))
