"""The common parts of the benchmarks: CPU time of worker processes, and the slow HTTP server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

HERE = Path(__file__).parent

BUSY = "import time\nwhile time.process_time() < 1: pass\nprint(flush=True)\ninput()"
"""A program that uses one second of CPU time, prints a line, and waits."""

MEASURE = f"""
import subprocess, sys
sys.path.insert(0, {str(HERE)!r})
import turns

before = turns._cpu_seconds()
worker = subprocess.Popen(
    [sys.executable, "-c", {BUSY!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE
)
if sys.argv[1] == "outside":
    turns.OUTSIDE.add(worker.pid)
worker.stdout.readline()
print(turns._cpu_seconds() - before)
worker.communicate()
"""


def cpu_of_a_busy_worker(*, place: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, place], check=True, capture_output=True, text=True
    )
    return float(done.stdout)


@pytest.mark.slow
def test_the_cpu_time_of_running_workers_is_counted_except_for_those_outside() -> None:
    assert cpu_of_a_busy_worker(place="below") >= 0.9
    assert cpu_of_a_busy_worker(place="outside") < 0.5


@contextmanager
def slow_server(folder: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, str(HERE / "slow_http.py"), str(folder), "0"]
    with ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        stack.callback(process.kill)
        assert process.stdout
        yield process.stdout.readline().strip(), process


def test_the_slow_server_counts_the_bytes_it_sends_and_ends_with_its_parent(
    tmp_path: Path,
) -> None:
    (tmp_path / "shard.tar").write_bytes(bytes(1000))
    with slow_server(tmp_path) as (url, process):
        get = ["curl", "-s", "--noproxy", "*"]
        subprocess.run([*get, "-r", "100-349", f"{url}/shard.tar"], check=True, capture_output=True)
        sent = subprocess.run([*get, f"{url}/_sent"], check=True, capture_output=True).stdout
        assert sent == b"250"
        assert process.stdin
        process.stdin.close()
        assert process.wait(10) == 0
