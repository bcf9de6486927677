"""Summary of a finished run, read from its ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from training.metrics_file import read_metrics

if TYPE_CHECKING:
    from configs.schema import Config
    from training.checkpoint import Position

_WIDTH = 18
"""Columns per value of the table."""


def summarize(config: Config, position: Position) -> str:
    """Return the closing lines of a run: folder, progress, best and last mAP of each split.

    Raises:
        StateError: ``metrics.jsonl`` is corrupt.
    """
    head = f"{config.run_dir}: {position.epoch} epochs, {position.step:,} steps"
    records = read_metrics(config.run_dir / "metrics.jsonl")
    validations = [record for record in records if record["kind"] == "validation"]
    return "\n".join([head, *_table(validations, config.training.monitor_split)])


def best_validation(validations: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the validation with the best holdout mAP; None without a holdout."""
    scored = [record for record in validations if record.get("holdout/map") is not None]
    # Ties go to the later validation, as for the checkpoint ``best``.
    return max(reversed(scored), key=lambda record: float(record["holdout/map"]), default=None)


def _table(validations: Sequence[Mapping[str, Any]], monitored: str | None) -> list[str]:
    """Return the mAP table, with a column of the best checkpoint if there is a holdout."""
    if not validations:
        return []
    columns = [("last", validations[-1])]
    if (best := best_validation(validations)) is not None:
        columns.insert(0, ("best", best))
    titles = [f"{name} (epoch {record['epoch']})" for name, record in columns]
    lines = ["mAP".ljust(_WIDTH) + "".join(title.rjust(_WIDTH) for title in titles)]
    for split in ("holdout", monitored):
        values = [record.get(f"{split}/map") for _, record in columns]
        if any(value is not None for value in values):
            lines.append(f"{split:<{_WIDTH}}" + "".join(map(_cell, values)))
    return lines if len(lines) > 1 else []


def _cell(value: float | None) -> str:
    return ("" if value is None else f"{value:.3f}").rjust(_WIDTH)
