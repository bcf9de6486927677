"""Peak memory of every process of the rehearsal, sampled from ``/proc``."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.rehearsal.work import MARKER, Work
from tests.slurm.cluster import PROGRAMS

EVERY_S = 0.5
_MODULES = {package: program for program, package in PROGRAMS.items()}


def label_of(words: Sequence[str], environment: Sequence[str]) -> str | None:
    """Return the name of a process from its command line, with its rank; None for others."""
    rank = next((f" rank {v[5:]}" for v in environment if v.startswith("RANK=")), "")
    if any(w.endswith(("accelerate.commands.launch", "/accelerate-launch")) for w in words):
        return "accelerate launch"
    if "-m" not in words:
        return None
    package, *rest = words[words.index("-m") + 1 :]
    if package not in _MODULES or not rest:
        return None
    task = f" --task {rest[rest.index('--task') + 1]}" if "--task" in rest else ""
    if package == "sharding" and rest[0] == "status":
        return None  # a short call of another command
    return f"{_MODULES[package]} {rest[0]}{task}{rank}"


@contextmanager
def watched(work: Work) -> Iterator[None]:
    """Record the peaks of all processes while the block runs, added to those of earlier runs."""
    path = work.folder / "memory.json"
    peaks = dict(json.loads(path.read_text())) if path.is_file() else {}
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(f"{MARKER}={work.folder}", peaks, ended))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        path.write_text(json.dumps(peaks))


def _watch(marker: str, peaks: dict[str, float], ended: threading.Event) -> None:
    while not ended.wait(EVERY_S):
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                _add(folder, marker, peaks)
            except OSError:  # the process has just ended
                continue


def _add(folder: Path, marker: str, peaks: dict[str, float]) -> None:
    environment = (folder / "environ").read_text(errors="replace").split("\0")
    if marker not in environment:
        return
    label = label_of((folder / "cmdline").read_text(errors="replace").split("\0"), environment)
    peak = re.search(r"VmHWM:\s+(\d+)", (folder / "status").read_text())
    if label and peak:
        peaks[label] = max(peaks.get(label, 0), round(int(peak[1]) / 1024, 1))
