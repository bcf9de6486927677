"""Every figure of a run goes to ``metrics.jsonl`` and to the tracker; rank 0 writes, others not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from configs.runtime.tracking import last_run_id, start_tracking
from training.metrics_file import MetricsFile

if TYPE_CHECKING:
    from configs.schema import Config
    from training.checkpoint import Position


_SHOWN_AGAIN = 200
"""Steps before the checkpoint that a tracker is shown again after a kill: equal points, no gap."""


class MetricsLogger:
    """Where figures go."""

    def __init__(self, config: Config, *, rank: int, run_id: str | None, from_step: int) -> None:
        """Go on behind ``from_step``, in the tracking run ``run_id`` or of the attempt before."""
        run_dir = config.run_dir
        self._history = (
            MetricsFile(run_dir / "metrics.jsonl", from_step=from_step) if rank == 0 else None
        )
        again = self._lost_to_the_tracker(from_step)
        self._tracker = start_tracking(
            config,
            run_dir=run_dir,
            job_type="training",
            name=config.training.run_name,
            run_id=run_id or last_run_id(run_dir),  # killed before its first checkpoint
            rank=rank,
            from_step=again[0]["step"] - 1 if again else from_step,
        )
        for record in again:
            self._show(**record)

    def _lost_to_the_tracker(self, from_step: int) -> list[dict[str, Any]]:
        """Return what wandb's buffers may have lost with a process that was killed."""
        kept = self._history.after_kill if self._history else []
        return [
            record
            for record in kept
            if record["step"] > from_step - _SHOWN_AGAIN and record["kind"] != "genres"
        ]

    def _show(self, *, kind: str, step: int, epoch: int, **figures: float | None) -> None:
        there = {f"{kind}/{name}": value for name, value in figures.items() if value is not None}
        self._tracker.log({**there, "epoch": epoch}, step=step)

    @property
    def run_id(self) -> str | None:
        """Name of the tracking run, to go on with it."""
        return self._tracker.run_id

    def add(self, kind: str, at: Position, figures: Mapping[str, float]) -> None:
        """Record figures of one kind at a position."""
        if self._history:
            self._history.append(kind, step=at.step, epoch=at.epoch, **figures)
        self._show(kind=kind, step=at.step, epoch=at.epoch, **figures)

    def add_genres(
        self,
        name: str,
        at: Position,
        genres: Sequence[str],
        aps: Sequence[float],
        support: Sequence[int],
    ) -> None:
        """Record the average precision of each genre for a part of the movies."""
        if self._history:
            by_genre = dict(zip(genres, aps, strict=True))
            self._history.append("genres", step=at.step, epoch=at.epoch, part=name, ap=by_genre)
        rows = list(zip(genres, aps, support, strict=True))
        self._tracker.table(f"{name}/genres", ("genre", "ap", "support"), rows, step=at.step)

    def add_curves(
        self, name: str, at: Position, points: Sequence[tuple[str, float, float]]
    ) -> None:
        """Plot precision over recall of each genre; the record itself keeps no plot."""
        self._tracker.curves(f"{name}/precision-recall", points, step=at.step)

    def alert(self, title: str, text: str) -> None:
        """Tell those who follow the run."""
        self._tracker.alert(title, text)

    def sync(self) -> None:
        """Make what is recorded so far survive a power cut; before a checkpoint is published."""
        if self._history:
            self._history.sync()
        self._tracker.flush()

    def close(self) -> None:
        """End the record of this attempt."""
        if self._history:
            self._history.close()
        self._tracker.finish()
