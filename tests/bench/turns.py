"""Common parts of all benchmarks: ways that take turns in separate processes, a table, a file.

A benchmark defines its ways, runs them with ``take_turns``, turns the results into rows and passes
its ``measure`` function to ``main``. The preparation of a way, including imports, is not timed.
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
"""Child processes whose CPU time is not counted, e.g. the server that a way reads from."""

Run = Callable[[], Mapping[str, float] | None]
"""The timed work; the figures that it returns are stored with the turn."""

Ways = Mapping[str, Callable[[Path, Path], Run]]
"""By name: functions from the data folder and an empty folder to the timed work."""


@dataclass(frozen=True)
class Turn:
    """One timing of a way."""

    seconds: float
    cpu_s: float
    """User and system time of all its processes, including those that outlive the turn."""

    peak_mb: float
    """Peak resident memory of the process since its start."""

    figures: Mapping[str, float] = field(default_factory=dict)
    """Figures that the way returned."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    rate: str
    cpu: str
    ratio: float
    goal: str
    met: bool | None
    """Whether the goal is met; None without a goal."""

    @classmethod
    def at_least(cls, name: str, ratio: float, goal: float, rate: str = "", cpu: str = "") -> Self:
        """Return the row of a ratio that should be large."""
        return cls(name, rate, cpu, ratio, f">= {goal}", ratio >= goal)

    @classmethod
    def at_most(cls, name: str, ratio: float, goal: float, rate: str = "", cpu: str = "") -> Self:
        """Return the row of a figure that should be small."""
        return cls(name, rate, cpu, ratio, f"<= {goal}", ratio <= goal)

    def line(self) -> str:
        """Return the printed line."""
        verdict = {True: "met", False: "not met", None: ""}[self.met]
        return (
            f"{self.name:<30}{self.rate:>18}{self.cpu:>14}{self.ratio:>10.3g}  {self.goal:>9}  "
            f"{verdict}"
        ).rstrip()


@dataclass(frozen=True)
class Measured:
    """Result of a benchmark."""

    rows: Sequence[Row]
    turns: Mapping[str, Sequence[Turn]]
    method: str
    """The method of measurement, in one sentence."""

    title: str
    """Title of the table: the amount of data and the number of turns."""


def median(turns: Sequence[Turn]) -> float:
    """Return the median of the seconds."""
    return statistics.median(turn.seconds for turn in turns)


def peak(turns: Sequence[Turn]) -> float:
    """Return the peak memory in MB."""
    return max(turn.peak_mb for turn in turns)


def median_of(turns: Sequence[Turn], name: str) -> float:
    """Return the median of a figure that a way returned."""
    return statistics.median(turn.figures[name] for turn in turns)


def cpu_ms(turns: Sequence[Turn], items: int) -> str:
    """Return the median CPU milliseconds per item, formatted for the table."""
    return f"{statistics.median(turn.cpu_s for turn in turns) / items * 1000:.3f}"


def skip_absent(ways: Iterable[str], needs: Mapping[str, str]) -> list[str]:
    """Return the ways whose modules are installed; print the names of the others.

    Args:
        ways: Names of ways.
        needs: Module that a way needs, by the name of the way.
    """
    available = []
    for name in ways:
        if name in needs and importlib.util.find_spec(needs[name]) is None:
            sys.stdout.write(f"{name}: skipped, {needs[name]} is not installed\n")
        else:
            available.append(name)
    return available


