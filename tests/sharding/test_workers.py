"""Tasks in processes of their own: results, errors and the death of a worker."""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import DataError, MachineError
from sharding.workers import ProgressUpdate, Task, run_tasks

# A worker imports its task by name, and tests have none.
SQUARE = """
import os
import signal
from dataclasses import dataclass

from configs.errors import DataError


@dataclass(frozen=True)
class Square:
    bad: int = -1
    dies: int = -1

    def __call__(self, number, tell):
        tell({"numbers": 1})
        if number == self.bad:
            raise DataError(f"number {number}: got it, want another")
        if number == self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return number**2, os.getpid()
"""

Square = Callable[..., Task[tuple[int, int]]]


@pytest.fixture
def square(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Square:
    """A task that squares numbers; at one it may raise, or kill its process."""
    (tmp_path / "square_for_workers.py").write_text(SQUARE)
    monkeypatch.syspath_prepend(tmp_path)
    made: Square = importlib.reload(importlib.import_module("square_for_workers")).Square
    return made


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order_and_news_are_heard(square: Square, workers: int) -> None:
    heard: Counter[str] = Counter()

    def hear(news: ProgressUpdate) -> None:
        heard.update(news)

    results = run_tasks(square(), [5, 3, 4, 1], workers=workers, on_progress=hear)
    assert [squared for squared, _ in results] == [25, 9, 16, 1]
    assert heard == {"numbers": 4}
    assert (os.getpid() in {pid for _, pid in results}) == (workers == 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_worker_is_an_error_of_the_parent(square: Square, workers: int) -> None:
    with pytest.raises(DataError, match=r"^number 3: got it, want another$"):
        run_tasks(square(bad=3), range(8), workers=workers)


def test_a_killed_worker_is_told_in_one_line(square: Square) -> None:
    with pytest.raises(
        MachineError, match=r"ended by signal 9 at shard 2, .* run the same"
    ) as told:
        run_tasks(square(dies=2), range(6), workers=2)
    assert "\n" not in str(told.value)


def test_nothing_to_do_starts_nobody(square: Square) -> None:
    assert run_tasks(square(), [], workers=4) == []
