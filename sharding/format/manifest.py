"""``NAME-00000.json`` (sidecar of one shard) and ``manifest.json`` (the sealed dataset)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

from configs.errors import DataError
from sharding.format.encoding import (
    FORMAT,
    REBUILD,
    json_with_rows,
    parse_json,
    sha256_hex,
    take_field,
)
from sharding.format.names import Kind, checked_id


@dataclass(frozen=True)
class Rejected:
    """A rejected image, or a skipped member of a source."""

    movie: str
    member: str
    reason: str

    def row(self) -> dict[str, str]:
        """Return the JSON object."""
        return {"movie": self.movie, "member": self.member, "reason": self.reason}

    @classmethod
    def from_row(cls, row: object, where: str) -> Self:
        """Read the JSON object."""
        return cls(*(take_field(row, key, str, where) for key in ("movie", "member", "reason")))


@dataclass(frozen=True)
class Sidecar:
    """Contents and input digest of a shard. Written last, it marks the shard as complete."""

    name: str
    """File name of the tar."""

    n_bytes: int
    """Size of the tar."""

    sha256: str
    """Digest of the tar."""

    samples: int
    """WebDataset samples: images of a frame shard, movies of a feature shard."""

    movies: tuple[str, ...]
    """Ids, in order; movies without a valid image are included."""

    input_digest: str
    """Digest of everything that determines the bytes."""

    index: str | None = None
    """sha256 of the shard's index, for frames."""

    statistics: Mapping[str, object] = field(default_factory=dict)
    """Counts, e.g. images per movie."""

    rejected: tuple[Rejected, ...] = ()

    information: Mapping[str, object] = field(default_factory=dict)
    """Library versions and similar facts; not part of any digest."""

    def to_bytes(self) -> bytes:
        """Return the sidecar's JSON, one rejected image per line."""
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
            DataError: the file is corrupt or of another version.
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
    """One shard of a sealed dataset."""

    name: str
    n_bytes: int
    sha256: str
    samples: int
    movies: int
    index: str | None
    """sha256 of the shard's own index, for frames."""

    @classmethod
    def of(cls, sidecar: Sidecar) -> Self:
        """Return the manifest's entry for a shard."""
        return cls(
            sidecar.name,
            sidecar.n_bytes,
            sidecar.sha256,
            sidecar.samples,
            len(sidecar.movies),
            sidecar.index,
        )

    def row(self) -> dict[str, object]:
        """Return the JSON object."""
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
        """Read the JSON object."""
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
    """A sealed dataset: ``manifest.json``. It contains no time and no host name."""

    kind: Kind
    provenance: Mapping[str, object]
    """Inputs that the shards' bytes do not record: encoder, dimension, parent dataset."""

    shards: tuple[ManifestShard, ...]
    index: str | None = None
    """sha256 of the dataset's ``index.npz``, for features."""

    parent: str | None = None
    """Digest of the manifest that this one adds shards to."""

    renamed: Mapping[str, str] = field(default_factory=dict)
    """Names in the dump, by movie id; only those that differ from their id."""

    @cached_property
    def digest(self) -> str:
        """The data digest: sha256 of the manifest's bytes."""
        return sha256_hex(self.to_bytes())

    @property
    def n_bytes(self) -> int:
        """Total size of the tars."""
        return sum(shard.n_bytes for shard in self.shards)

    @property
    def samples(self) -> int:
        """Total number of WebDataset samples."""
        return sum(shard.samples for shard in self.shards)

    @property
    def movies(self) -> int:
        """Total number of movies."""
        return sum(shard.movies for shard in self.shards)

    def to_bytes(self) -> bytes:
        """Return ``manifest.json``, one shard per line."""
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
            DataError: the file is corrupt, or of another version or kind.
        """
        tree = parse_json(data, where)
        kind = take_field(tree, "kind", str, where)
        if kind not in ("frames", "features"):
            raise DataError(f"{where}: kind: got {kind!r}, want 'frames' or 'features'")
        rows = take_field(tree, "shards", list, where)
        manifest = cls(
            kind="frames" if kind == "frames" else "features",
            provenance=take_field(tree, "provenance", dict, where),
            shards=tuple(ManifestShard.from_row(row, where) for row in rows),
            index=None if tree.get("index") is None else take_field(tree, "index", str, where),
            parent=None if tree.get("parent") is None else take_field(tree, "parent", str, where),
            renamed=take_field(tree, "renamed", dict, where),
        )
        if manifest.to_bytes() != data:
            # The digest is that of the canonical bytes: without this check an edited file would
            # have the digest of another one.
            raise DataError(f"{where}: not in canonical form, edited by hand? {REBUILD}")
        return manifest
