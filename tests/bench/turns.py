"""What all benchmarks share: ways take turns, each in its own process; one table, one file.

A benchmark names its ways, gives its turns to ``take_turns``, makes rows of them and hands both to
``main``. A way gets ready outside the clock, in a process whose imports are not counted either.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Self

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, installed or not

OUTSIDE: set[int] = set()
"""Processes below a way whose CPU is not its own, e.g. the server that it reads from."""

Run = Callable[[], Mapping[str, float] | None]
"""The measured work; what it returns is kept with the turn."""

Ways = Mapping[str, Callable[[Path, Path], Run]]
"""By name: from the folder of the data and an empty folder to the work."""


@dataclass(frozen=True)
class Turn:
    """One timing."""

    seconds: float
    cpu_s: float
    """User and system of all its processes, those that go on after the turn too."""

    peak_mb: float
    """Resident memory of the process at its highest, since it began."""

    told: Mapping[str, float] = field(default_factory=dict)
    """What the way itself says."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    rate: str
    cpu: str
    ratio: float
    goal: str
    met: bool | None
    """None: there is no goal."""

    @classmethod
    def at_least(cls, name: str, ratio: float, goal: float, rate: str = "", cpu: str = "") -> Self:
        """Return the row of a ratio that should be large."""
        return cls(name, rate, cpu, ratio, f">= {goal}", ratio >= goal)

    @classmethod
    def at_most(cls, name: str, ratio: float, goal: float, rate: str = "", cpu: str = "") -> Self:
        """Return the row of a figure that should be small."""
        return cls(name, rate, cpu, ratio, f"<= {goal}", ratio <= goal)

    def line(self) -> str:
        """Return it as it is printed."""
        verdict = {True: "met", False: "not met", None: ""}[self.met]
        return (
            f"{self.name:<30}{self.rate:>18}{self.cpu:>14}{self.ratio:>10.3g}  {self.goal:>9}  "
            f"{verdict}"
        ).rstrip()


@dataclass(frozen=True)
class Measured:
    """What a benchmark found."""

    rows: Sequence[Row]
    turns: Mapping[str, Sequence[Turn]]
    method: str
    """How it was measured, in a sentence."""

    title: str
    """What stands above the table: how much data, how many turns."""


def median(turns: Sequence[Turn]) -> float:
    """Return the median of the seconds."""
    return statistics.median(turn.seconds for turn in turns)


def peak(turns: Sequence[Turn]) -> float:
    """Return the highest memory in MB."""
    return max(turn.peak_mb for turn in turns)


def told(turns: Sequence[Turn], name: str) -> float:
    """Return the median of a figure that a way tells."""
    return statistics.median(turn.told[name] for turn in turns)


def cpu_ms(turns: Sequence[Turn], items: int) -> str:
    """Return the median CPU milliseconds an item, as the table shows them."""
    return f"{statistics.median(turn.cpu_s for turn in turns) / items * 1000:.3f}"


def there(module: str) -> bool:
    """Tell whether a peer is installed."""
    return importlib.util.find_spec(module) is not None


def skip_absent(ways: Iterable[str], needs: Mapping[str, str]) -> list[str]:
    """Return the ways whose peer is installed; tell the others by name.

    Args:
        ways: Names of ways.
        needs: Module that a way needs, by the way's name.
    """
    kept = []
    for name in ways:
        if name in needs and not there(needs[name]):
            sys.stdout.write(f"{name}: skipped, {needs[name]} is not installed\n")
        else:
            kept.append(name)
    return kept


