"""Commands of sharding: from a dump, or from existing arrays, to published shards."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from configs.runtime.cli import CommandGroup, echo, run
from configs.runtime.hints import hint

if TYPE_CHECKING:
    from configs.schema import Config
    from sharding.format.manifest import Manifest
    from sharding.format.plan import Plan
    from sharding.storage.base import Storage

commands = CommandGroup("movienet-shard", "Build shards from key frames or existing features.")


@commands.command(example="--seed 1")
@click.option("--seed", default=0, show_default=True, help="Seed of the random content.")
def demo(config: Config, seed: int) -> None:
    """Write the mini dump to data.dump."""
    from pathlib import Path

    from configs.errors import ConfigError
    from sharding.demo import FRAMES, make_demo
    from sharding.dump.scan import dump_of

    dump = dump_of(config)
    if not isinstance(dump, Path) or dump.name != FRAMES:
        raise ConfigError(
            f"data.dump: got {dump or 'null'}, want a folder named {FRAMES} for the mini dump"
        )
    out = dump.parent
    make_demo(out, seed=seed)
    echo(f"mini dump in {out}")
    echo(f"next: {hint('movienet-shard build')}")


@commands.command(example="--decode")
@click.option("--decode", is_flag=True, help="Also read and decode every image.")
def check(config: Config, *, decode: bool) -> int:
    """Report defects of a dump, its metadata and split.

    Exit code: 0 if clean, 3 if usable, 4 if unusable.
    """
    from sharding.check import CHECK, check_dump, publish_report
    from sharding.check_report import render_table
    from sharding.storage.open import open_storage

    storage = open_storage(config.root, config.storage)
    cache = open_storage(config.frames_dir, config.storage)
    report = check_dump(config, decode=decode, cache=cache)
    publish_report(storage, report)
    echo(render_table(report))
    echo(f"all names: {storage.location}/{CHECK}")
    if not report.unusable:
        command = _after_check(config, cache, report.stops)
        echo(f"next: {_without(command, config, report.stops, f'{storage.location}/{CHECK}')}")
    return report.exit_code


def _after_check(config: Config, frames: Storage, stops: Sequence[str]) -> str:
    """Return the command that builds without these movies, or first removes them from the plan."""
    from configs.errors import DataError
    from sharding.frames import frame_commands, read_plan
    from sharding.plan import excluded_movies

    try:
        planned = read_plan(frames)
    except DataError:  # a corrupt plan is not a defect of the dump; the build names it
        planned = None
    if planned is not None and excluded_movies(planned, [*config.data.exclude, *stops]):
        return "movienet-shard plan --replace"
    return frame_commands(config)[0]


def _without(command: str, config: Config, movies: Sequence[str], report: str) -> str:
    """Return a suggested command that excludes these movies too, or where they are listed."""
    from sharding.plan import MAX_NAMED, exclude_override

    excluded = [*config.data.exclude, *movies]
    if not movies:
        return hint(command)
    if len(excluded) > MAX_NAMED:
        listed = f'the movies of "stops" in {report}'
        return f"repair {listed} or add them to data.exclude, then {hint(command)}"
    return hint(command, exclude_override(excluded))


@commands.command(example="--extend")
@click.option("--replace", is_flag=True, help="Replace an existing plan that differs.")
@click.option("--extend", is_flag=True, help="Add new movies to a sealed frame set.")
def plan(config: Config, *, replace: bool, extend: bool) -> None:
    """Scan the dump and write the plan of its frame shards."""
    from configs.errors import ConfigError
    from sharding.build import extend_published, plan_dump, publish_plan
    from sharding.frames import frame_commands, open_records, read_plan
    from sharding.shard import files_beyond
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
    echo(_space(config, storage, made))
    echo(f"{'wrote' if written else 'unchanged:'} {storage.location}/plan.json")
    # Existing shards follow the old plan; --replace keeps those that are equal in both.
    is_other = replace and written and files_beyond(open_records(config), 0)
    echo(f"next: {hint(frame_commands(config)[0] + (' --replace' if is_other else ''))}")


@commands.command(example="--task 0/8 sharding.workers=4")
@click.option("--task", default="0/1", metavar="I/N", help="Task I of N, counted from 0.")
@click.option("--only", multiple=True, metavar="NAME", help="Only this shard, by name or number.")
@click.option("--replace", is_flag=True, help="Rebuild shards whose source or options changed.")
def build(config: Config, task: str, only: tuple[str, ...], *, replace: bool) -> None:
    """Build the frame shards.

    Makes the plan if there is none, and seals the set once it is complete.
    """
    from configs.runtime.signals import StopRequest

    with StopRequest() as stop:  # before the slow imports
        from sharding.assign import parse_task
        from sharding.task import run_task

        outcome = run_task(config, task=parse_task(task), only=only, replace=replace, stop=stop)
    if outcome.manifest is not None:
        echo(_sealed(outcome.manifest))
    else:
        done = outcome.n_shards - len(outcome.missing)
        echo(f"shards {done:,} of {outcome.n_shards:,} done")


@commands.command()
def seal(config: Config) -> None:
    """Write the manifest of a complete frame set."""
    from sharding.frames import frame_commands
    from sharding.seal import seal_frames
    from sharding.storage.open import open_storage

    storage = open_storage(config.frames_dir, config.storage)
    _require_stored(config, storage, frame_commands(config)[1])
    echo(_sealed(seal_frames(storage, max_bad_fraction=config.sharding.max_bad_fraction)))


@commands.command()
@click.option("--tasks", type=click.IntRange(1), help="Also list the incomplete ones of N tasks.")
def status(config: Config, tasks: int | None) -> int:
    """Show how much of the frame set is built.

    Exit code: 0 if everything is complete, 1 if not.
    """
    from configs.errors import DataError
    from sharding.assign import incomplete_tasks
    from sharding.build import shard_costs
    from sharding.format.names import MANIFEST, array_list
    from sharding.frames import frame_commands, open_records, read_plan
    from sharding.storage.open import open_storage

    storage = open_storage(config.frames_dir, config.storage)
    planned = read_plan(storage)
    if planned is None:
        raise DataError(f"{storage.location}: no plan yet; run {hint('movienet-shard plan')}")
    records = open_records(config)
    missing = _missing(config, records, planned)
    is_sealed = records.size(MANIFEST) is not None
    echo(_describe(planned))
    echo(_progress(planned, missing, frame_commands(config), is_sealed=is_sealed))
    echo(records.location)
    if tasks and missing:
        numbers = incomplete_tasks(shard_costs(planned), tasks, missing)
        echo(f"incomplete tasks of {tasks}: --array={array_list(numbers)}")
    return 0 if is_sealed and not missing else 1


@commands.command(example="--repair")
@click.option("--features", metavar="DIR", help="Verify this feature set, not the frames.")
@click.option("--repair", is_flag=True, help="Mark damaged shards as missing; builds nothing.")
def verify(config: Config, features: str | None, *, repair: bool) -> int:
    """Read a sealed set completely and report damage.

    Exit code: 0 if every byte is intact, 1 if not, also with --repair.
    """
    from configs.runtime.progress import progress
    from sharding.format.names import array_list
    from sharding.storage.open import open_storage
    from sharding.verify import mark_missing, sealed_shards, verify_features, verify_frames

    storage = open_storage(features or config.frames_dir, config.storage)
    check = verify_features if features else verify_frames
    workers = config.sharding.workers
    if not features:
        _require_stored(config, storage, "movienet-encode verify")

    with progress(sealed_shards(storage), label="verify", unit="shards") as bar:
        problems = check(storage, workers=workers, config=config.storage, on_shard=bar.advance)
    for problem in problems:
        echo(problem.text)
    echo(f"{storage.location}: {f'{len(problems)} problems' if problems else 'ok'}")
    numbers = (
        mark_missing(storage, "features" if features else "frames", problems) if repair else ()
    )
    if numbers:
        command = (
            f"{hint('movienet-encode run')} or, for imported arrays, "
            f"{hint('movienet-shard import-features')}"
            if features
            else hint("movienet-shard build")
        )
        echo(f"marked {len(numbers)} shards as missing ({array_list(numbers)}); next: {command}")
    return 1 if problems else 0


@commands.command(example="--split fold:2/5")
@click.option("--features", metavar="DIR", help="Sealed feature set; default: the config's own.")
@click.option("--labels", metavar="PATH", help="Genres; default: data.metadata.")
@click.option("--split", metavar="FILE", help="Split file or fold:K/N; default: data.split.")
def relabel(config: Config, features: str | None, labels: str | None, split: str | None) -> None:
    """Rewrite the labels of a sealed feature set.

    The tars stay unchanged.
    """
    from configs.locations import require_local
    from sharding.label_files import relabel as write_labels
    from sharding.storage.open import open_storage

    for option, path in (("--labels", labels), ("--split", split)):
        require_local(option, path or "")
    update = {"metadata": labels or config.data.metadata, "split": split or config.data.split}
    storage = open_storage(features or config.features_dir, config.storage)
    made = write_labels(storage, config.data.model_copy(update=update))
    counts = "   ".join(
        f"{name or 'in no split'} {int((made.split_M == name).sum()):,}"
        for name in ("train", "val", "test", "")
    )
    echo(f"{counts}   labels {made.digest[:12]}")
    echo(f"wrote {storage.location}/labels.npz")


@commands.command("import-features", example="data.feature_arrays=arrays encoder.name=clip")
@click.option("--replace", is_flag=True, help="Rebuild shards whose arrays or options changed.")
def import_features(config: Config, *, replace: bool) -> None:
    """Import one feature array per movie as a feature set."""
    from sharding.import_arrays import import_features as import_arrays

    for line in import_arrays(config, replace=replace).lines():
        echo(line)


@commands.command("index-tars", example="data.feature_tars=clip encoder.name=clip")
def index_tars(config: Config) -> None:
    """Index external feature tars in place as a feature set."""
    from sharding.index_tars import index_tars as index_external
    from sharding.index_tars import publish_index
    from sharding.storage.open import open_storage

    indexed = index_external(config)
    storage = open_storage(config.features_dir, config.storage)
    publish_index(storage, indexed)
    echo(indexed.text)
    echo(f"wrote {storage.location}")
    echo(f"next: {hint('movienet-train run')}")


def _describe(plan: Plan) -> str:
    from configs.units import format_bytes

    sizes = [sum(movie.n_bytes for movie in shard) for shard in plan.shards]
    images = sum(movie.images or 0 for movie in plan.movies)
    # A remote tar is planned by its size alone, so the images of its movie are unknown.
    unknown = any(movie.images is None for movie in plan.movies)
    return (
        f"movies {len(plan.movies):,}   images {'unknown' if unknown else f'{images:,}'}   "
        f"bytes {format_bytes(sum(sizes))}   "
        f"shards {len(sizes):,}   largest {format_bytes(max(sizes, default=0))}"
    )


def _missing(config: Config, records: Storage, plan: Plan) -> list[int]:
    """Return the shards that are not built; temporary ones count once they have been encoded."""
    from sharding.seal import missing_frames, missing_records

    if config.encoder.frame_storage == "temporary":
        return missing_records(records, plan)
    return missing_frames(records, plan, replace=True)


def _require_stored(config: Config, storage: Storage, instead: str) -> None:
    """Raise ``DataError`` if there are no frame shards because they are temporary."""
    from configs.errors import DataError
    from sharding.format.names import MANIFEST

    if config.encoder.frame_storage == "temporary" and storage.size(MANIFEST) is None:
        raise DataError(
            f"{storage.location}: got no sealed frame shards, since encoder.frame_storage is "
            f"temporary and they are deleted after encoding; run {hint(instead)}"
        )


def _progress(
    plan: Plan, missing: Sequence[int], commands: tuple[str, str], *, is_sealed: bool
) -> str:
    """Return one line of totals, and one with the next command if work remains."""
    from configs.units import format_bytes
    from sharding.format.names import array_list

    build, seal = commands
    costs = [sum(movie.n_bytes for movie in shard) for shard in plan.shards]
    done = sum(costs) - sum(costs[number] for number in missing)
    totals = (
        f"shards {len(costs) - len(missing):,} of {len(costs):,} done   "
        f"{format_bytes(done)} of {format_bytes(sum(costs))}   "
        f"{'sealed' if is_sealed else 'not sealed'}"
    )
    if missing:
        return f"{totals}\nmissing --array={array_list(missing)}; next: {hint(build)}"
    return totals if is_sealed else f"{totals}\nnext: {hint(seal)}"


def _space(config: Config, storage: Storage, plan: Plan) -> str:
    from configs.units import format_bytes
    from sharding.frame_space import needed

    if config.encoder.frame_storage == "temporary":
        limit = format_bytes(config.encoder.scratch_bytes)
        return f"space needed up to {limit} of scratch per rank (encoder.frame_storage: temporary)"
    missing = set(_missing(config, storage, plan))
    want = needed(movie for movie in plan.movies if movie.shard in missing)
    space = storage.space()
    quota = f"   quota {space.quota}" if space.quota else ""
    return f"space needed {want}   free {space.free}{quota}"


def _sealed(manifest: Manifest) -> str:
    from configs.units import format_bytes

    return (
        f"sealed: movies {manifest.movies:,}   images {manifest.samples:,}   "
        f"shards {len(manifest.shards):,}   {format_bytes(manifest.n_bytes)}\n"
        f"data {manifest.digest[:12]}"
    )


@click.command("presets", epilog="Example: movienet-shard presets movienet")
@click.argument("name", default="")
def list_presets(name: str) -> None:
    """List the presets, or print the path of NAME.

    Those under accelerate/ are for `accelerate launch --config_file`, those under towers/ are the
    model files of presets.
    """
    from configs.load import preset_files, reject_unknown_key

    files = preset_files()
    if name:
        reject_unknown_key(name, files, "presets")
        echo(str(files[name]))
        return
    for preset, file in files.items():
        echo(f"{preset:<24} {file}")


commands.add_command(list_presets)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    return run(commands, argv)


if __name__ == "__main__":
    sys.exit(main())
