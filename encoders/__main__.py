"""Commands of the room: key frames become features."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from configs.cli import Room, echo, run

if TYPE_CHECKING:
    from configs.schema import Config

room = Room("python -m encoders", "Key frames become features, one row a frame.")

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


room.add_command(models)


@room.command()
def fetch(config: Config) -> None:
    """Download the weights of encoder.pretrained; run it where there is internet."""
    from encoders.clip import fetch as download

    path = download(config.encoder)
    echo(f"fetched {path}" if path else f"nothing to fetch for {config.encoder.pretrained!r}")


@room.command()
@replace_option
def plan(config: Config, replace: bool) -> None:  # noqa: FBT001  # click passes by name
    """Resolve encoder, weights, preprocessing and precision, and write them down."""
    _stay_offline()
    from encoders.registry import pick_device
    from encoders.run import open_stage

    stage = open_stage(config, pick_device(config.encoder.device), replace=replace)
    manifest = stage.frames.manifest
    echo(stage.tower.description)
    echo(
        f"shards {stage.plan.n_shards:,}   images {manifest.samples:,}   "
        f"precision {stage.plan.encoder['precision']}   batch {stage.plan.batch_size}   "
        f"threads {stage.plan.threads}"
    )
    echo(f"wrote {stage.features.location}/plan.json; next: `python -m encoders run`")


@room.command("run")
@click.option("--share", default="0/1", metavar="I/N", help="The I-th of N shares, from 0.")
@replace_option
def encode(config: Config, share: str, replace: bool) -> None:  # noqa: FBT001
    """Encode what is missing; alone, or under `accelerate launch` on several devices."""
    _stay_offline()
    from encoders.run import run_task
    from sharding.deal import parse_share
    from sharding.forms import array_list

    outcome = run_task(config, share=parse_share(share), replace=replace)
    echo(f"{outcome.encoded.line()}   skipped shards {outcome.skipped:,}")
    if outcome.manifest is not None:
        echo(f"features {outcome.manifest.digest}   {config.features_dir}")
    else:
        echo(f"not complete: shards {array_list(outcome.missing)} are missing")


@room.command("seal")
def seal_set(config: Config) -> None:
    """Hash every shard, and write index, labels and manifest of a complete set."""
    from encoders.seal import seal, wanted_plan
    from sharding.frames import open_frames
    from sharding.storage import open_storage

    features = open_storage(config.features_dir, config.storage)
    frames = open_frames(config.frames_dir, config.storage)
    manifest = seal(config, features, wanted_plan(features), frames)
    echo(f"sealed {features.location}   movies {manifest.movies:,}   data {manifest.digest}")


@room.command()
def status(config: Config) -> int:
    """Say how much is done; exit code 1 while something is missing."""
    from encoders.seal import missing_shards, wanted_plan
    from sharding.forms import array_list
    from sharding.frames import open_frames
    from sharding.shard import MANIFEST
    from sharding.storage import open_storage

    features = open_storage(config.features_dir, config.storage)
    wanted = wanted_plan(features)
    missing = missing_shards(
        features, wanted, open_frames(config.frames_dir, config.storage), replace=True
    )
    done = wanted.n_shards - len(missing)
    sealed = "sealed" if features.size(MANIFEST) is not None else "not sealed"
    echo(f"{features.location}   shards {done:,} of {wanted.n_shards:,} done   {sealed}")
    if missing:
        echo(f"missing: --array={array_list(missing)}")
    return 1 if missing else 0


def _stay_offline() -> None:
    """Keep the hub's client off the network; it reads this when it is imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    return run(room, argv)


if __name__ == "__main__":
    sys.exit(main())
