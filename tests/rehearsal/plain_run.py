"""The disturbed chain without Slurm: plain processes, two killed and one stopped twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

from tests.rehearsal.work import RANKS, SHARD_TASKS, Work
from tests.slurm.cluster import CHECKOUT

PREEMPT_AT = (0.25, 0.55)
"""Progress of encoding at which it is preempted."""

KILLED = (1, 2)
"""Tasks of sharding that are killed."""

POLL_S = 0.2


def run_chain(work: Work) -> None:
    """Take the dump to a report, disturbed; completed stages are skipped."""
    if not work.is_sealed("frames"):
        work.run("movienet-shard", "plan")
        _shard(work)
    if not work.is_sealed("features/demo"):
        _encode(work)
    work.run("movienet-train", "run")
    work.run("movienet-eval", "report")


def _shard(work: Work) -> None:
    for first in range(0, SHARD_TASKS, 2):
        pair = (first, first + 1)
        processes = {task: _start(work, _build(work, task)) for task in pair}
        (doomed,) = set(pair) & set(KILLED)
        before = work.shards("frames")[0]
        _wait(partial(_has_more_shards, work, before + 4), processes[doomed])
        _send(processes[doomed], signal.SIGKILL)
        for process in processes.values():
            process.wait()
    for task in range(SHARD_TASKS):  # a rerun of every task: completed ones have nothing to do
        work.run("movienet-shard", "build", "--task", f"{task}/{SHARD_TASKS}")


def _build(work: Work, task: int) -> list[str]:
    return work.command("movienet-shard", "build", "--task", f"{task}/{SHARD_TASKS}")


def _encode(work: Work) -> None:
    ranks = str(CHECKOUT / "configs" / "accelerate" / "cpu-2.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ranks]
    words = ["--num_processes", str(RANKS), "--module", "encoders", "run"]
    command = [*launch, *words, "--config", str(work.config)]
    for share in PREEMPT_AT:
        process = _start(work, command)
        _wait(partial(_has_encoded, work, share), process)
        _send(process, signal.SIGTERM)
        process.wait()
    if _start(work, command).wait():
        raise SystemExit("encoding failed; see the records in data/runs/demo-encode")


def _has_more_shards(work: Work, n: int) -> bool:
    return work.shards("frames")[0] >= n


def _has_encoded(work: Work, share: float) -> bool:
    return work.progress("features/demo") >= share


def _start(work: Work, command: list[str]) -> subprocess.Popen[bytes]:
    log = (work.folder / "processes.log").open("ab")
    with log:
        return subprocess.Popen(
            command,
            cwd=work.folder,
            env=work.environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _send(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to a process, and SIGKILL to all that it started."""
    if process.poll() is not None:
        return
    if number == signal.SIGKILL:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)


def _wait(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait until a condition holds or the process has ended."""
    while process.poll() is None and not condition():
        time.sleep(POLL_S)
