"""Tasks in worker processes: results, errors, hints and killed workers."""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import DataError, MachineError
from configs.runtime.hints import remember_arguments
from sharding.workers import ProgressUpdate, Task, run_tasks

# A worker imports its task by module name, which a test module does not have.
SQUARE = """
import os
import signal
from dataclasses import dataclass

from configs.errors import DataError
from configs.runtime.hints import hint


@dataclass(frozen=True)
class Square:
    bad: int = -1
    dies: int = -1

    def __call__(self, number, on_progress):
        on_progress({"numbers": 1})
        if number == self.bad:
            command = hint("movienet-shard plan")
            raise DataError(f"number {number}: got it, want another; run {command}")
        if number == self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return number**2, os.getpid()
"""

Square = Callable[..., Task[tuple[int, int]]]


@pytest.fixture
def square(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Square:
    """Task that squares numbers; for one of them it can raise, or kill its process."""
    (tmp_path / "square_for_workers.py").write_text(SQUARE)
    monkeypatch.syspath_prepend(tmp_path)
    task: Square = importlib.reload(importlib.import_module("square_for_workers")).Square
    return task


@pytest.mark.parametrize("workers", [1, 3])
def test_results_are_in_order_and_progress_is_reported(square: Square, workers: int) -> None:
    counts: Counter[str] = Counter()

    def count(update: ProgressUpdate) -> None:
        counts.update(update)

    results = run_tasks(square(), [5, 3, 4, 1], workers=workers, on_progress=count)
    assert [squared for squared, _ in results] == [25, 9, 16, 1]
    assert counts == {"numbers": 4}
    assert (os.getpid() in {pid for _, pid in results}) == (workers == 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_worker_is_raised_with_the_hint_of_the_users_command(
    square: Square, workers: int
) -> None:
    remember_arguments("my file.yaml", ["data.limit=20"])
    with pytest.raises(DataError) as caught:
        run_tasks(square(bad=3), range(8), workers=workers)
    command = "movienet-shard plan --config 'my file.yaml' data.limit=20"
    assert str(caught.value) == f"number 3: got it, want another; run `{command}`"


def test_a_killed_worker_is_reported_in_one_line(square: Square) -> None:
    with pytest.raises(
        MachineError, match=r"was killed by signal 9 at shard 2 .*; rerun the command"
    ) as caught:
        run_tasks(square(dies=2), range(6), workers=2)
    assert "\n" not in str(caught.value)


def test_no_tasks_start_no_worker(square: Square) -> None:
    assert run_tasks(square(), [], workers=4) == []
