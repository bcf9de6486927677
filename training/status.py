"""State of runs, from their attempts, metrics and checkpoints, without loading PyTorch."""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.corrupt import report_corrupt
from configs.errors import DataError, MovieNetError, error_text
from configs.load import load_config
from configs.runtime.attempt import AttemptRecord, attempt_numbers, is_active, read_attempts
from configs.runtime.hints import hint, remember_arguments
from configs.runtime.publish import current_folder
from configs.runtime.wandb_files import is_synced, segments_to_sync
from training import learning_curve
from training.metrics_file import read_progress
from training.run_summary import best_validation

if TYPE_CHECKING:
    from configs.schema import Config

_COLUMNS = 80
_INDENT = 4 * " "


@dataclass(frozen=True)
class RunStatus:
    """State of one run."""

    run: Path
    state: str
    """``running``, ``done``, ``interrupted``, ``failed``, ``killed``: its record contains
    ``running``, but no process holds its lock; or ``unknown``: a record cannot be read."""

    attempt: AttemptRecord | None
    """The one of ``state``; None if a record cannot be read."""

    attempts: tuple[AttemptRecord, ...]
    epoch: int
    """Completed epochs."""

    epochs: int | None
    """``training.epochs``; None if the configuration of the run cannot be read."""

    step: int
    validation: Mapping[str, Any] | None
    """The record with the best holdout mAP; without a holdout the last one."""

    checkpoint: Mapping[str, Any] | None
    """Epoch and step of the checkpoint ``last``."""

    plot: Path | None
    link: str | None
    """Page of the tracking run."""

    sync: str | None
    """Command that uploads what wandb's server does not have."""

    command: str | None
    """What to run next."""

    problem: str | None = None
    """Damage in its files."""

    def row(self) -> tuple[str, ...]:
        """Return the cells of the table of several runs."""
        of = "" if self.epochs is None else f"/{self.epochs:,}"
        number = str(self.attempt.attempt) if self.attempt else "-"
        epochs, step = f"{self.epoch:,}{of}", f"{self.step:,}"
        return (self.run.name, self.state, number, epochs, step, self._map(1))

    def _map(self, splits: int) -> str:
        """Return the best mAP of up to so many splits; without a holdout the last one."""
        validation = self.validation or {}
        scores = _scores(validation)[:splits]
        return f"{', '.join(scores)} (epoch {validation['epoch']})" if scores else "-"

    def remarks(self) -> Iterator[str]:
        """Yield what else a reader of the table must know."""
        if self.problem:
            yield self.problem
        if self.attempt and self.state in ("failed", "interrupted", "killed"):
            yield _reason(self.attempt, self.state)
        if self.link or self.sync:
            yield self.link or f"offline: {self.sync}"

    def lines(self) -> Iterator[str]:
        """Yield the report of this run alone."""
        _, state, number, epochs, step, _ = self.row()
        yield f"{self.run}: {state}, attempt {number}"
        yield f"epochs       {epochs}, step {step}"
        yield f"best mAP     {self._map(2)}"
        if self.checkpoint:
            yield "checkpoint   last: epoch {epoch:,}, step {step:,}".format(**self.checkpoint)
        for name, value in (("plot", self.plot), ("link", self.link), ("not uploaded", self.sync)):
            if value:
                yield f"{name:<13}{value}"
        yield from _attempt_lines(self.attempts, self.attempt, self.state)
        if self.problem:
            yield f"damaged: {self.problem}"
        if self.command:
            yield f"next: {self.command}"

    def as_json(self) -> dict[str, Any]:
        """Return all of it as JSON-like data."""
        tree = {name: value for name, value in vars(self).items() if name != "attempts"}
        return tree | {
            "run": str(self.run),
            "attempt": self.attempt.attempt if self.attempt else None,
            "attempts": [asdict(one) for one in self.attempts],
            "plot": str(self.plot) if self.plot else None,
            "sync": self.sync and self.sync.strip("`"),
            "command": self.command and self.command.strip("`"),
        }


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """Return the runs among these folders and in them.

    Raises:
        DataError: a folder is neither a run nor contains one.
    """
    runs = []
    for folder in folders:
        inside = sorted(folder.iterdir()) if folder.is_dir() else []
        found = [folder] if attempt_numbers(folder) else [p for p in inside if attempt_numbers(p)]
        if not found:
            raise DataError(
                f"{folder}: no run, want the folder of a run, or one that contains runs"
            )
        runs += found
    return runs


