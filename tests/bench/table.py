"""Write the figures of a benchmark into a README, from the JSON file of its run.

    python tests/bench/table.py --goals build/bench/bench_encoding.json encoders/README.md

With ``--goals``, only the figures that have a goal. The table is written between two marks with the
name of the benchmark: <!-- bench_encoding --> and <!-- /bench_encoding -->.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLUMNS = ("figure", "rate", "CPU ms per item", "value", "goal")


def lines(report: Mapping[str, Any], *, goals: bool) -> list[str]:
    """Return the table of a run and the method of measurement, as lines of Markdown.

    Args:
        report: Content of the JSON file.
        goals: Omit the figures without a goal.
    """
    machine, versions = report["machine"], report["versions"]
    rows = [
        f"| `{row['name']}` | {row['rate']} | {row['cpu_ms']} | "
        f"{_figure(report['ratios'][row['name']])} | {row['goal']} |"
        for row in report["rows"]
        if row["goal"] or not goals
    ]
    used = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    return [
        f"| {' | '.join(COLUMNS)} |",
        "|---|---|---|---|---|",
        *rows,
        "",
        f"{report['method']}. {machine['cores']} cores, {machine['processor']}, load "
        f"{machine['load'][-1]} over the last 15 minutes; {used}.",
    ]


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def written(readme: str, name: str, table: list[str]) -> str:
    """Return the README with a new table between the marks of a benchmark.

    Raises:
        ValueError: the README does not have these marks exactly once.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    text = begin + "\n".join(["", *table, ""]) + "\n" + end
    place = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    result, times = place.subn(lambda _: text, readme)
    if times != 1:
        raise ValueError(f"got {times} places for {name}, want one: {begin.strip()} {end.strip()}")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--goals", action="store_true", help="only the figures that have a goal")
    parser.add_argument("json", type=Path, help="file that the benchmark wrote")
    parser.add_argument("readme", type=Path, help="README to update")
    args = parser.parse_args()
    table = lines(json.loads(args.json.read_text()), goals=args.goals)
    args.readme.write_text(written(args.readme.read_text(), args.json.stem, table))
