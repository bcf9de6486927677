"""Movies to shards."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from configs.errors import DataError
from sharding.format.names import movie_id
from sharding.format.plan import ImageCheck, Plan, PlanExtension, PlannedMovie


@dataclass(frozen=True)
class Movie:
    """One movie of a dump; ``PlannedMovie`` says what the fields mean."""

    movie: str
    original: str
    source: str
    fingerprint: str
    images: int | None
    n_bytes: int


class Weighed(Protocol):
    """Whatever has bytes and may not be split."""

    @property
    def n_bytes(self) -> int:
        """Content bytes."""


M = TypeVar("M", bound=Weighed)


def plan_shards(movies: Sequence[M], *, shard_bytes: int) -> tuple[tuple[M, ...], ...]:
    """Group movies into shards; a movie is never split over shards.

    Args:
        movies: Movies in order of id. The order is kept.
        shard_bytes: Wanted shard size in bytes. A larger movie has a shard to itself.

    Returns:
        One tuple of movies per shard; none is empty.

    Raises:
        ValueError: ``shard_bytes`` is below 1.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes: got {shard_bytes}, want at least 1")
    shards: list[list[M]] = []
    free = 0
    for movie in movies:
        if not shards or movie.n_bytes > free:
            shards.append([])
            free = shard_bytes
        shards[-1].append(movie)
        free -= movie.n_bytes
    return tuple(tuple(shard) for shard in shards)


def make_plan(
    movies: Sequence[Movie], *, shard_bytes: int, image_check: ImageCheck = "markers"
) -> Plan:
    """Return the plan of a dump; the order of ``movies``, all of other ids, does not matter."""
    return Plan(shard_bytes, _rows(movies, shard_bytes, first=0), image_check)


def extend_plan(old: Plan, movies: Sequence[Movie], *, parent: str) -> Plan:
    """Return a plan with the new ones of ``movies`` as a part behind the old shards.

    Args:
        old: Its rows and shards stay as they are, even where the movie is no longer in the dump.
        movies: The dump of today, in any order.
        parent: Digest of the manifest of the old plan.

    Returns:
        The old plan, if no movie is new.

    Raises:
        DataError: a movie of the old plan has changed since.
    """
    there = {movie.movie: movie for movie in old.movies}
    changed = [
        m for m in movies if m.movie in there and m.fingerprint != there[m.movie].fingerprint
    ]
    if changed:
        raise DataError(
            f"{len(changed)} movies changed since they were planned ({changed[0].movie}, …); a "
            "part only adds movies: restore them, or say plan --replace to shard all again"
        )
    new = [movie for movie in movies if movie.movie not in there]
    if not new:
        return old
    first = len(old.shards)
    rows = _rows(new, old.shard_bytes, first=first)
    parts = (*old.extensions, PlanExtension(first, parent))
    return Plan(old.shard_bytes, old.movies + rows, old.image_check, parts)


def _rows(movies: Sequence[Movie], shard_bytes: int, *, first: int) -> tuple[PlannedMovie, ...]:
    ordered = sorted(movies, key=lambda movie: movie.movie)
    shards = plan_shards(ordered, shard_bytes=shard_bytes)
    return tuple(
        PlannedMovie(m.movie, m.original, m.source, m.fingerprint, m.images, m.n_bytes, shard)
        for shard, members in enumerate(shards, first)
        for m in members
    )


def ids_by_name(names: Collection[str]) -> dict[str, str]:
    """Return the id of each name of a dump, in order of id.

    Raises:
        DataError: a name gives no id, or two names give the same.
    """
    found: dict[str, str] = {}
    for name in sorted(names):
        other = found.setdefault(movie_id(name), name)
        if other != name:
            raise DataError(
                f"movies {other!r} and {name!r}: both get the id {movie_id(name)}; rename one"
            )
    return {name: movie for movie, name in sorted(found.items())}


def choose(
    ids: Sequence[str], limit: int | Sequence[str] | None, exclude: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the movies that the config asks for, in order of id.

    Args:
        ids: All ids, in order.
        limit: ``data.limit``: ids, or names as the dump has them. A number changes nothing here,
            since it counts movies with images.
        exclude: ``data.exclude``, likewise.

    Raises:
        DataError: one of them is not there; the nearest ids are named.
    """
    there, without = set(ids), _known("data.exclude", ids, exclude)
    if limit is not None and not isinstance(limit, int):
        there = _known("data.limit", ids, limit)
    return tuple(movie for movie in ids if movie in there and movie not in without)


def _known(key: str, ids: Sequence[str], names: Sequence[str]) -> set[str]:
    there = set(ids)
    for name in names:
        if movie_id(name) not in there:
            near = difflib.get_close_matches(movie_id(name), ids, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else f"there are {len(ids)} movies"
            raise DataError(f"{key}: no movie {name!r} in the dump; {hint}")
    return {movie_id(name) for name in names}


def same_movies(old: Plan, new: Plan) -> bool:
    """Tell whether two plans are about the same movies and options, whatever their shards."""
    if (old.shard_bytes, old.image_check) != (new.shard_bytes, new.image_check):
        return False
    before, after = (
        {movie.movie: movie.row() | {"shard": 0} for movie in plan.movies} for plan in (old, new)
    )
    return before == after


def difference(old: Plan, new: Plan) -> str:
    """Say in a few words how two plans differ."""
    if old.shard_bytes != new.shard_bytes:
        return f"shard_bytes {old.shard_bytes} became {new.shard_bytes}"
    if old.image_check != new.image_check:
        return f"validate {old.image_check} became {new.image_check}"
    before = {movie.movie: movie for movie in old.movies}
    after = {movie.movie: movie for movie in new.movies}
    parts = {
        "new": sorted(set(after) - set(before)),
        "gone": sorted(set(before) - set(after)),
        "changed": [m for m in after if m in before and after[m].row() != before[m].row()],
    }
    return "; ".join(
        f"{len(movies)} {what} ({movies[0]}{', …' if len(movies) > 1 else ''})"
        for what, movies in parts.items()
        if movies
    )
