"""How far a stage is: a bar on a terminal, one line a minute in a log file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

logger = logging.getLogger(__name__)

LINE_SECONDS = 60.0
"""Time between two lines in a log file."""


class Progress:
    """Counts what is done; the last line stands when the block ends."""

    def __init__(self, total: int | None, label: str, unit: str) -> None:
        self._total, self._label, self._unit = total, label, unit
        self._done = 0
        self._figures: dict[str, float] = {}
        self._start = self._said = time.monotonic()
        self._bar: tuple[RichProgress, TaskID] | None = None

    def advance(self, n: int = 1, **figures: float) -> None:
        """Count ``n`` more, and show the newest ``figures`` such as ``loss=0.3``."""
        self._done += n
        self._figures.update(figures)
        if self._bar:
            bar, task = self._bar
            bar.update(task, advance=n, figures=self._figure_text())
        elif time.monotonic() - self._said >= LINE_SECONDS:
            self._said = time.monotonic()
            logger.info("%s", self.line())

    def line(self) -> str:
        """Return the state in one line."""
        seconds = time.monotonic() - self._start
        of = f"/{self._total:,}" if self._total is not None else ""
        rate = self._done / seconds if seconds > 0 else 0.0
        parts = [f"{self._label}: {self._done:,}{of} {self._unit}", f"{seconds:.1f} s"]
        parts.append(f"{rate:,.1f} {self._unit}/s")
        if self._total and 0 < self._done < self._total:
            parts.append(f"{(self._total - self._done) / rate:.0f} s left")
        return "   ".join([*parts, self._figure_text()]).rstrip()

    def _figure_text(self) -> str:
        return "  ".join(f"{name} {value:.4g}" for name, value in self._figures.items())


@contextmanager
def progress(total: int | None, *, label: str, unit: str, bar: bool = True) -> Iterator[Progress]:
    """Show progress while the block runs.

    Args:
        total: How many there are, if known.
        label: What is done, e.g. ``"encode"``.
        unit: What is counted, e.g. ``"images"``.
        bar: Draw a bar where there is a terminal; of several ranks only one should.
    """
    state = Progress(total, label, unit)
    with _bar(state) if bar and _wants_bar() else _nothing():
        yield state
    logger.info("%s", state.line())


def _wants_bar() -> bool:
    return sys.stderr.isatty() and logger.isEnabledFor(logging.INFO)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _bar(state: Progress) -> Iterator[None]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    # Transient: the closing line says the same and also stands in a log.
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(state._label, total=state._total, unit=state._unit, figures="")
        state._bar = (bar, task)
        try:
            yield
        finally:
            state._bar = None
