"""``movienet-eval``: score and report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from configs.runtime.cli import CommandGroup, echo, run

if TYPE_CHECKING:
    from configs.schema import Config

commands = CommandGroup("movienet-eval", "What a trained model is worth.")


@commands.command()
def report(config: Config) -> None:
    """Score a run on eval.split and write RUN/report: JSON, Markdown, page and plot."""
    from configs.runtime.tracking import offline_segments, upload_report
    from eval.evaluate import evaluate
    from eval.render import render_table, write_report

    made = evaluate(config)
    paths = write_report(config.run_dir / "report", made)
    echo(render_table(made))
    echo(f"report: {paths['report.html']}")
    if config.tracking.upload == "report":
        upload_report(config, tuple(paths.values()))
    for part in offline_segments(config.run_dir):
        echo(f"wandb, offline: wandb leet inspect --summary {part}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    return run(commands, argv)


if __name__ == "__main__":
    sys.exit(main())