def take_turns(
    ways: Mapping[str, tuple[str, ...]],
    *,
    data: Path,
    scratch: Path,
    repeats: int,
    fresh: bool = False,
) -> dict[str, list[Turn]]:
    """Run all ways in turn (A B C A B C …): one discarded turn, then ``repeats`` turns.

    Args:
        ways: Ways to time together, by the name of the result: one, or several concurrent ones.
        data: Data folder of every way.
        scratch: Parent of the ways' own folders.
        repeats: Turns that count; the discarded one before them warms caches.
        fresh: Use a new process and an empty folder for each turn, instead of one per way.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in ways}
    with ExitStack() as stack:
        running = {} if fresh else {name: _start(ways[name], data, scratch, stack) for name in ways}
        for repeat in range(repeats + 1):
            for name, parts in ways.items():
                with ExitStack() as once:
                    turn = _time(running.get(name) or _start(parts, data, scratch, once))
                if fresh:
                    os.sync()  # later write-back must not count for the next way
                if repeat:
                    turns[name].append(turn)
    return turns


def main(
    description: str | None,
    ways: Ways,
    measure: Callable[[bool, Path], Measured],
    versions: Sequence[str] = (),
) -> None:
    """Measure, print the table and write the file; with ``--one``, run as the process of a way.

    Args:
        description: Docstring of the benchmark; its first line appears in ``--help``.
        ways: All ways by name.
        measure: Function of ``quick`` and a scratch folder that runs the benchmark.
        versions: Distributions whose versions are recorded.
    """
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less data and 3 turns")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write ratios and turns to FILE")
    parser.add_argument("--scratch", type=Path, help="folder on the file system to measure")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        _serve(ways[args.one](args.data, args.out))
        return
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        measured = measure(args.quick, Path(scratch))
    _print(measured)
    if args.json:
        report = _as_json(measured, versions)
        args.json.write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")


def _print(measured: Measured) -> None:
    sys.stdout.write(f"{measured.title}\n")
    sys.stdout.write(f"{'name':<30}{'rate':>18}{'CPU ms/item':>14}{'ratio':>10}  {'goal':>9}\n")
    for row in measured.rows:
        sys.stdout.write(row.line() + "\n")


def _as_json(measured: Measured, versions: Sequence[str]) -> dict[str, Any]:
    present = {name: metadata.version(name) for name in versions if _installed(name)}
    return {
        "ratios": {row.name: float(f"{row.ratio:.4g}") for row in measured.rows},
        "rows": [
            {"name": row.name, "rate": row.rate, "cpu_ms": row.cpu, "goal": row.goal}
            for row in measured.rows
        ],
        "turns_s": {
            name: [round(turn.seconds, 4) for turn in turns]
            for name, turns in measured.turns.items()
        },
        "versions": {"python": platform.python_version(), **present},
        "machine": {
            "cores": os.cpu_count(),
            "processor": platform.machine(),
            "load": [round(value, 2) for value in os.getloadavg()],
        },
        "method": measured.method,
    }


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


# --- the process of a way -------------------------------------------------------------------------


def _serve(run: Run) -> None:
    """Report readiness, then run once per input line and report each turn."""
    _send({"ready": True})
    for _ in sys.stdin:
        before, start = _cpu_seconds(), time.perf_counter()
        figures = run()
        seconds = time.perf_counter() - start
        cpu = _cpu_seconds() - before
        _send(
            {
                "seconds": seconds,
                "cpu_s": cpu,
                "peak_mb": _peak_mb(),
                "figures": dict(figures or {}),
            }
        )


def _send(message: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _peak_mb() -> float:
    # Not getrusage, whose peak includes that of the parent process before the fork.
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) / 1024


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of all its descendants, running or ended.

    ``getrusage`` counts children only after they have ended; running ones are read from ``/proc``.
    """
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    ticks = os.sysconf("SC_CLK_TCK")
    ended = sum(each.ru_utime + each.ru_stime for each in usage)
    return ended + _ticks_below(os.getpid()) / ticks


def _ticks_below(parent: int) -> int:
    """Return the clock ticks of the running descendants of a process, except ``OUTSIDE``."""
    used, children = dict[int, int](), dict[int, list[int]]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # the process has just ended
            continue
        process = int(path.parent.name)
        used[process] = sum(map(int, fields[11:15]))  # of the process and its ended children
        children.setdefault(int(fields[1]), []).append(process)

    def below(process: int) -> int:
        inside = (child for child in children.get(process, ()) if child not in OUTSIDE)
        return sum(used[child] + below(child) for child in inside)

    return below(parent)


class _Process:
    """The process of a way, as seen by the benchmark."""

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
        """Wait until imports and preparation are complete."""
        if not self._ready:
            self._ready = bool(self.receive())

    def go(self) -> None:
        """Start a turn."""
        if self._process.stdin:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Return the next message of the process."""
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise SystemExit(f"{self._name}: the process ended before its turn was complete")
        message: dict[str, Any] = json.loads(line)
        return message

    def end(self) -> None:
        """Close the input of the process and wait for its end."""
        self._process.communicate()


def _start(parts: Iterable[str], data: Path, scratch: Path, stack: ExitStack) -> list[_Process]:
    processes = []
    for name in parts:
        out = Path(tempfile.mkdtemp(dir=scratch))
        stack.callback(shutil.rmtree, out)
        processes.append(_Process(name, data, out))
        stack.callback(processes[-1].end)
    return processes


def _time(processes: Sequence[_Process]) -> Turn:
    """Run one turn of the processes concurrently."""
    for process in processes:
        process.wait_until_ready()
    for process in processes:
        process.go()
    messages = [process.receive() for process in processes]
    return Turn(
        max(message["seconds"] for message in messages),
        sum(message["cpu_s"] for message in messages),
        max(message["peak_mb"] for message in messages),
        messages[0]["figures"],
    )
