"""Commands of movienet-encode: list models, fetch weights, plan, run, seal, status, verify."""

from __future__ import annotations

import json
import logging
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from configs.runtime.cli import CommandGroup, echo, run
from configs.runtime.hints import hint

if TYPE_CHECKING:
    from configs.schema import Config, EncoderConfig
    from encoders.clip import Listed

# Not __name__: `python -m encoders` would log as "__main__".
logger = logging.getLogger("encoders.main")

COLUMNS = 80
"""Width of tables on a terminal."""

commands = CommandGroup("movienet-encode", "Encode key frames as features, one row per frame.")

replace_option = click.option(
    "--replace",
    is_flag=True,
    help="Overwrite an existing plan, and encode again the shards that no longer match it.",
)


@click.command("models", epilog="Example: movienet-encode models quickgelu")
@click.argument("part", default="")
@click.option(
    "--weights-dir",
    metavar="DIR",
    help="Folder of fetched weights; default: the cache of the Hugging Face hub.",
)
def models(part: str, weights_dir: str | None) -> None:
    """List OpenCLIP models whose name contains PART, with sizes and tags.

    An asterisk marks tags whose weights are on this machine.
    """
    click.echo("importing OpenCLIP", err=True)  # the slow part of this command
    from encoders.clip import list_models

    echo(f"{'model':<30} {'dim':>5} {'pixels':>7}  tags (*: weights on this machine)")
    for model in list_models(weights_dir):
        if part.lower() in model.name.lower():
            for line in _model_lines(model):
                echo(line)


commands.add_command(models)


def _model_lines(model: Listed) -> Iterator[str]:
    """Yield the row of one model; on a terminal its tags wrap, in a pipe it is one line."""
    tags = " ".join(f"{tag}*" if stored else tag for tag, stored in model.tags.items()) or "-"
    head = f"{model.name:<30} {model.dim:>5} {model.image_size:>7}  "
    if not sys.stdout.isatty():
        yield head + tags
        return
    yield from textwrap.wrap(
        tags,
        COLUMNS,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_on_hyphens=False,
        break_long_words=False,
    )


@commands.command()
def fetch(config: Config) -> None:
    """Download the weights of the encoder; needs internet."""
    logger.info("fetching %s", _encoder_text(config.encoder))
    from encoders.registry import fetch_weights

    fetched = fetch_weights(config.encoder)
    if fetched is not None:
        echo(f"fetched {fetched}")
    else:
        pretrained = f" encoder.pretrained={config.encoder.pretrained or 'null'}"
        weights = "" if config.encoder.is_custom else pretrained
        echo(f"nothing to fetch for encoder.model={config.encoder.model}{weights}")


@commands.command(example="encoder.precision=bf16")
@replace_option
def plan(config: Config, replace: bool) -> None:  # noqa: FBT001  # click passes by name
    """Resolve weights, preprocessing and precision, and store them as plan.json."""
    _stay_offline()
    logger.info("loading %s", _encoder_text(config.encoder))
    from encoders.registry import pick_device
    from encoders.task import open_stage

    stage = open_stage(config, pick_device(config.encoder.device), replace=replace)
    echo(stage.tower.description)
    echo(
        f"shards {stage.plan.n_shards:,}   images {sum(stage.frames.images):,}   "
        f"precision {stage.plan.encoder['precision']}   batch {stage.plan.batch_size}   "
        f"threads {stage.plan.threads}"
    )
    echo(f"wrote {stage.features.location}/plan.json")
    echo(f"next: {hint('movienet-encode run')}")


