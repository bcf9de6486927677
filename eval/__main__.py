"""``movienet-eval``: score and report, and search by text."""

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

commands = CommandGroup("movienet-eval", "Evaluate a trained model, and search shots by text.")
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

    The report is report.html, report.md, report.json and pictures, with the predictions in
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


@commands.command(example='"a car chase at night" --top 50')
@click.argument("query")
@click.option(
    "--top", default=20, show_default=True, type=click.IntRange(1, 10_000), help="Shots to list."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Folder of the page.  [default: RUNS/search/QUERY]",
)
@click.option("--no-stills", is_flag=True, help="Draw the page without pictures.")
def search(config: Config, query: str, top: int, out: Path | None, *, no_stills: bool) -> None:
    """List the shots that are most similar to a text, over all films of a feature set.

    The features must be those of an OpenCLIP model whose weights are on this machine. The page
    search.html shows a still of each shot, if the frame shards are stored; search.json contains
    the same data.
    """
    from eval.search_forms import render_table, search_folder, write_search
    from eval.text_search import search_text

    result = search_text(config, query, top=top, with_stills=not no_stills)
    paths = write_search(out or search_folder(config.run_dir.parent, query), result)
    echo(render_table(result))
    echo()
    echo(f"page: {paths['search.html']}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    return run(commands, argv)


if __name__ == "__main__":
    sys.exit(main())
