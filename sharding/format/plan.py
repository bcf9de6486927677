"""``plan.json``: which movie goes to which frame shard, and from which source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, Self

from configs.errors import DataError
from configs.runtime.hints import hint
from sharding.format.encoding import (
    FORMAT,
    canonical_json,
    check_kind,
    json_with_rows,
    parse_json,
    sha256_hex,
    take_field,
)
from sharding.format.names import checked_id

ImageCheck = Literal["markers", "decode"]


@dataclass(frozen=True)
class PlannedMovie:
    """A movie of the plan."""

    movie: str
    """Id, ``[A-Za-z0-9_-]{1,64}``."""

    original: str
    """Name in the dump."""

    source: str
    """Tar or folder, relative to the dump, with ``/``."""

    fingerprint: str
    """Changes when the source changes; not part of any tar, index or manifest."""

    images: int | None
    """Images in the source, valid or not; None if they are unknown until the build."""

    n_bytes: int
    """Total size of the images; size of the archive if ``images`` is None."""

    shard: int
    """Number of its shard."""

    def row(self) -> dict[str, object]:
        """Return the movie's row in ``plan.json``."""
        return {
            "movie": self.movie,
            "original": self.original,
            "source": self.source,
            "fingerprint": self.fingerprint,
            "images": self.images,
            "bytes": self.n_bytes,
            "shard": self.shard,
        }

    @classmethod
    def from_row(cls, row: object, where: str) -> Self:
        """Read one row of ``plan.json``."""
        images = row.get("images") if isinstance(row, dict) else None
        return cls(
            movie=checked_id(take_field(row, "movie", str, where), where),
            original=take_field(row, "original", str, where),
            source=take_field(row, "source", str, where),
            fingerprint=take_field(row, "fingerprint", str, where),
            images=None if images is None else take_field(row, "images", int, where),
            n_bytes=take_field(row, "bytes", int, where),
            shard=take_field(row, "shard", int, where),
        )


@dataclass(frozen=True)
class PlanExtension:
    """Movies that were added later, in separate shards after the existing ones."""

    first: int
    """Number of the first added shard."""

    parent: str
    """Digest of the manifest that is extended."""

    def row(self) -> dict[str, object]:
        """Return the JSON object."""
        return {"first": self.first, "parent": self.parent}

    @classmethod
    def from_row(cls, row: object, where: str) -> Self:
        """Read the JSON object."""
        return cls(take_field(row, "first", int, where), take_field(row, "parent", str, where))


@dataclass(frozen=True)
class Plan:
    """Which movie goes to which frame shard: ``plan.json``."""

    shard_bytes: int
    """Target size of a shard: bytes of its images."""

    movies: tuple[PlannedMovie, ...]
    """In order of id within each extension; shard numbers rise from 0 without a gap."""

    image_check: ImageCheck = "markers"
    """How images are checked; this determines which are rejected."""

    extensions: tuple[PlanExtension, ...] = ()
    """Later additions, in order; empty if all movies were planned at once."""

    @cached_property
    def shards(self) -> tuple[tuple[PlannedMovie, ...], ...]:
        """The movies of each shard."""
        shards: list[list[PlannedMovie]] = []
        for movie in self.movies:
            if movie.shard == len(shards):
                shards.append([])
            shards[movie.shard].append(movie)
        return tuple(tuple(shard) for shard in shards)

    @property
    def parent(self) -> str | None:
        """Digest of the manifest that the last extension adds shards to."""
        return self.extensions[-1].parent if self.extensions else None

    def input_digest(self, number: int) -> str:
        """Return the digest of a shard's plan entry, fingerprints of the sources included."""
        rows = [movie.row() for movie in self.shards[number]]
        entry = {"format": FORMAT, "frames": rows}
        return sha256_hex(canonical_json(entry | self._image_check_row()))

    def to_bytes(self) -> bytes:
        """Return ``plan.json``, one movie per line."""
        head: dict[str, object] = {
            "format": FORMAT,
            "kind": "frames",
            "shard_bytes": self.shard_bytes,
        }
        head |= self._image_check_row()
        if self.extensions:
            head["parts"] = [extension.row() for extension in self.extensions]
        return json_with_rows(head, "movies", [movie.row() for movie in self.movies])

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Read ``plan.json``.

        Raises:
            DataError: the file is corrupt, or its movies or shards are out of order.
        """
        tree = parse_json(data, where)
        check_kind(tree, "frames", where)
        rows = take_field(tree, "movies", list, where)
        movies = tuple(
            PlannedMovie.from_row(row, f"{where}: movies[{k}]") for k, row in enumerate(rows)
        )
        extensions = take_field(tree, "parts", list, where) if "parts" in tree else []
        plan = cls(
            take_field(tree, "shard_bytes", int, where),
            movies,
            _image_check(tree, where),
            tuple(
                PlanExtension.from_row(row, f"{where}: parts[{k}]")
                for k, row in enumerate(extensions)
            ),
        )
        plan._check(where)
        return plan

    def _image_check_row(self) -> dict[str, object]:
        # Omitted if default: the digests of plans from before this option must not change.
        return {} if self.image_check == "markers" else {"image_check": self.image_check}

    def _check(self, where: str) -> None:
        remedy = f"run {hint('movienet-shard plan --replace')}"
        steps = [b.shard - a.shard for a, b in pairwise(self.movies)]
        if (self.movies and self.movies[0].shard != 0) or not set(steps) <= {0, 1}:
            raise DataError(f"{where}: shard numbers do not rise from 0 without a gap; {remedy}")
        firsts = {extension.first for extension in self.extensions}
        for a, b in pairwise(self.movies):
            if a.movie >= b.movie and not (a.shard < b.shard and b.shard in firsts):
                raise DataError(f"{where}: movies are not in strict order of id; {remedy}")
        if len({movie.movie for movie in self.movies}) < len(self.movies):
            raise DataError(f"{where}: a movie occurs twice; {remedy}")


def _image_check(tree: Mapping[str, object], where: str) -> ImageCheck:
    value = tree.get("image_check", "markers")
    if value == "markers" or value == "decode":
        return value
    raise DataError(f"{where}: image_check: got {value!r}, want 'markers' or 'decode'")
