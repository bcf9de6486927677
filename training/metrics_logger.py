"""Logger of every metric of a run: ``metrics.jsonl``, the plot and the tracker, on rank 0."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.runtime.tracking import start_tracking
from configs.runtime.wandb_files import last_run_id
from training.learning_curve import CurvePlotter, write_learning_curve
from training.metrics_file import MetricsFile

if TYPE_CHECKING:
    from configs.schema import Config
    from training.checkpoint import Position

_PANELS = {"validation": "", "speed": "workload/"}
"""Prefixes on a dashboard, which sorts by name. Scores begin with the name of their movies, e.g.
val/map next to the table val/genres. The speed is last."""


class MetricsLogger:
    """Metrics file, plot and tracker of one attempt. On ranks other than 0 it does nothing."""

    def __init__(self, config: Config, *, rank: int, run_id: str | None, from_step: int) -> None:
        """Continue after ``from_step``, in tracking run ``run_id`` or that of the last attempt."""
        self._run_dir = run_dir = config.run_dir
        self._file = (
            MetricsFile(run_dir / "metrics.jsonl", from_step=from_step) if rank == 0 else None
        )
        self._plotter = CurvePlotter(run_dir) if rank == 0 else None
        self._tracker = start_tracking(
            config,
            run_dir=run_dir,
            job_type="training",
            name=config.training.run_name,
            run_id=run_id or last_run_id(run_dir),  # killed before the first checkpoint
            rank=rank,
            from_step=from_step,
            wait=from_step > 0,  # what to send again depends on what is stored
        )
        for record in self._lost_to_the_tracker():
            self._send(**record)

    def _lost_to_the_tracker(self) -> list[dict[str, Any]]:
        """Return the records that wandb lost with the attempts before.

        Slurm sends SIGTERM to every process of a step, to wandb's service too. So even an attempt
        that was stopped in order may have lost what the service had not written.
        """
        first = self._tracker.next_step
        if self._file is None or first is None:
            return []
        return [r for r in self._file.retained if r["step"] >= first and r["kind"] != "genres"]

    def _send(self, *, kind: str, step: int, epoch: int, **metrics: float | None) -> None:
        # The file has None for nan, which a tracker cannot plot.
        values = {name: value for name, value in metrics.items() if value is not None}
        if kind == "speed":
            values["epoch"] = epoch
        prefix = _PANELS.get(kind, f"{kind}/")
        self._tracker.log({f"{prefix}{name}": v for name, v in values.items()}, step=step)

    @property
    def run_id(self) -> str | None:
        """Id of the tracking run, for resuming it."""
        return self._tracker.run_id

    def is_tracked(self, *, wait: bool) -> bool:
        """Return whether tracking has started or was given up: ``url`` and ``link`` are final.

        Args:
            wait: Wait for the start.
        """
        if wait or self._tracker.is_started:
            self._tracker.wait_for_start()
            return True
        return False

    @property
    def url(self) -> str | None:
        """Web page of the tracking run; None without one."""
        return self._tracker.url

    @property
    def link(self) -> str | None:
        """Where to follow the run: its URL, else a command; None if nothing is tracked."""
        return self._tracker.url or local_link(self._run_dir)

    def add(self, kind: str, at: Position, metrics: Mapping[str, float]) -> None:
        """Record metrics of one kind at a position."""
        if self._file:
            self._file.append(kind, step=at.step, epoch=at.epoch, **metrics)
        self._send(kind=kind, step=at.step, epoch=at.epoch, **metrics)

    def add_genres(
        self,
        name: str,
        at: Position,
        genres: Sequence[str],
        aps: Sequence[float],
        support: Sequence[int],
    ) -> None:
        """Record the average precision per genre of one split."""
        if self._file:
            by_genre = dict(zip(genres, aps, strict=True))
            self._file.append("genres", step=at.step, epoch=at.epoch, part=name, ap=by_genre)
        rows = list(zip(genres, aps, support, strict=True))
        self._tracker.table(f"{name}/genres", ("genre", "ap", "support"), rows, step=at.step)

    def add_curves(
        self, name: str, at: Position, points: Sequence[tuple[str, float, float]]
    ) -> None:
        """Plot precision over recall per genre; only the tracker receives it."""
        self._tracker.curves(f"{name}/precision-recall", points, step=at.step)

    def alert(self, title: str, text: str) -> None:
        """Send an alert through the tracker."""
        self._tracker.alert(title, text)

    def sync(self) -> None:
        """Flush all metrics to disk; called before each checkpoint, so that it has all of them."""
        if self._file:
            self._file.sync()
        self._tracker.flush()

    def plot_if_due(self) -> None:
        """Draw the learning curve, unless that was done recently."""
        if self._plotter:
            self._plotter.plot_if_due()

    def close(self) -> None:
        """Close the file, draw it, and finish this attempt's part of the tracking run."""
        if self._file:
            self._file.close()
            write_learning_curve(self._run_dir)
        self._tracker.finish()


def local_link(run_dir: Path) -> str | None:
    """Return the command that shows what wandb has stored for a run; None without such files."""
    folder = run_dir / "wandb"
    return f"`wandb leet {shlex.quote(str(folder))}`" if last_run_id(run_dir) else None
