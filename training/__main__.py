"""``movienet-train``: preview, train or resume, show, export, upload, and list the models."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from configs.errors import ConfigError, MovieNetError, StateError, error_text
from configs.runtime.cli import CommandGroup, echo, run, want_file
from configs.runtime.hints import hint, remember_arguments

if TYPE_CHECKING:
    from configs.runtime.attempt import Attempt
    from configs.schema import Config
    from training.baselines import Baselines

logger = logging.getLogger(__name__)

commands = CommandGroup("movienet-train", "Train a genre model on a sealed feature set.")


@commands.command("run", example="training.epochs=20 training.run_name=long")
@click.option(
    "--expected-world-size",
    type=click.IntRange(1),
    metavar="RANKS",
    help="Fail unless the launcher started this number of ranks.",
)
def run_training(config: Config, expected_world_size: int | None) -> int:
    """Train or resume a run, alone or under `accelerate launch`."""
    from configs.runtime.signals import StopRequest

    training = config.training
    with StopRequest() as stop:  # before the imports, which take seconds: no signal is lost
        logger.info("%s: %s, loading PyTorch", config.run_dir, hint("movienet-train run"))
        from configs.runtime.attempt import Attempt
        from configs.runtime.launch import start
        from configs.runtime.world import world_from_environment

        attempt, world = None, world_from_environment()
        if world.rank == 0:  # before the ranks meet: the others wait there
            attempt = Attempt.begin(config.run_dir, wait_s=training.lock_wait, stop=stop)
        wait = stop.ending_a_wait(partial(_record_stop, attempt))
        try:
            with wait if world.size > 1 else nullcontext():
                distributed = start(
                    device=training.device,
                    precision=training.precision,
                    accumulation=training.grad_accumulation,
                    expected_world_size=expected_world_size or training.expected_world_size,
                    threads=training.threads,
                    compiled=training.compile,
                )
        except BaseException as error:
            if attempt:
                attempt.finish("failed", None, str(error) or repr(error))
            raise
        try:
            from training.loop import train
            from training.run_summary import summarize

            position = train(config, distributed, stop, attempt)
        finally:
            distributed.close()
    if distributed.world.rank == 0:  # stdout has each result once
        echo(summarize(config, position))
        echo(f"next: {hint('movienet-eval report')}")
    return 0


def _record_stop(attempt: Attempt | None, message: str) -> None:
    if attempt:
        attempt.finish("interrupted", None, message)


@commands.command("preview", example="--ranks 8 --ranks-per-node 4")
@click.option(
    "--ranks", type=click.IntRange(1), default=1, show_default=True, help="Number of ranks."
)
@click.option("--ranks-per-node", type=click.IntRange(1), help="Ranks per node.  [default: all]")
def show_preview(config: Config, ranks: int, ranks_per_node: int | None) -> int:
    """Show steps, reads and memory of a run without reading features."""
    logger.info("preview of %s, loading PyTorch", config.run_dir)
    from training.dry_run import preview

    echo(preview(config, ranks=ranks, ranks_per_node=ranks_per_node))
    return 0


@click.command("status", epilog="Example: movienet-train status RUNS")
@click.argument("words", nargs=-1, metavar="RUN... | [KEY=VALUE]...")
@click.option("--config", "config_path", metavar="FILE", help="Config file that names the run.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array of the runs.")
@click.option("--debug", is_flag=True, help="Log details and show full tracebacks.")
def show_status(
    words: tuple[str, ...], config_path: str | None, *, as_json: bool, debug: bool
) -> int:
    """Show state, progress, best mAP and link of a run, or of all runs in a folder.

    Of one run also draw its learning curve, if that is out of date.

    Exit code: 0 if everything is complete, 1 if not.
    """
    import json

    from configs.load import load_config
    from configs.runtime.logs import start_logging
    from training.learning_curve import write_learning_curve
    from training.status import find_runs, read_status, table

    start_logging(debug=debug)
    folders = [Path(word) for word in words]
    if config_path is not None:
        folders = [load_config(Path(config_path), words).run_dir]
    if not folders:
        raise ConfigError("RUN: got none, want the folder of a run or of runs, or --config FILE")
    runs = find_runs(folders)
    if len(runs) == 1:
        write_learning_curve(runs[0])
    found = [read_status(run) for run in runs]
    if as_json:
        echo(json.dumps([run.as_json() for run in found], indent=2, ensure_ascii=False))
    else:
        for line in found[0].lines() if len(found) == 1 else table(found):
            echo(line)
    return 0 if all(run.state == "done" for run in found) else 1


def _takes_run(function: Callable[..., int]) -> Callable[..., int]:
    """Pass a command the folder of a run, named by RUN or by --config FILE [KEY=VALUE]…."""

    @click.argument("words", nargs=-1, metavar="RUN | [KEY=VALUE]...")
    @click.option("--config", "config_path", metavar="FILE", help="Config file that names the run.")
    @click.option("--debug", is_flag=True, help="Log details and show full tracebacks.")
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
            remember_arguments(config_path, words)
            run_dir = load_config(Path(config_path), words).run_dir
        elif len(words) == 1:
            run_dir = Path(words[0])
            # Hints then point to the configuration that the run was started with.
            remember_arguments(str(run_dir / "config.yaml"), ())
        else:
            got = " ".join(words) or "none"
            raise ConfigError(f"RUN: got {got}, want the folder of a run, or --config FILE")
        if not run_dir.is_dir():
            raise ConfigError(
                f"RUN: got {run_dir}, which is not a folder, want that of a run, or --config FILE"
            )
        return function(run_dir, **options)

    return wrapped


@click.command("export", epilog="Example: movienet-train export RUN --checkpoint last")
@_takes_run
@click.option(
    "--checkpoint", type=click.Choice(["best", "last"]), help="Checkpoint.  [default: best if any]"
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    callback=want_file,
    help="File to write.  [default: RUN/NAME.safetensors]",
)
def export_run(run_dir: Path, checkpoint: Literal["best", "last"] | None, out: Path | None) -> int:
    """Write the trained model to one self-contained safetensors file."""
    if not (run_dir / "config.yaml").is_file():
        raise StateError(f"{run_dir}: no run, want the folder of a run")
    logger.info("export of %s, loading PyTorch", run_dir)
    from training.checkpoint import find
    from training.export import export

    which = checkpoint or ("best" if find(run_dir, "best") else "last")
    out = out or run_dir / f"{run_dir.resolve().name}.safetensors"
    export(run_dir, which, out, _baselines(run_dir, which))
    echo(f"{out}: checkpoint {which!r}, {out.stat().st_size:,} bytes")
    return 0


def _baselines(run_dir: Path, which: Literal["best", "last"]) -> Baselines | None:
    """Fit the baselines of an export; None with a warning where its features cannot be read."""
    from training.baselines import fit_recorded
    from training.checkpoint import load_trained

    trained = load_trained(run_dir, which)
    logger.info("baselines: reading the movies that the run was trained on")
    try:
        return fit_recorded(trained, trained.config.storage)
    except (MovieNetError, OSError) as error:
        logger.warning("exported without baselines: %s", error_text(error))
        return None


@click.command("sync", epilog="Example: movienet-train sync RUN --dry-run")
@_takes_run
@click.option("--dry-run", is_flag=True, help="List the segments, upload nothing.")
def sync_run(run_dir: Path, dry_run: bool) -> int:  # noqa: FBT001  # click passes by name
    """Upload what wandb's server does not have of all runs in a folder, each run as one."""
    from configs.runtime.attempt import is_active
    from configs.runtime.tracking import sync_segment
    from configs.runtime.wandb_files import is_synced, segments_to_sync

    folders = sorted(path.parent for path in run_dir.rglob("wandb") if path.is_dir())
    by_run = [segments_to_sync(folder, active=is_active(folder)) for folder in folders]
    segments = [segment for run in by_run for segment in run]
    newest = {run[-1] for run in by_run if run}
    remaining = [segment for segment in segments if not is_synced(segment)]
    for segment in remaining:
        echo(str(segment))
        if not dry_run:
            sync_segment(segment, is_newest=segment in newest)
    action = "to upload" if dry_run else "uploaded"
    echo(f"{run_dir}: {len(remaining)} of {len(segments)} segments {action}")
    return 0


@click.command("models", epilog="Example: movienet-train models --dim 768 --genres 18")
@click.option("--dim", type=click.IntRange(1), default=512, show_default=True, help="Feature size.")
@click.option(
    "--genres", type=click.IntRange(1), default=21, show_default=True, help="Number of genres."
)
@click.option(
    "--frames", type=click.IntRange(1), default=256, show_default=True, help="Rows per window."
)
def list_models(dim: int, genres: int, frames: int) -> int:
    """List the built-in models with their sizes and options."""
    click.echo("loading PyTorch", err=True)  # the slow part of this command
    from training.dry_run import describe_models

    echo(describe_models(dim=dim, n_genres=genres, frames=frames))
    return 0


for command in (show_status, export_run, sync_run, list_models):
    commands.add_command(command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    return run(commands, argv)


if __name__ == "__main__":
    sys.exit(main())