def table(runs: Sequence[RunStatus]) -> Iterator[str]:
    """Yield a row per run, with remarks below it."""
    rows = [("run", "state", "attempt", "epochs", "step", "best mAP"), *(run.row() for run in runs)]
    remarks = [(), *(tuple(run.remarks()) for run in runs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row, texts in zip(rows, remarks, strict=True):
        name, state, *figures, best = (text.ljust(w) for text, w in zip(row, widths, strict=True))
        cells = (text.strip().rjust(len(text)) for text in figures)
        yield "   ".join([name, state, *cells, best]).rstrip()
        for text in texts:
            yield from _wrapped(text)


def read_status(run: Path) -> RunStatus:
    """Read the files of one run; damage in them is part of the result."""
    active = is_active(run)
    attempts: tuple[AttemptRecord, ...] = ()
    attempt, state = None, "unknown"
    validations: list[dict[str, Any]] = []
    last = checkpoint = problem = None
    try:
        checkpoint = _checkpoint(run)
        validations, last = read_progress(run / "metrics.jsonl")
    except (MovieNetError, OSError) as error:
        problem = error_text(error)
    try:
        attempts = read_attempts(run)
        attempt, state = current_attempt(attempts, active=active)
    except (MovieNetError, OSError) as error:
        problem = error_text(error)
    at = last or checkpoint or {"epoch": 0, "step": 0}
    config = _config(run)
    waiting = [p for p in segments_to_sync(run, active=active) if not is_synced(p)]
    plot = run / learning_curve.NAME
    return RunStatus(
        run=run,
        state=state,
        attempt=attempt,
        attempts=attempts,
        epoch=at["epoch"],
        epochs=config.training.epochs if config else None,
        step=at["step"],
        validation=best_validation(validations) or (validations[-1] if validations else None),
        checkpoint=checkpoint,
        plot=plot if plot.exists() else None,
        link=next((one.link for one in reversed(attempts) if one.link), None),
        sync=f"`movienet-train sync {shlex.quote(str(run))}`" if waiting else None,
        command=_next(run, state, config),
        problem=problem,
    )


def current_attempt(
    attempts: Sequence[AttemptRecord], *, active: bool
) -> tuple[AttemptRecord, str]:
    """Return the attempt that runs or ended last, and the state of the run.

    An attempt that was refused because another one ran has a higher number, and ended first. A
    finished run stays done after an attempt that ended before training: it changed nothing.
    """
    running = [one for one in attempts if one.outcome == "running"]
    if active and running:
        return running[-1], "running"
    trained = [one for one in attempts if one.outcome == "done" or one.from_step is not None]
    last = _last(trained) if trained else None
    if last is None or last.outcome != "done":
        last = _last(attempts)
    return last, "killed" if last.outcome == "running" else last.outcome


def _last(attempts: Sequence[AttemptRecord]) -> AttemptRecord:
    return max(attempts, key=lambda one: (one.ended or one.started, one.attempt))


def _config(run: Path) -> Config | None:
    with suppress(MovieNetError, OSError):  # not written yet, or by another version
        return load_config(run / "config.yaml")
    return None


def _checkpoint(run: Path) -> dict[str, int] | None:
    folder = current_folder(run / "checkpoints" / "last")
    if folder is None:
        return None
    with report_corrupt(folder, "the run resumes from an earlier one, if there is any"):
        position = json.loads((folder / "state.json").read_text(encoding="utf-8"))["position"]
        return {"epoch": int(position["epoch"]), "step": int(position["step"])}


def _next(run: Path, state: str, config: Config | None) -> str | None:
    """Return the command that continues a run or reports it, quoted for a shell."""
    if state in ("running", "unknown") or config is None:
        return None
    remember_arguments(str(run / "config.yaml"), ())
    moved = config.run_dir.resolve() != run.resolve()
    overrides = _place(run.resolve(), config.limit_folder) if moved else ()
    if overrides is None:
        return None
    return hint("movienet-eval report" if state == "done" else "movienet-train run", *overrides)


def _place(run: Path, limit: str | None) -> tuple[str, ...] | None:
    """Return the overrides that name a folder as that of a run; None if there are none."""
    runs = run.parent
    if limit is not None:
        if runs.name != limit:
            return None
        runs = runs.parent
    return f"data.runs={runs}", f"training.run_name={run.name}"


def _scores(validation: Mapping[str, Any]) -> list[str]:
    """Return the mAP of each split, the holdout first: ``["holdout 0.312", "val 0.286"]``."""
    maps = {name: m for name, m in validation.items() if name.endswith("/map") and m is not None}
    names = sorted(maps, key=lambda name: name != "holdout/map")
    return [f"{name.removesuffix('/map')} {maps[name]:.3f}" for name in names]


def _reason(attempt: AttemptRecord, state: str) -> str:
    if state == "killed":
        return f"no process holds its lock; it was process {attempt.pid} on {attempt.host}"
    return attempt.message


def _attempt_lines(
    attempts: Sequence[AttemptRecord], current: AttemptRecord | None, state: str
) -> Iterator[str]:
    for one in attempts:
        is_killed = one.outcome == "running" and (one is not current or state == "killed")
        outcome = "killed" if is_killed else one.outcome
        steps = f"steps {one.from_step or 0:,} to {'?' if one.step is None else f'{one.step:,}'}"
        yield f"attempt {one.attempt:<4} {outcome:<12} {steps}, {one.started} on {one.host}"
        if outcome in ("failed", "killed", "interrupted"):
            yield from _wrapped(_reason(one, outcome))


def _wrapped(text: str) -> list[str]:
    # A URL or a command is pasted: it stays on one line.
    if "://" in text or "`" in text:
        return [_INDENT + text]
    return textwrap.wrap(text, _COLUMNS, initial_indent=_INDENT, subsequent_indent=_INDENT)
