"""``movienet-train``: preview, train or resume, export, upload, list the models."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from configs.errors import ConfigError
from configs.runtime.cli import CommandGroup, echo, run

if TYPE_CHECKING:
    from configs.schema import Config

commands = CommandGroup("movienet-train", "Train a genre model on a sealed feature set.")


@commands.command("run")
@click.option(
    "--expected-world-size", type=click.IntRange(1), help="Refuse another number of ranks."
)
def run_training(config: Config, expected_world_size: int | None) -> int:
    """Train, or go on where the run was stopped; alone or under `accelerate launch`."""
    from configs.runtime.signals import StopRequest

    training = config.training
    with StopRequest() as stop:  # before the imports, which take seconds: no signal is missed
        from configs.runtime.launch import start
        from training.loop import train

        distributed = start(
            device=training.device,
            precision=training.precision,
            accumulation=training.grad_accumulation,
            expected_world_size=expected_world_size or training.expected_world_size,
            threads=training.threads,
            compiled=training.compile,
        )
        try:
            at = train(config, distributed, stop)
        finally:
            distributed.close()
    if distributed.world.rank == 0:
        echo(f"{config.run_dir}: {at.epoch} epochs, {at.step} steps; next: `movienet-eval report`")
    return 0


@commands.command("preview")
@click.option("--ranks", default=1, show_default=True, help="Number of ranks to plan for.")
@click.option("--ranks-per-node", type=int, help="Of them on one node; default: all.")
def show_plan(config: Config, ranks: int, ranks_per_node: int | None) -> int:
    """Say what a run would do, without reading features."""
    from training.dry_run import preview

    echo(preview(config, ranks=ranks, ranks_per_node=ranks_per_node))
    return 0


def _of_a_run(function: Callable[..., int]) -> Callable[..., int]:
    """Give a command the folder of a run: RUN itself, or what --config FILE [KEY=VALUE]… names."""

    @click.argument("words", nargs=-1, metavar="RUN | [KEY=VALUE]...")
    @click.option("--config", "config_path", metavar="FILE", help="Find the run by its file.")
    @click.option("--debug", is_flag=True, help="Show tracebacks of expected failures too.")
    @functools.wraps(function)
    def wrapped(
        words: tuple[str, ...],
        config_path: str | None,
        debug: bool,  # noqa: FBT001  # click passes by name
        **options: Any,
    ) -> int:
        from configs.load import load_config
        from configs.runtime.logs import start_logging

        start_logging(debug=debug)
        if config_path is not None:
            run_dir = load_config(Path(config_path), words).run_dir
        elif len(words) == 1:
            run_dir = Path(words[0])
        else:
            got = " ".join(words) or "none"
            raise ConfigError(f"RUN: got {got}, want the folder of a run, or --config FILE")
        if not run_dir.is_dir():
            raise ConfigError(f"RUN: {run_dir} is no folder; want that of a run, or --config FILE")
        return function(run_dir, **options)

    return wrapped


@click.command("export")
@_of_a_run
@click.option("--checkpoint", type=click.Choice(["best", "last"]), help="Default: best if any.")
@click.option("--out", type=click.Path(path_type=Path), help="Default: RUN/RUN.safetensors.")
def export_run(run_dir: Path, checkpoint: Literal["best", "last"] | None, out: Path | None) -> int:
    """Write the trained model as one safetensors file: weights and all that its use must know."""
    from training.checkpoint import find
    from training.export import export

    which = checkpoint or ("best" if find(run_dir, "best") else "last")
    out = out or run_dir / f"{run_dir.resolve().name}.safetensors"
    export(run_dir, which, out)
    echo(f"{out}: checkpoint {which!r}, {out.stat().st_size:,} bytes")
    return 0


@click.command("sync")
@_of_a_run
@click.option("--dry-run", is_flag=True, help="Name the parts, upload nothing.")
def sync_run(run_dir: Path, dry_run: bool) -> int:  # noqa: FBT001  # click passes by name
    """Upload what was tracked offline, attempt by attempt, as one wandb run."""
    from configs.runtime.tracking import is_synced, offline_segments, sync_segment

    parts = [*offline_segments(run_dir), *offline_segments(run_dir / "report")]
    left = [part for part in parts if not is_synced(part)]
    for part in left:
        echo(str(part))
        if not dry_run:
            sync_segment(part)
    echo(f"{run_dir}: {len(left)} of {len(parts)} parts {'to upload' if dry_run else 'uploaded'}")
    return 0


@click.command("models")
@click.option("--dim", default=512, show_default=True, help="Feature size.")
@click.option("--genres", default=21, show_default=True, help="Number of genres.")
@click.option("--frames", default=256, show_default=True, help="Rows of a window.")
def list_models(dim: int, genres: int, frames: int) -> int:
    """List the models that come with the product, their options and sizes."""
    from training.dry_run import describe_models

    echo(describe_models(dim=dim, n_genres=genres, frames=frames))
    return 0


for command in (export_run, sync_run, list_models):
    commands.add_command(command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    return run(commands, argv)


if __name__ == "__main__":
    sys.exit(main())
