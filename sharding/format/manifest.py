"""``NAME-00000.json`` (sidecar of one shard) and ``manifest.json`` (the sealed set)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

from configs.errors import DataError
from sharding.format.encoding import FORMAT, json_with_rows, parse_json, sha256_hex, take_field
from sharding.format.names import Kind, checked_id


@dataclass(frozen=True)
class Rejected:
    """An image, or an odd member of a source, that was left out."""

    movie: str
    member: str
    reason: str

    def row(self) -> dict[str, str]:
        """Return it as JSON writes it."""
        return {"movie": self.movie, "member": self.member, "reason": self.reason}

    @classmethod
    def from_row(cls, row: object, where: str) -> Self:
        """Read it from JSON."""
        return cls(*(take_field(row, key, str, where) for key in ("movie", "member", "reason")))


@dataclass(frozen=True)
class Sidecar:
    """What a shard holds and was made from; written last, so it is the shard's commit mark."""

    name: str
    """File name of the tar."""

    n_bytes: int
    """Size of the tar."""

    sha256: str
    """Digest of the tar."""

    samples: int
    """WebDataset samples: images of a frame shard, movies of a feature shard."""

    movies: tuple[str, ...]
    """Ids, in order; a movie without a good image stands here too."""

    input_digest: str
    """Digest of everything the bytes depend on."""

    index: str | None = None
    """sha256 of the shard's index, for frames."""

    statistics: Mapping[str, object] = field(default_factory=dict)
    """Counts, e.g. images of each movie."""

    rejected: tuple[Rejected, ...] = ()

    information: Mapping[str, object] = field(default_factory=dict)
    """Library versions and the like; in no digest."""

    def to_bytes(self) -> bytes:
        """Return the sidecar's JSON, one rejected image a line."""
        head = {
            "format": FORMAT,
            "name": self.name,
            "bytes": self.n_bytes,
            "sha256": self.sha256,
            "samples": self.samples,
            "movies": list(self.movies),
            "input_digest": self.input_digest,
            "index": self.index,
            "statistics": dict(self.statistics),
            "information": dict(self.information),
        }
        return json_with_rows(head, "rejected", [row.row() for row in self.rejected])

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Read a sidecar.

        Raises:
            DataError: it is damaged or of another version.
        """
        tree = parse_json(data, where)
        movies = take_field(tree, "movies", list, where)
        rows = take_field(tree, "rejected", list, where)
        index = tree.get("index")
        return cls(
            name=take_field(tree, "name", str, where),
            n_bytes=take_field(tree, "bytes", int, where),
            sha256=take_field(tree, "sha256", str, where),
            samples=take_field(tree, "samples", int, where),
            movies=tuple(checked_id(movie, where) for movie in movies),
            input_digest=take_field(tree, "input_digest", str, where),
            index=None if index is None else take_field(tree, "index", str, where),
            statistics=take_field(tree, "statistics", dict, where),
            rejected=tuple(Rejected.from_row(row, where) for row in rows),
            information=take_field(tree, "information", dict, where),
        )


@dataclass(frozen=True)
class ManifestShard:
    """One shard of a sealed set."""

    name: str
    n_bytes: int
    sha256: str
    samples: int
    movies: int
    index: str | None
    """sha256 of the shard's own index, for frames."""

    @classmethod
    def of(cls, sidecar: Sidecar) -> Self:
        """Return the manifest's line for a shard."""
        return cls(
            sidecar.name,
            sidecar.n_bytes,
            sidecar.sha256,
            sidecar.samples,
            len(sidecar.movies),
            sidecar.index,
        )

    def row(self) -> dict[str, object]:
        """Return it as JSON writes it."""
        return {
            "name": self.name,
            "bytes": self.n_bytes,
            "sha256": self.sha256,
            "samples": self.samples,
            "movies": self.movies,
            "index": self.index,
        }

    @classmethod
    def from_row(cls, row: object, where: str) -> Self:
        """Read it from JSON."""
        index = row.get("index") if isinstance(row, dict) else None
        return cls(
            name=take_field(row, "name", str, where),
            n_bytes=take_field(row, "bytes", int, where),
            sha256=take_field(row, "sha256", str, where),
            samples=take_field(row, "samples", int, where),
            movies=take_field(row, "movies", int, where),
            index=None if index is None else take_field(row, "index", str, where),
        )


@dataclass(frozen=True)
class Manifest:
    """A sealed set: ``manifest.json``. It knows no time and no host."""

    kind: Kind
    provenance: Mapping[str, object]
    """What the content depends on beside the shards' bytes: encoder, dimension, parent set."""

    shards: tuple[ManifestShard, ...]
    index: str | None = None
    """sha256 of the set's ``index.npz``, for features."""

    parent: str | None = None
    """Digest of the manifest that this one adds shards to."""

    renamed: Mapping[str, str] = field(default_factory=dict)
    """Movie ids that are not the dump's own names, and these names."""

    @cached_property
    def digest(self) -> str:
        """The data digest: sha256 of the manifest's bytes."""
        return sha256_hex(self.to_bytes())

    @property
    def n_bytes(self) -> int:
        """Bytes of all tars."""
        return sum(shard.n_bytes for shard in self.shards)

    @property
    def samples(self) -> int:
        """WebDataset samples of all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def movies(self) -> int:
        """Movies of all shards."""
        return sum(shard.movies for shard in self.shards)

    def to_bytes(self) -> bytes:
        """Return ``manifest.json``, one shard a line."""
        head = {
            "format": FORMAT,
            "kind": self.kind,
            "provenance": dict(self.provenance),
            "index": self.index,
            "parent": self.parent,
            "renamed": dict(self.renamed),
            "totals": {
                "shards": len(self.shards),
                "bytes": self.n_bytes,
                "samples": self.samples,
                "movies": self.movies,
            },
        }
        return json_with_rows(head, "shards", [shard.row() for shard in self.shards])

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Read ``manifest.json``.

        Raises:
            DataError: it is damaged or of another version or kind.
        """
        tree = parse_json(data, where)
        kind = take_field(tree, "kind", str, where)
        if kind not in ("frames", "features"):
            raise DataError(f"{where}: kind: got {kind!r}, want 'frames' or 'features'")
        rows = take_field(tree, "shards", list, where)
        made = cls(
            kind="frames" if kind == "frames" else "features",
            provenance=take_field(tree, "provenance", dict, where),
            shards=tuple(ManifestShard.from_row(row, where) for row in rows),
            index=None if tree.get("index") is None else take_field(tree, "index", str, where),
            parent=None if tree.get("parent") is None else take_field(tree, "parent", str, where),
            renamed=take_field(tree, "renamed", dict, where),
        )
        if made.to_bytes() != data:
            # The digest is taken of the bytes: an edited file must not pass under an old digest.
            raise DataError(f"{where}: not in canonical form, edited by hand? seal again")
        return made
