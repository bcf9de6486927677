"""Progress of a stage: a bar on a terminal, one line per minute in a log file, 80 columns each."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from configs.runtime.logs import rank_prefix
from configs.units import format_seconds

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import ProgressColumn

logger = logging.getLogger(__name__)

LINE_SECONDS = 60.0
"""Time between two lines in a log file."""

COLUMNS = 80
"""Longest line, with the rank and without the time of a log file."""

_MIN_BAR_COLUMNS = 6

_SEPARATOR = "  "


class Progress:
    """Counter of processed items with a rate, the time left and the newest figures."""

    def __init__(self, total: int | None, label: str, unit: str) -> None:
        self._total, self._label, self._unit = total, label, unit
        self._advanced = self._skipped = 0
        self._figures: dict[str, str] = {}
        self._start = self._logged = time.monotonic()
        self._ended = False
        self._bar: RichProgress | None = None

    def advance(self, n: int = 1, **figures: float | str) -> None:
        """Count ``n`` processed items, and show the newest figures.

        Args:
            n: Items since the last call.
            figures: Names and values as users read them, e.g. ``loss=0.3`` or ``waiting="3 %"``.
                Numbers get four significant digits. The first ones matter most: the last ones are
                left out where 80 columns are too few.
        """
        self._advanced += n
        for name, value in figures.items():
            self._figures[name] = value if isinstance(value, str) else f"{value:.4g}"
        self._show()

    def skip(self, n: int = 1) -> None:
        """Count ``n`` items that take no time, e.g. rejected or completed by an earlier attempt.

        They count towards the total, so that the counter ends full, and not towards the rate, so
        that the time left is right after a restart.
        """
        self._skipped += n
        self._show()

    def finish(self) -> None:
        """Log the final state, with the time taken instead of the time left."""
        self._ended = True
        logger.info("%s", self.line())

    def line(self) -> str:
        """Return the state in one line of at most 80 columns with the rank."""
        label = f"{self._label}: "
        return label + self.text(COLUMNS - len(rank_prefix()) - len(label))

    def text(self, columns: int) -> str:
        """Return count, rate, time and as many figures as ``columns`` allow."""
        seconds = time.monotonic() - self._start
        text = self._count()
        for part in [*self._speed(seconds), *self._figure_texts()]:
            if len(text) + len(_SEPARATOR) + len(part) > columns:
                break
            text += _SEPARATOR + part
        return text

    def _count(self) -> str:
        of_total = "" if self._total is None else f"/{self._total:,}"
        return f"{self._advanced + self._skipped:,}{of_total} {self._unit}"

    def _speed(self, seconds: float) -> list[str]:
        rate = self._advanced / seconds if seconds > 0 else 0.0
        left = (self._total or 0) - self._advanced - self._skipped
        if left > 0 and rate > 0 and not self._ended:
            return [_format_rate(rate), f"{format_seconds(left / rate)} left"]
        return [_format_rate(rate), f"in {format_seconds(seconds)}"]

    def _figure_texts(self) -> list[str]:
        return [f"{name} {value}" for name, value in self._figures.items()]

    def _show(self) -> None:
        if self._bar:
            # Only the bar itself is rich's; its text is rendered at each refresh.
            self._bar.update(self._bar.task_ids[0], completed=self._advanced + self._skipped)
        elif time.monotonic() - self._logged >= LINE_SECONDS:
            self._logged = time.monotonic()
            logger.info("%s", self.line())


@contextmanager
def progress(total: int | None, *, label: str, unit: str, bar: bool = True) -> Iterator[Progress]:
    """Show progress while the block runs, and log the final state when it ends.

    Args:
        total: Number of items, if known; without it no time left is shown.
        label: The work, e.g. ``"encode"``.
        unit: The items, e.g. ``"images"``.
        bar: Draw a bar if stderr is a terminal. Of several ranks only one should.
    """
    state = Progress(total, label, unit)
    if bar and sys.stderr.isatty() and logger.isEnabledFor(logging.INFO):
        with _drawn(state):
            yield state
    else:
        yield state
    state.finish()


@contextmanager
def _drawn(state: Progress) -> Iterator[None]:
    from rich.console import Console
    from rich.progress import BarColumn
    from rich.progress import Progress as RichProgress

    # The label first, the bar in the columns that the text leaves.
    label = f"{state._label:<9}"
    columns = (label, BarColumn(bar_width=None), _text_column(state, len(label)))
    console = Console(stderr=True)
    # Transient: the line logged at the end shows the same.
    with RichProgress(*columns, console=console, transient=True, expand=True) as bar:
        bar.add_task(state._label, total=state._total)
        state._bar = bar
        try:
            yield
        finally:
            state._bar = None


def _text_column(state: Progress, label_columns: int) -> ProgressColumn:
    from rich.progress import ProgressColumn, Task
    from rich.table import Column
    from rich.text import Text

    class TextColumn(ProgressColumn):
        """Text of ``state``, as long as label and bar allow."""

        def render(self, task: Task) -> Text:
            del task
            width = state._bar.console.width if state._bar else COLUMNS
            # Two spaces separate the three columns.
            return Text(state.text(min(width, COLUMNS) - label_columns - _MIN_BAR_COLUMNS - 2))

    return TextColumn(table_column=Column(no_wrap=True))


def _format_rate(rate: float) -> str:
    return f"{rate:,.0f}/s" if rate >= 100 else f"{rate:.3g}/s"
