"""Planning: which movies each shard contains."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from configs.errors import DataError
from configs.runtime.hints import hint
from sharding.format.names import movie_id
from sharding.format.plan import ImageCheck, Plan, PlanExtension, PlannedMovie

MAX_NAMED = 20
"""Most movies that a suggested ``data.exclude`` names."""


@dataclass(frozen=True)
class Movie:
    """One movie of a dump; ``PlannedMovie`` documents the fields."""

    movie: str
    original: str
    source: str
    fingerprint: str
    images: int | None
    n_bytes: int


class Sized(Protocol):
    """Item of a known size that must not be split."""

    @property
    def n_bytes(self) -> int:
        """Content bytes."""


M = TypeVar("M", bound=Sized)


def plan_shards(movies: Sequence[M], *, shard_bytes: int) -> tuple[tuple[M, ...], ...]:
    """Group movies into shards; a movie is never split across shards.

    Args:
        movies: Movies in order of id. The order is kept.
        shard_bytes: Target size of a shard in bytes. A larger movie gets its own shard.

    Returns:
        One tuple of movies per shard; none is empty.

    Raises:
        ValueError: ``shard_bytes`` is below 1.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes: got {shard_bytes}, want at least 1")
    shards: list[list[M]] = []
    free = 0
    # Next-fit, not best-fit: the order of ids is kept, so neighbours in a shard are predictable.
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
    """Return the plan of a dump; ``movies`` have distinct ids and may be in any order."""
    return Plan(shard_bytes, _rows(movies, shard_bytes, first=0), image_check)


def extend_plan(old: Plan, movies: Sequence[Movie], *, parent: str) -> Plan:
    """Return a plan with the new movies appended as an extension, after the old shards.

    Args:
        old: Existing plan. Its movies and shards stay, even if a movie is no longer in the dump.
        movies: Current movies of the dump, in any order.
        parent: Digest of the manifest of the old plan.

    Returns:
        The extended plan; the old plan if no movie is new.

    Raises:
        DataError: a movie of the old plan has changed.
    """
    planned = {movie.movie: movie for movie in old.movies}
    changed = [
        m for m in movies if m.movie in planned and m.fingerprint != planned[m.movie].fingerprint
    ]
    if changed:
        raise DataError(
            f"{len(changed)} movies changed since they were planned ({changed[0].movie}, …); an "
            "extension only adds movies: restore them, or run "
            f"{hint('movienet-shard plan --replace')} to plan all shards again"
        )
    new = [movie for movie in movies if movie.movie not in planned]
    if not new:
        return old
    first = len(old.shards)
    rows = _rows(new, old.shard_bytes, first=first)
    extensions = (*old.extensions, PlanExtension(first, parent))
    return Plan(old.shard_bytes, old.movies + rows, old.image_check, extensions)


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
        DataError: a name has no valid id, or two names have the same id.
    """
    by_id: dict[str, str] = {}
    for name in sorted(names):
        other = by_id.setdefault(movie_id(name), name)
        if other != name:
            raise DataError(
                f"movies {other!r} and {name!r}: both get the id {movie_id(name)}; rename one"
            )
    return {name: movie for movie, name in sorted(by_id.items())}


def choose(
    ids: Sequence[str], limit: int | Sequence[str] | None, exclude: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the movies selected by the configuration, in order of id.

    Args:
        ids: All ids, in order.
        limit: ``data.limit``: ids, or names as in the dump. A number selects nothing here, since it
            counts movies with images.
        exclude: ``data.exclude``: ids, or names as in the dump.

    Raises:
        DataError: a name is not in the dump; the message contains the nearest ids.
    """
    included, excluded = set(ids), _checked_ids("data.exclude", ids, exclude)
    if limit is not None and not isinstance(limit, int):
        included = _checked_ids("data.limit", ids, limit)
    return tuple(movie for movie in ids if movie in included and movie not in excluded)


