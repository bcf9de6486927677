"""Dump and plan to frame shards.

A shard is a function of its plan entry and the movies' bytes: a rerun skips what is done, and ends
in the same bytes however often it was killed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from configs.errors import ConfigError, DataError, MachineError
from configs.progress import progress
from configs.schema import Config
from configs.units import format_bytes
from sharding import tar
from sharding.deal import deal
from sharding.dump import Image, Source, flaw, open_source, read_movies
from sharding.forms import FrameIndex, Plan, PlannedMovie, Rejected, Sidecar, shard_name
from sharding.frames import PLAN, read_plan
from sharding.plan import difference, make_plan
from sharding.shard import (
    MANIFEST,
    Content,
    TarWriter,
    clear_beyond,
    commit_shard,
    shard_done,
    tar_writer,
)
from sharding.storage import Storage

logger = logging.getLogger(__name__)


def dump_of(config: Config) -> Path:
    """Return the folder of the dump.

    Raises:
        ConfigError: ``data.dump`` is missing.
    """
    if config.data.dump is None:
        raise ConfigError("data.dump: got null, want the folder of key frames")
    return Path(config.data.dump)


# --- plan -----------------------------------------------------------------------------------------


def plan_dump(config: Config) -> Plan:
    """Scan the dump and plan its frame shards; nothing is written.

    Raises:
        ConfigError: ``data.dump`` is missing.
        DataError: the dump holds no image, or a tar is damaged.
    """
    with progress(None, label="scan", unit="movies") as bar:
        movies = read_movies(dump_of(config), config.data.limit, on_movie=bar.advance)
    return make_plan(movies, shard_bytes=config.sharding.shard_bytes)


def publish_plan(storage: Storage, plan: Plan, *, replace: bool = False) -> bool:
    """Write ``plan.json`` unless it stands there; return whether it was written.

    Raises:
        DataError: another plan stands there, and ``replace`` is off.
    """
    data, stands = plan.to_bytes(), storage.size(PLAN) is not None
    if stands and storage.read(PLAN) == data:
        return False
    old = None if replace else read_plan(storage)
    if old is not None:
        raise DataError(
            f"{storage.location}/{PLAN}: differs from the plan of today: {difference(old, plan)}; "
            "say plan --replace to plan again"
        )
    storage.remove(MANIFEST)  # what was sealed, was sealed for the old plan
    storage.publish(PLAN, data, replace=True)
    return True


def plan_for_build(storage: Storage, config: Config) -> Plan:
    """Return the published plan; without one, make it.

    Raises:
        DataError: the published plan was made for another ``sharding.shard_bytes``.
    """
    plan = read_plan(storage)
    if plan is None:
        plan = plan_dump(config)
        publish_plan(storage, plan)
    if plan.shard_bytes != config.sharding.shard_bytes:
        raise DataError(
            f"{storage.location}/{PLAN}: planned for sharding.shard_bytes {plan.shard_bytes}, got "
            f"{config.sharding.shard_bytes}; say plan --replace to plan again"
        )
    return plan


# --- build ----------------------------------------------------------------------------------------


def choose_shards(
    plan: Plan, *, share: tuple[int, int] = (0, 1), only: Sequence[str] = ()
) -> tuple[int, ...]:
    """Return the shards that this call is about, by number.

    Args:
        plan: The whole plan: shares are dealt from it, whatever is done already.
        share: Index from 0, and number of shares.
        only: Names such as ``frames-00007``, or numbers; none means all.

    Raises:
        ConfigError: a name is not in the plan.
    """
    costs = [sum(movie.n_bytes for movie in shard) for shard in plan.shards]
    mine = deal(costs, share[1])[share[0]]
    if not only:
        return mine
    numbers = {shard_name("frames", k): k for k in range(len(costs))}
    numbers |= {str(k): k for k in range(len(costs))}
    unknown = [name for name in only if name not in numbers]
    if unknown:
        last = shard_name("frames", len(costs) - 1)
        raise ConfigError(f"--only: no shard {unknown[0]!r}; there are frames-00000 to {last}")
    wanted = {numbers[name] for name in only}
    return tuple(number for number in mine if number in wanted)


def build_shards(
    storage: Storage,
    dump: Path,
    plan: Plan,
    numbers: Collection[int],
    *,
    max_bad_fraction: float,
    replace: bool = False,
) -> list[Sidecar]:
    """Build those of the shards that are not done; return their sidecars.

    Raises:
        DataError: a source changed or is damaged, a movie has too many bad images; or a shard was
            made from something else, or is not in the plan, and ``replace`` is off.
        MachineError: they do not fit on the disk.
        OSError: a source cannot be read, or a shard cannot be written.
    """
    storage.sweep()
    todo = [
        number
        for number in numbers
        if not shard_done(storage, "frames", number, plan.made_from(number), replace=replace)
    ]
    clear_beyond(storage, len(plan.shards), replace=replace)
    logger.info("shards: %d to build, %d done before", len(todo), len(numbers) - len(todo))
    movies = [movie for number in todo for movie in plan.shards[number]]
    check_space(storage, movies)
    images = sum(movie.images or 0 for movie in movies)
    with progress(images, label="build", unit="images") as bar:
        return [
            build_shard(
                storage,
                dump,
                plan,
                number,
                max_bad_fraction=max_bad_fraction,
                on_images=bar.advance,
            )
            for number in todo
        ]


def check_space(storage: Storage, movies: Iterable[PlannedMovie]) -> None:
    """Refuse to begin what cannot end.

    Raises:
        MachineError: the tars of these movies do not fit.
    """
    free = storage.free_bytes()
    member = tar.BLOCK + tar.BLOCK // 2  # header, and padding on the average
    need = sum(movie.n_bytes + member * (movie.images or 0) for movie in movies)
    if free is not None and need > free:
        raise MachineError(
            f"{storage.location}: got {format_bytes(free)} free, want {format_bytes(need)} for the "
            "frame shards; free some, set data.root elsewhere, or try data.limit"
        )


def build_shard(
    storage: Storage,
    dump: Path,
    plan: Plan,
    number: int,
    *,
    max_bad_fraction: float,
    on_images: Callable[[int], None] | None = None,
) -> Sidecar:
    """Build one shard: tar, index, sidecar. Whatever stood there is replaced.

    Args:
        storage: Where the frame set lies.
        dump: The dump.
        plan: The plan; its stamps must still hold.
        number: Of the shard.
        max_bad_fraction: Share of a movie's images that may be left out.
        on_images: Called after each movie with its number of images.

    Raises:
        DataError: a source changed or is damaged, or a movie has too many bad images.
        OSError: a source cannot be read, or the shard cannot be written.
    """
    planned = plan.shards[number]
    packed = _Packed()
    with tar_writer(storage, "frames", number) as (writer, digest):
        for position, movie in enumerate(planned):
            with open_source(dump, movie.source) as source:
                _check_stamp(dump, movie, source)
                bad = _pack_movie(writer, packed, position, movie.movie, source)
            _check_bad(movie, bad, max_bad_fraction)
            if on_images is not None:
                on_images(len(source.images))
    per_movie = np.bincount(packed.column("movie"), minlength=len(planned)).tolist()
    content = Content(
        samples=len(packed.rows),
        movies=tuple(movie.movie for movie in planned),
        made_from=plan.made_from(number),
        statistics={
            "images": per_movie,
            "image_bytes": sum(packed.column("size")),
            "bad": packed.bad,
        },
        rejected=tuple(packed.rejected),
    )
    return commit_shard(storage, "frames", number, digest, content, packed.index().to_bytes())


@dataclass
class _Packed:
    """What is known of a shard while it grows."""

    rows: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    """offset, size, movie, shot, image"""

    rejected: list[Rejected] = field(default_factory=list)
    bad: int = 0

    def column(self, name: str) -> list[int]:
        at = ("offset", "size", "movie", "shot", "image").index(name)
        return [row[at] for row in self.rows]

    def index(self) -> FrameIndex:
        return FrameIndex(
            offset=np.array(self.column("offset"), np.uint64),
            size=np.array(self.column("size"), np.uint32),
            movie=np.array(self.column("movie"), np.uint32),
            shot=np.array(self.column("shot"), np.int32),
            image=np.array(self.column("image"), np.int16),
        )


def _pack_movie(
    writer: TarWriter, packed: _Packed, position: int, movie: str, source: Source
) -> int:
    """Copy one movie's good images; return how many were bad."""
    bad = 0
    for image in source.images:
        room = writer.reserve(image.size)
        source.read_into(image, room)
        why = flaw(room)
        room.release()
        if why is not None:
            packed.rejected.append(Rejected(movie, image.name, why))
            bad += 1
            continue
        offset = writer.commit(f"{movie}/{image.member}", image.size)
        packed.rows.append((offset, image.size, position, image.shot, image.image))
    packed.rejected += [Rejected(movie, odd.member, odd.reason) for odd in source.odd]
    packed.bad += bad
    return bad


def _check_stamp(dump: Path, movie: PlannedMovie, source: Source) -> None:
    if source.stamp != movie.stamp:
        raise DataError(
            f"{dump / movie.source}: changed since it was planned "
            f"({_images(source.images)} now, {movie.images} then); run plan --replace"
        )


def _check_bad(movie: PlannedMovie, bad: int, max_bad_fraction: float) -> None:
    if bad > max_bad_fraction * (movie.images or 0):
        raise DataError(
            f"movie {movie.movie}: got {bad} bad of {movie.images} images, want at most "
            f"{max_bad_fraction:.1%} (sharding.max_bad_fraction); repair {movie.source}, "
            "or allow more"
        )


def _images(images: Sequence[Image]) -> str:
    return f"{len(images)} images"
