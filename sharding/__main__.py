"""Commands of the room: from a dump, or from ready-made arrays, to published shards."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from configs.runtime.cli import CommandGroup, echo, run

if TYPE_CHECKING:
    from configs.schema import Config
    from sharding.format.manifest import Manifest
    from sharding.format.plan import Plan
    from sharding.storage.base import Storage

commands = CommandGroup(
    "movienet-shard", "Key frames of films, or ready-made features, into shards."
)


@commands.command()
@click.option("--seed", default=0, show_default=True, help="Another seed, another dump.")
def demo(config: Config, seed: int) -> None:
    """Write the mini dump where data.dump says."""
    from pathlib import Path

    from configs.errors import ConfigError
    from sharding.demo import FRAMES, make_demo
    from sharding.dump.scan import dump_of

    dump = dump_of(config)
    if not isinstance(dump, Path) or dump.name != FRAMES:
        raise ConfigError(
            f"data.dump: got {dump or 'null'}, want a folder {FRAMES} for the mini dump"
        )
    out = dump.parent
    make_demo(out, seed=seed)
    echo(f"mini dump in {out}; next: `movienet-shard build`")


@commands.command()
@click.option("--decode", is_flag=True, help="Also read and decode every image.")
def check(config: Config, *, decode: bool) -> int:
    """Say what is wrong with dump, metadata and split; exit code 0 clean, 3 usable, 4 unusable."""
    from sharding.check import CHECK, check_dump, publish_report
    from sharding.check_report import render_table
    from sharding.storage.open import open_storage

    storage = open_storage(config.root, config.storage)
    cache = open_storage(config.frames_dir, config.storage)
    report = check_dump(config, decode=decode, cache=cache)
    publish_report(storage, report)
    echo(render_table(report))
    echo(f"every name stands in {storage.location}/{CHECK}")
    return report.exit_code


@commands.command()
@click.option("--replace", is_flag=True, help="Replace a plan that differs.")
@click.option("--extend", is_flag=True, help="Add new movies to a sealed set as a part.")
def plan(config: Config, *, replace: bool, extend: bool) -> None:
    """Scan the dump and write the plan of its frame shards."""
    from configs.errors import ConfigError
    from sharding.build import extend_published, plan_dump, publish_plan
    from sharding.frames import read_plan
    from sharding.storage.open import open_storage

    if replace and extend:
        raise ConfigError("plan: got --replace and --extend, want one of them")
    storage = open_storage(config.frames_dir, config.storage)
    if extend:
        made, written = extend_published(storage, config)
    else:
        made = plan_dump(config, storage)
        written = publish_plan(storage, made, replace=replace)
        made = read_plan(storage) or made
    echo(_describe(made))
    echo(_space(storage, made))
    verb = "wrote" if written else "unchanged:"
    echo(f"{verb} {storage.location}/plan.json; next: `movienet-shard build`")


@commands.command()
@click.option("--task", default="0/1", help="I/N: this share of the shards, I from 0 to N-1.")
@click.option("--only", multiple=True, metavar="NAME", help="Only this shard, by name or number.")
@click.option("--replace", is_flag=True, help="Build shards again that were made from other input.")
def build(config: Config, task: str, only: tuple[str, ...], *, replace: bool) -> None:
    """Build the frame shards: plan if there is no plan, build, seal if complete."""
    from sharding.assign import parse_task
    from sharding.build import build_shards, choose_shards, plan_for_build, tracked
    from sharding.dump.scan import dump_of
    from sharding.seal import missing_frames, seal_frames
    from sharding.storage.open import open_storage

    mine = parse_task(task)
    storage = open_storage(config.frames_dir, config.storage)
    planned = plan_for_build(storage, config)
    numbers = choose_shards(planned, task=mine, only=only)
    bad = config.sharding.max_bad_fraction
    with tracked(config, task) as on_figures:
        build_shards(
            storage,
            dump_of(config),
            planned,
            numbers,
            max_bad_fraction=bad,
            replace=replace,
            workers=config.sharding.workers,
            config=config.storage,
            on_figures=on_figures,
        )
    whole = numbers == tuple(range(len(planned.shards)))
    missing = [] if whole else missing_frames(storage, planned)
    if missing:
        echo(f"shards {len(planned.shards) - len(missing):,} of {len(planned.shards):,} done")
        return
    echo(_sealed(seal_frames(storage, max_bad_fraction=bad)))


@commands.command()
def seal(config: Config) -> None:
    """Write the manifest of a complete frame set."""
    from sharding.seal import seal_frames
    from sharding.storage.open import open_storage

    storage = open_storage(config.frames_dir, config.storage)
    echo(_sealed(seal_frames(storage, max_bad_fraction=config.sharding.max_bad_fraction)))


@commands.command()
def status(config: Config) -> int:
    """Show how much is done; exit code 0 once the frame set is complete and sealed."""
    from configs.errors import DataError
    from sharding.format.names import MANIFEST, array_list
    from sharding.frames import read_plan
    from sharding.seal import missing_frames
    from sharding.storage.open import open_storage

    storage = open_storage(config.frames_dir, config.storage)
    planned = read_plan(storage)
    if planned is None:
        raise DataError(f"{storage.location}: no plan yet; run `movienet-shard plan`")
    missing = missing_frames(storage, planned, replace=True)
    echo(_describe(planned))
    is_sealed = storage.size(MANIFEST) is not None
    sealed = "sealed" if is_sealed else "not sealed"
    done = len(planned.shards) - len(missing)
    rest = f"   missing --array={array_list(missing)}" if missing else ""
    echo(f"shards {done:,} of {len(planned.shards):,} done   {sealed}   {storage.location}{rest}")
    return 0 if is_sealed and not missing else 1


@commands.command()
@click.option("--features", metavar="DIR", help="Verify this feature set, not the frames.")
@click.option("--repair", is_flag=True, help="Mark damaged shards as missing.")
def verify(config: Config, features: str | None, *, repair: bool) -> int:
    """Read a sealed set from end to end; exit code 1 if anything is wrong, repaired or not."""
    from configs.runtime.progress import progress
    from sharding.format.names import array_list
    from sharding.storage.open import open_storage
    from sharding.verify import mark_missing, verify_features, verify_frames

    storage = open_storage(features or config.frames_dir, config.storage)
    check = verify_features if features else verify_frames
    workers = config.sharding.workers

    with progress(None, label="verify", unit="shards") as bar:
        problems = check(storage, workers=workers, config=config.storage, on_shard=bar.advance)
    for problem in problems:
        echo(problem.text)
    echo(f"{storage.location}: {f'{len(problems)} problems' if problems else 'ok'}")
    numbers = (
        mark_missing(storage, "features" if features else "frames", problems) if repair else ()
    )
    if numbers:
        command = (
            "`movienet-encode run` or `movienet-shard import-features`, whichever made the set"
            if features
            else "`movienet-shard build`"
        )
        echo(f"marked {len(numbers)} shards as missing ({array_list(numbers)}); next: {command}")
    return 1 if problems else 0


@commands.command()
@click.option("--features", metavar="DIR", help="A sealed feature set; default: the config's own.")
@click.option("--labels", metavar="PATH", help="Instead of data.metadata.")
@click.option("--split", metavar="FILE", help="Instead of data.split.")
def relabel(config: Config, features: str | None, labels: str | None, split: str | None) -> None:
    """Write new genres and splits beside a sealed feature set; no tar is touched."""
    from sharding.label_files import relabel as write_labels
    from sharding.storage.open import open_storage

    update = {"metadata": labels or config.data.metadata, "split": split or config.data.split}
    storage = open_storage(features or config.features_dir, config.storage)
    made = write_labels(storage, config.data.model_copy(update=update))
    counts = "   ".join(
        f"{name or 'in none'} {int((made.split_M == name).sum()):,}"
        for name in ("train", "val", "test", "")
    )
    echo(f"{counts}   labels {made.digest[:12]}   {storage.location}/labels.npz")


@commands.command("import-features")
@click.option("--replace", is_flag=True, help="Replace shards that were made from other input.")
def import_features(config: Config, *, replace: bool) -> None:
    """Take ready-made arrays, one a movie, as a feature set."""
    from sharding.import_arrays import import_features as take

    for line in take(config, replace=replace).lines():
        echo(line)


@commands.command("index-tars")
def index(config: Config) -> None:
    """Index feature tars that others wrote, where they lie, as a feature set."""
    from sharding.index_tars import index_tars, publish_index
    from sharding.storage.open import open_storage

    indexed = index_tars(config)
    storage = open_storage(config.features_dir, config.storage)
    publish_index(storage, indexed)
    echo(indexed.text)
    echo(f"wrote {storage.location}; next: `movienet-train run`")


def _describe(plan: Plan) -> str:
    from configs.units import format_bytes

    sizes = [sum(movie.n_bytes for movie in shard) for shard in plan.shards]
    images = sum(movie.images or 0 for movie in plan.movies)
    return (
        f"movies {len(plan.movies):,}   images {images:,}   bytes {format_bytes(sum(sizes))}   "
        f"shards {len(sizes):,}   largest {format_bytes(max(sizes, default=0))}"
    )


def _space(storage: Storage, plan: Plan) -> str:
    from sharding.frame_space import needed
    from sharding.seal import missing_frames

    missing = set(missing_frames(storage, plan, replace=True))
    want = needed(movie for movie in plan.movies if movie.shard in missing)
    space = storage.space()
    quota = f"   quota {space.quota}" if space.quota else ""
    return f"space needed {want}   free {space.free}{quota}"


def _sealed(manifest: Manifest) -> str:
    from configs.units import format_bytes

    return (
        f"sealed: movies {manifest.movies:,}   images {manifest.samples:,}   "
        f"shards {len(manifest.shards):,}   {format_bytes(manifest.n_bytes)}   "
        f"data {manifest.digest[:12]}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    return run(commands, argv)


if __name__ == "__main__":
    sys.exit(main())