@commands.command("run", example="--task 0/8")
@click.option(
    "--task", default="0/1", metavar="I/N", help="Encode the I-th of N tasks, from 0; default: 0/1."
)
@click.option(
    "--only",
    multiple=True,
    metavar="NAME",
    help="Encode only this shard, by name or number; may be repeated.",
)
@click.option(
    "--expected-world-size", type=click.IntRange(1), help="Refuse another number of ranks."
)
@replace_option
def encode(
    config: Config,
    task: str,
    only: tuple[str, ...],
    expected_world_size: int | None,
    replace: bool,  # noqa: FBT001
) -> None:
    """Encode the missing shards and seal the complete set.

    Runs as one process, or as several ranks under `accelerate launch` or srun.
    """
    _stay_offline()
    from configs.runtime.signals import StopRequest
    from sharding.assign import parse_task

    parsed_task = parse_task(task)
    logger.info("loading %s", _encoder_text(config.encoder))
    with StopRequest() as stop:  # before the slow imports
        from encoders.task import run_task

        outcome = run_task(
            config,
            task=parsed_task,
            only=only,
            replace=replace,
            stop=stop,
            end_late=True,
            expected_world_size=expected_world_size,
        )
    for line in outcome.encoded.lines():
        echo(line)
    echo(f"skipped {outcome.skipped:,} completed shards")
    if outcome.manifest is not None:
        echo(f"features {config.features_dir}")
        echo(f"digest   {outcome.manifest.digest}")
    else:
        from sharding.format.names import array_list

        echo(f"not complete: shards {array_list(outcome.missing)} are missing")


@commands.command("seal")
def seal_set(config: Config) -> None:
    """Hash every shard, then write index, labels and manifest of the complete set."""
    from encoders.frame_source import open_frame_source
    from encoders.seal import seal, wanted_plan
    from sharding.storage.open import open_storage

    features = open_storage(config.features_dir, config.storage)
    manifest = seal(config, features, wanted_plan(features), open_frame_source(config))
    echo(f"sealed {features.location}: {manifest.movies:,} movies")
    echo(f"digest {manifest.digest}")


@commands.command()
@click.option("--tasks", type=click.IntRange(1), help="Also list the incomplete ones of N tasks.")
def status(config: Config, tasks: int | None) -> int:
    """Show progress of the set and of each task.

    Exit code: 0 if everything is complete, 1 if not.
    """
    from encoders.status import read_status

    report = read_status(config)
    for line in report.lines():
        echo(line)
    if tasks and report.missing:
        from sharding.format.names import array_list

        numbers = report.incomplete_tasks(tasks)
        echo(f"incomplete tasks of {tasks}: --array={array_list(numbers)}")
    return 0 if report.is_complete else 1


@commands.command(example="--repair")
@click.option("--repair", is_flag=True, help="Mark damaged shards as missing; builds nothing.")
def verify(config: Config, repair: bool) -> int:  # noqa: FBT001  # click passes by name
    """Read and hash every byte of a sealed set.

    Exit code: 0 if every byte is intact, 1 if not, also with --repair.
    """
    from encoders.seal import problems_of
    from sharding.format.names import array_list
    from sharding.storage.open import open_storage
    from sharding.verify import mark_missing

    features = open_storage(config.features_dir, config.storage)
    problems = problems_of(config, features)
    for problem in problems:
        echo(problem.text)
    echo(f"{features.location}: {f'{len(problems)} problems' if problems else 'ok'}")
    numbers = mark_missing(features, "features", problems) if repair else ()
    if numbers:
        echo(f"marked {len(numbers)} shards as missing ({array_list(numbers)})")
        echo(f"next: {hint('movienet-encode run')}")
    return 1 if problems else 0


def _encoder_text(config: EncoderConfig) -> str:
    """Return what is about to be loaded, from the configuration alone."""
    if config.is_custom:
        return f"encoder {Path(config.model).name}"
    weights = Path(config.pretrained).name if config.pretrained else "none (untrained)"
    return f"encoder {Path(config.model).name}{_size_text(config.model)}, weights {weights}"


def _size_text(model: str) -> str:
    """Return the length of a feature if a model file contains it, else an empty text.

    A corrupt file is reported later, by the code that builds the tower.
    """
    # RecursionError: deeply nested JSON.
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        tree = json.loads(Path(model).read_bytes())
        return f" ({tree.get('model_cfg', tree)['embed_dim']} values)"
    return ""


def _stay_offline() -> None:
    """Keep the client of the Hugging Face hub off the network; it reads this when imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    return run(commands, argv)


if __name__ == "__main__":
    sys.exit(main())
