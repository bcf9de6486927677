"""``movienet-eval``: score and report."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from configs.runtime.cli import CommandGroup, echo, run

if TYPE_CHECKING:
    from configs.schema import Config

commands = CommandGroup("movienet-eval", "Evaluate a trained model.")
logger = logging.getLogger("eval")


@commands.command(example="eval.split=test")
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Export file, run or checkpoint folder.  [default: the run of the configuration]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Folder of the report.  [default: RUN/report/SPLIT, or NAME-report/SPLIT next to PATH]",
)
def report(config: Config, model: Path | None, out: Path | None) -> None:
    """Score a model on eval.split and write its report.

    The report is report.html, report.md, report.json and ap.png, with the predictions in
    predictions.csv and predictions.npz. The model is that of training.run_name, by its checkpoint
    eval.checkpoint. Alone or under `accelerate launch`.
    """
    # The imports below take seconds.
    logger.info("report: checkpoint %s of %s", config.eval.checkpoint, model or config.run_dir)
    from configs.runtime.tracking import offline_segments, upload_report
    from eval.evaluate import evaluate
    from eval.model import report_dir
    from eval.predictions import write_predictions
    from eval.render import render_table, write_report

    result = evaluate(config, model)
    if result is None:  # rank 0 writes the report
        return
    folder = out or report_dir(model or config.run_dir, config.eval.split)
    # The report contains the digest of the predictions.
    paths = write_predictions(folder, result.predictions) | write_report(folder, result.report)
    echo(render_table(result.report))
    echo(f"report: {paths['report.html']}")
    if config.tracking.upload == "report":
        upload_report(config, folder, tuple(paths.values()))
    for segment in offline_segments(config.run_dir):
        echo(f"wandb, offline: wandb leet inspect --summary {segment}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    return run(commands, argv)


if __name__ == "__main__":
    sys.exit(main())
