"""Script that tracks a small run in a separate process, for the tests of tracking.

``python track_a_run.py RUN_DIR [--signal NAME] [--run-id ID] [--steps N] [--tables] [--bad-curve]
[KEY=VALUE]…``
prints one JSON object: the seconds of each phase, the run's id and the offline folder. ``--signal``
is sent to wandb's own process after half of the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from configs.load import load_config
from configs.runtime.logs import start_logging
from configs.runtime.tracking import start_tracking

ROOT = Path(__file__).resolve().parents[3]


def children() -> list[int]:
    """Return the ids of this process's children."""
    ids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(after_name[1]) == os.getpid():
            ids.append(int(stat.parent.name))
    return ids


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("run_dir", type=Path)
    options.add_argument("overrides", nargs="*")
    options.add_argument("--signal")
    options.add_argument("--run-id")
    options.add_argument("--rank", type=int, default=0)
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--tables", action="store_true")
    options.add_argument("--bad-curve", action="store_true")
    options.add_argument("--no-finish", action="store_true")
    arguments = options.parse_intermixed_args()
    start_logging()
    config = load_config(ROOT / "configs" / "demo.yaml", arguments.overrides)
    took: dict[str, float] = {}
    signalled: list[int] = []

    def lap(phase: str, since: float) -> None:
        took[phase] = round(time.monotonic() - since, 2)

    begun = time.monotonic()
    tracker = start_tracking(
        config,
        run_dir=arguments.run_dir,
        job_type="training",
        name="small",
        run_id=arguments.run_id,
        rank=arguments.rank,
    )
    lap("start", begun)
    begun = time.monotonic()
    if arguments.bad_curve:  # wandb refuses a column of mixed types
        points: list[Any] = [("Drama", 0.0, 1.0), ("Drama", "x", 0.5)]
        tracker.curves("bad", points, step=0)
    for step in range(arguments.steps):
        if step == arguments.steps // 2 and arguments.signal:
            time.sleep(0.5)
            signalled = children()
            for pid in signalled:
                os.kill(pid, signal.Signals[arguments.signal])
            time.sleep(0.5)
        tracker.log({"train/loss": 1 / (step + 1), "val/mAP": step / 100}, step=10 * step)
        if arguments.tables:
            tracker.table("scores", ["step"], [[step]], step=10 * step)
            tracker.curves("curves", [("Drama", 0.0, 1.0), ("Drama", 1.0, 0.5)], step=10 * step)
    lap("log", begun)
    begun = time.monotonic()
    tracker.table(
        "genres", ["genre", "ap"], [["Drama", 0.5], ["War", None]], step=10 * arguments.steps
    )
    if not arguments.no_finish:
        tracker.finish()
        tracker.finish()
    lap("finish", begun)
    offline = tracker.offline_dir
    run = {"run_id": tracker.run_id, "offline": offline and str(offline), "signalled": signalled}
    print(json.dumps(run | took | {"pandas": "pandas" in sys.modules}))


if __name__ == "__main__":
    main()