def _checked_ids(key: str, ids: Sequence[str], names: Sequence[str]) -> set[str]:
    in_dump = set(ids)
    for name in names:
        if movie_id(name) not in in_dump:
            near = difflib.get_close_matches(movie_id(name), ids, n=3)
            remedy = f"did you mean {', '.join(near)}?" if near else f"it has {len(ids)} movies"
            raise DataError(f"{key}: no movie {name!r} in the dump; {remedy}")
    return {movie_id(name) for name in names}


def unreadable_movies(reasons: Mapping[str, str]) -> DataError:
    """Return the error for movies whose sources cannot be read.

    Args:
        reasons: Message of the error of each movie, by id; at least one.
    """
    first = next(iter(reasons.values()))
    exclude = exclude_override(reasons)
    if len(reasons) == 1:
        return DataError(f"{first}, or continue without it: {exclude}")
    others = f"{first}; {len(reasons) - 1} more movies cannot be read; repair them, or"
    if len(reasons) > MAX_NAMED:
        check = hint("movienet-shard check")
        return DataError(f"{others} exclude them (data.exclude); {check} names those of a dump")
    return DataError(f"{others} continue without them: {exclude}")


def exclude_override(movies: Iterable[str]) -> str:
    """Return the override that leaves out movies, e.g. ``data.exclude=[tt1, "Heat, 1995"]``."""
    return f"data.exclude=[{', '.join(map(_quoted, movies))}]"


def _quoted(name: str) -> str:
    """Return a name as YAML text, in quotes only if it would be read as something else."""
    is_text = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name)
    if is_text and name.lower() not in ("null", "true", "false"):
        return name
    return json.dumps(name, ensure_ascii=False)


def same_movies(old: Plan, new: Plan) -> bool:
    """Return whether two plans have the same movies and options, regardless of their shards."""
    if (old.shard_bytes, old.image_check) != (new.shard_bytes, new.image_check):
        return False
    return _sources(old) == _sources(new)


def _sources(plan: Plan) -> dict[str, dict[str, object]]:
    """Return the row of each movie without the number of its shard.

    A new movie moves the ones after it to other shards, which does not change these movies.
    """
    return {movie.movie: movie.row() | {"shard": 0} for movie in plan.movies}


def difference(old: Plan, new: Plan) -> str:
    """Return a short description of how two plans differ."""
    if old.shard_bytes != new.shard_bytes:
        return f"sharding.shard_bytes changed from {old.shard_bytes} to {new.shard_bytes}"
    if old.image_check != new.image_check:
        return f"sharding.image_check changed from {old.image_check} to {new.image_check}"
    changes = [
        f"{len(movies)} {what} ({movies[0]}{', …' if len(movies) > 1 else ''})"
        for what, movies in _changes(old, new).items()
        if movies
    ]
    return "; ".join(changes) or "the same movies in other shards"


def can_extend(old: Plan, new: Plan) -> bool:
    """Return whether an extension of the old plan adds the new movies; removed ones stay in it."""
    changes = _changes(old, new)
    same_options = (old.shard_bytes, old.image_check) == (new.shard_bytes, new.image_check)
    return same_options and bool(changes["new"]) and not changes["changed"]


def excluded_movies(plan: Plan, exclude: Sequence[str]) -> list[str]:
    """Return the movies of ``data.exclude`` that a plan contains.

    An extension keeps the shards of the sealed set, so only its own movies count.
    """
    first = plan.extensions[-1].first if plan.extensions else 0
    excluded = set(map(movie_id, exclude))
    return [row.movie for row in plan.movies if row.shard >= first and row.movie in excluded]


def _changes(old: Plan, new: Plan) -> dict[str, list[str]]:
    before, after = _sources(old), _sources(new)
    return {
        "new": sorted(set(after) - set(before)),
        "removed": sorted(set(before) - set(after)),
        "changed": [m for m in after if m in before and after[m] != before[m]],
    }