def take_turns(
    ways: Mapping[str, tuple[str, ...]],
    *,
    data: Path,
    scratch: Path,
    repeats: int,
    fresh: bool = False,
) -> dict[str, list[Turn]]:
    """Run all ways in turn (A B C A B C …), once for nothing and then ``repeats`` times.

    Args:
        ways: What is timed by its name: one way, or several at the same time.
        data: Folder that every way gets.
        scratch: Where each way's own folder is made.
        repeats: Turns that count; the one before them warms caches.
        fresh: A new process and an empty folder for each turn; else one a way, for all turns.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in ways}
    with ExitStack() as stack:
        kept = {} if fresh else {name: _start(ways[name], data, scratch, stack) for name in ways}
        for repeat in range(repeats + 1):
            for name, parts in ways.items():
                with ExitStack() as once:
                    made = _together(kept.get(name) or _start(parts, data, scratch, once))
                if fresh:
                    os.sync()  # what is written back later is nobody else's time
                if repeat:
                    turns[name].append(made)
    return turns


def main(
    description: str | None,
    ways: Ways,
    measure: Callable[[bool, Path], Measured],
    versions: Sequence[str] = (),
) -> None:
    """Measure, print the table and write the file; or be one of the ways.

    Args:
        description: The benchmark's docstring; its first line stands in ``--help``.
        ways: Every way by name.
        measure: Gets whether to be quick, and a scratch folder.
        versions: Distributions whose versions matter.
    """
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less data, 3 turns, under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write ratios and turns here")
    parser.add_argument("--scratch", type=Path, help="on the file system to measure")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        _be(ways[args.one](args.data, args.out))
        return
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        made = measure(args.quick, Path(scratch))
    _show(made)
    if args.json:
        found = _as_json(made, versions)
        args.json.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")


def _show(made: Measured) -> None:
    sys.stdout.write(f"{made.title}\n")
    sys.stdout.write(f"{'name':<30}{'rate':>18}{'CPU ms/item':>14}{'ratio':>10}  {'goal':>9}\n")
    for row in made.rows:
        sys.stdout.write(row.line() + "\n")


def _as_json(made: Measured, versions: Sequence[str]) -> dict[str, Any]:
    present = {name: metadata.version(name) for name in versions if _installed(name)}
    return {
        "ratios": {row.name: float(f"{row.ratio:.4g}") for row in made.rows},
        "rows": [
            {"name": row.name, "rate": row.rate, "cpu_ms": row.cpu, "goal": row.goal}
            for row in made.rows
        ],
        "turns_s": {
            name: [round(turn.seconds, 4) for turn in turns] for name, turns in made.turns.items()
        },
        "versions": {"python": platform.python_version(), **present},
        "machine": {
            "cores": os.cpu_count(),
            "processor": platform.machine(),
            "load": [round(value, 2) for value in os.getloadavg()],
        },
        "method": made.method,
    }


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


# --- a way in a process of its own ----------------------------------------------------------------


def _be(run: Run) -> None:
    """Say ready; at each word run, and tell."""
    _tell({"ready": True})
    for _ in sys.stdin:
        before, start = _cpu_seconds(), time.perf_counter()
        figures = run()
        seconds = time.perf_counter() - start
        cpu = _cpu_seconds() - before
        _tell(
            {"seconds": seconds, "cpu_s": cpu, "peak_mb": _peak_mb(), "told": dict(figures or {})}
        )


def _tell(what: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def _peak_mb() -> float:
    # Not getrusage: its peak is at least that of the process that started this one.
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) / 1024


def _cpu_seconds() -> float:
    """Return what this process and all below it have used, the ended ones that were waited for too.

    The system tells of children only when they have ended: workers that live on are looked at.
    """
    use = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    ticks = os.sysconf("SC_CLK_TCK")
    return sum(one.ru_utime + one.ru_stime for one in use) + _ticks_below(os.getpid()) / ticks


def _ticks_below(parent: int) -> int:
    """Return the clock ticks of the living processes below one, except of those outside."""
    used, children = dict[int, int](), dict[int, list[int]]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        process = int(path.parent.name)
        used[process] = sum(map(int, fields[11:15]))  # its own, and of its ended children
        children.setdefault(int(fields[1]), []).append(process)

    def below(process: int) -> int:
        inside = (child for child in children.get(process, ()) if child not in OUTSIDE)
        return sum(used[child] + below(child) for child in inside)

    return below(parent)


class _Process:
    """A way that waits for its turn."""

    def __init__(self, name: str, data: Path, out: Path) -> None:
        self._name, self._ready = name, False
        script = Path(sys.argv[0]).resolve()
        command = [sys.executable, script, "--one", name, "--data", data, "--out", out]
        self._process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_until_ready(self) -> None:
        """Return when its imports and preparations are over."""
        if not self._ready:
            self._ready = bool(self.heard())

    def go(self) -> None:
        """Begin a turn."""
        if self._process.stdin:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()

    def heard(self) -> dict[str, Any]:
        """Return the next line it tells."""
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise SystemExit(f"{self._name}: ended before its turn was over")
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self) -> None:
        """Let it go."""
        self._process.communicate()


def _start(parts: Iterable[str], data: Path, scratch: Path, stack: ExitStack) -> list[_Process]:
    processes = []
    for name in parts:
        out = Path(tempfile.mkdtemp(dir=scratch))
        stack.callback(shutil.rmtree, out)
        processes.append(_Process(name, data, out))
        stack.callback(processes[-1].end)
    return processes


def _together(processes: Sequence[_Process]) -> Turn:
    """Run these at the same time, from one start."""
    for process in processes:
        process.wait_until_ready()
    for process in processes:
        process.go()
    told_ = [process.heard() for process in processes]
    return Turn(
        max(row["seconds"] for row in told_),
        sum(row["cpu_s"] for row in told_),
        max(row["peak_mb"] for row in told_),
        told_[0]["told"],
    )
