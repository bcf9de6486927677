"""Commands of the room: key frames become features."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from configs.runtime.cli import CommandGroup, echo, run

if TYPE_CHECKING:
    from configs.schema import Config

commands = CommandGroup("movienet-encode", "Key frames become features, one row a frame.")

replace_option = click.option(
    "--replace", is_flag=True, help="Plan anew, and encode again what was made otherwise."
)


@click.command("models")
@click.argument("part", default="")
@click.option("--weights-dir", metavar="DIR", help="Where to look; default: the hub's cache.")
def models(part: str, weights_dir: str | None) -> None:
    """List OpenCLIP's models whose name contains PART: feature size, image size, tags.

    A tag with a star has its weights on this machine.
    """
    from encoders.clip import list_models

    echo(f"{'model':<40} {'dim':>5} {'pixels':>8}  tags (* the weights are here)")
    for model in list_models(weights_dir):
        if part.lower() in model.name.lower():
            tags = " ".join(f"{tag}*" if here else tag for tag, here in model.tags.items())
            echo(f"{model.name:<40} {model.dim:>5} {model.image_size:>8}  {tags or '-'}")


commands.add_command(models)


@commands.command()
def fetch(config: Config) -> None:
    """Download the weights of the encoder; run it where there is internet."""
    from encoders.registry import fetch_weights

    fetched = fetch_weights(config.encoder)
    if fetched is not None:
        echo(f"fetched {fetched}")
    else:
        echo(
            f"nothing to fetch for encoder.model={config.encoder.model} "
            f"encoder.pretrained={config.encoder.pretrained or 'null'}"
        )


@commands.command()
@replace_option
def plan(config: Config, replace: bool) -> None:  # noqa: FBT001  # click passes by name
    """Resolve encoder, weights, preprocessing and precision, and write them down."""
    _stay_offline()
    from encoders.registry import pick_device
    from encoders.task import open_stage

    stage = open_stage(config, pick_device(config.encoder.device), replace=replace)
    echo(stage.tower.description)
    echo(
        f"shards {stage.plan.n_shards:,}   images {sum(stage.frames.images):,}   "
        f"precision {stage.plan.encoder['precision']}   batch {stage.plan.batch_size}   "
        f"threads {stage.plan.threads}"
    )
    echo(f"wrote {stage.features.location}/plan.json; next: `movienet-encode run`")


@commands.command("run")
@click.option("--task", default="0/1", metavar="I/N", help="The I-th of N shares, from 0.")
@click.option("--only", multiple=True, metavar="NAME", help="Only this shard, by name or number.")
@replace_option
def encode(config: Config, task: str, only: tuple[str, ...], replace: bool) -> None:  # noqa: FBT001
    """Encode what is missing; alone, or under `accelerate launch` on several devices."""
    _stay_offline()
    from configs.runtime.signals import StopRequest
    from sharding.assign import parse_task

    mine = parse_task(task)
    with StopRequest() as stop:  # before the slow imports
        from encoders.task import run_task

        outcome = run_task(config, task=mine, only=only, replace=replace, stop=stop, end_late=True)
    echo(f"{outcome.encoded.line()}   skipped shards {outcome.skipped:,}")
    if outcome.manifest is not None:
        echo(f"features {outcome.manifest.digest}   {config.features_dir}")
    else:
        from sharding.format.names import array_list

        echo(f"not complete: shards {array_list(outcome.missing)} are missing")


@commands.command("seal")
def seal_set(config: Config) -> None:
    """Hash every shard, and write index, labels and manifest of a complete set."""
    from encoders.frame_source import open_frame_source
    from encoders.seal import seal, wanted_plan
    from sharding.storage.open import open_storage

    features = open_storage(config.features_dir, config.storage)
    manifest = seal(config, features, wanted_plan(features), open_frame_source(config))
    echo(f"sealed {features.location}   movies {manifest.movies:,}   data {manifest.digest}")


@commands.command()
def status(config: Config) -> int:
    """Show how much is done, also by task; exit code 0 once the set is complete and sealed."""
    from encoders.status import read_status

    found = read_status(config)
    for line in found.lines():
        echo(line)
    return 0 if found.is_complete else 1


@commands.command()
@click.option("--repair", is_flag=True, help="Mark damaged shards as missing.")
def verify(config: Config, repair: bool) -> int:  # noqa: FBT001  # click passes by name
    """Read the sealed set from end to end; exit code 1 if anything is wrong, repaired or not."""
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
        echo(
            f"marked {len(numbers)} shards as missing ({array_list(numbers)}); next: "
            "`movienet-encode run`"
        )
    return 1 if problems else 0


def _stay_offline() -> None:
    """Keep the hub's client off the network; it reads this when it is imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    return run(commands, argv)


if __name__ == "__main__":
    sys.exit(main())
