"""``movienet-eval``: score and report."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from configs.runtime.cli import CommandGroup, echo, run

if TYPE_CHECKING:
    from configs.schema import Config

commands = CommandGroup("movienet-eval", "Evaluate a trained model.")
logger = logging.getLogger("eval")


@commands.command(example="eval.split=test")
def report(config: Config) -> None:
    """Score a run on eval.split and write its report.

    RUN/report then contains report.json, report.md, report.html and ap.png. The model is that of
    training.run_name, by its checkpoint eval.checkpoint.
    """
    # The imports below take seconds.
    logger.info("report: checkpoint %s of %s", config.eval.checkpoint, config.run_dir)
    from configs.runtime.tracking import offline_segments, upload_report
    from eval.evaluate import evaluate
    from eval.render import render_table, write_report

    result = evaluate(config)
    paths = write_report(config.run_dir / "report", result)
    echo(render_table(result))
    echo(f"report: {paths['report.html']}")
    if config.tracking.upload == "report":
        upload_report(config, tuple(paths.values()))
    for segment in offline_segments(config.run_dir):
        echo(f"wandb, offline: wandb leet inspect --summary {segment}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    return run(commands, argv)


if __name__ == "__main__":
    sys.exit(main())
