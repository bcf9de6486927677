"""``python -m training``: preview, train or resume, list the models."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from configs.cli import Room, echo, run

if TYPE_CHECKING:
    from configs.schema import Config

room = Room("python -m training", "Train a genre model on a sealed feature set.")


@room.command("run")
@click.option("--expect-world", type=click.IntRange(1), help="Refuse another number of ranks.")
def run_training(config: Config, expect_world: int | None) -> int:
    """Train, or go on where the run was stopped; alone or under `accelerate launch`."""
    from configs.signals import StopRequest

    training = config.training
    with StopRequest() as stop:  # before the imports, which take seconds: no signal is missed
        from configs.launch import start
        from training.loop import train

        launch = start(
            device=training.device,
            precision=training.precision,
            accumulation=training.accumulation,
            expect_world=expect_world or training.expect_world,
            threads=training.threads,
            compiled=training.compile,
        )
        try:
            at = train(config, launch, stop)
        finally:
            launch.close()
    if launch.world.rank == 0:
        echo(f"{config.run_dir}: {at.epoch} epochs, {at.step} steps; next: `python -m eval report`")
    return 0


@room.command("plan")
@click.option("--ranks", default=1, show_default=True, help="Number of ranks to plan for.")
@click.option("--ranks-per-node", type=int, help="Of them on one node; default: all.")
def show_plan(config: Config, ranks: int, ranks_per_node: int | None) -> int:
    """Say what a run would do, without reading features."""
    from training.preview import preview

    echo(preview(config, ranks=ranks, ranks_per_node=ranks_per_node))
    return 0


@click.command("models")
@click.option("--dim", default=512, show_default=True, help="Feature size.")
@click.option("--genres", default=21, show_default=True, help="Number of genres.")
@click.option("--frames", default=256, show_default=True, help="Rows of a window.")
def list_models(dim: int, genres: int, frames: int) -> int:
    """List the models that come with the product, their options and sizes."""
    from training.preview import describe_models

    echo(describe_models(dim=dim, n_genres=genres, frames=frames))
    return 0


room.add_command(list_models)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    return run(room, argv)


if __name__ == "__main__":
    sys.exit(main())
