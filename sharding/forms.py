"""Every file of a published set: typed values to bytes and back, and nothing else.

    plan.json           Plan            which movie goes to which shard, made of what
    NAME-00000.json     Sidecar         what a shard holds and was made from; its commit mark
    NAME-00000.index.npz  FrameIndex    where each image lies in a frame shard
    index.npz           FeatureIndex    where each movie's rows lie in a feature set
    manifest.json       Manifest        the sealed set; its sha256 is the data digest

Equal values give equal bytes, on every machine: JSON has sorted keys and no spaces, arrays are
little-endian, archives carry no time. ``from_bytes`` names the place of whatever is damaged.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, Self, TypeVar

import numpy as np
import numpy.typing as npt

from configs.errors import DataError

FORMAT = 1
"""Version of all forms in this file; another one is refused."""

Kind = Literal["frames", "features"]
Validation = Literal["markers", "decode"]

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ID_WANTED = "1 to 64 letters, digits, '_' or '-'"
_KEPT = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-")

T = TypeVar("T")


# --- bytes ----------------------------------------------------------------------------------------


def canonical_json(value: object) -> bytes:
    """Return JSON with sorted keys, no spaces, ASCII only and a newline at the end.

    Raises:
        ValueError: a number is not finite.
    """
    return (_json(value) + "\n").encode("ascii")


def sha256_hex(data: bytes | memoryview) -> str:
    """Return the sha256 of ``data`` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def npz_bytes(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Return an uncompressed ``.npz`` of ``arrays``, in their order and without any time."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # else the bytes would tell the operating system
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, npy_bytes(array))
    return buffer.getvalue()


def npz_arrays(data: bytes, where: str, names: Iterable[str]) -> dict[str, npt.NDArray[Any]]:
    """Read the arrays ``names`` out of an ``.npz``.

    Raises:
        DataError: the file is damaged, or an array is missing.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return {name: archive[name] for name in names}
    except KeyError as error:
        raise DataError(f"{where}: {' '.join(error.args)}; made by another version?") from None
    except Exception as error:  # noqa: BLE001  # damaged archives raise nearly anything
        raise DataError(f"{where}: not a whole .npz ({error}); make it again") from None


def npy_header(array: npt.NDArray[Any]) -> bytes:
    """Return the header of ``array`` as a ``.npy`` of version 1.0, the same for every numpy."""
    shape, descr = tuple(int(n) for n in array.shape), array.dtype.newbyteorder("<").str
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    # The data begins at a multiple of 64, and as a rule at 128.
    total = max(128, -(-(10 + len(text) + 1) // 64) * 64)
    padded = text.ljust(total - 11) + "\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded.encode("ascii")


def npy_bytes(array: npt.NDArray[Any]) -> bytes:
    """Return ``array`` as a little-endian ``.npy`` in C order."""
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return npy_header(array) + little.tobytes()


# --- names ----------------------------------------------------------------------------------------


def shard_name(kind: Kind, number: int) -> str:
    """Return the name of a shard without suffix, e.g. ``frames-00007``."""
    return f"{kind}-{number:05d}"


def frame_name(shot: int, image: int) -> str:
    """Return the name of an image in a frame shard, below its movie: ``shot_0000_img_0.jpg``."""
    return f"shot_{shot:04d}_img_{image}.jpg"


def movie_id(name: str) -> str:
    """Return the id of a movie that is called ``name`` outside; most names are ids already.

    Others become ``x_`` and the name with every byte outside ``[A-Za-z0-9-]`` as ``_`` and two
    hexadecimal digits; ``movie_name`` reverses it.

    Raises:
        DataError: the name is empty, or its id would be longer than 64 characters.
    """
    if _ID.fullmatch(name):
        return name
    raw = name.encode("utf-8", "surrogateescape")
    written = "x_" + "".join(chr(b) if b in _KEPT else f"_{b:02x}" for b in raw)
    if not name or len(written) > 64:
        raise DataError(f"movie {name!r}: the name gives no id of {_ID_WANTED}; rename its source")
    return written


def movie_name(written: str) -> str:
    """Return the name whose ``movie_id`` was written as ``x_…``."""
    raw = re.sub(
        rb"_([0-9a-f]{2})", lambda m: bytes([int(m[1], 16)]), written.removeprefix("x_").encode()
    )
    return raw.decode("utf-8", "surrogateescape")


def array_list(numbers: Iterable[int]) -> str:
    """Return numbers as a Slurm array list: ``0-3,7``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def movies_digest(movies: Iterable[str]) -> str:
    """Return the sha256 of a column of movie ids: labels name it, so they cannot be misaligned."""
    return sha256_hex("".join(f"{movie}\n" for movie in movies).encode("ascii"))


# --- plan -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedMovie:
    """One row of the plan."""

    movie: str
    """Id, ``[A-Za-z0-9_-]{1,64}``."""

    original: str
    """What the dump calls it."""

    source: str
    """Tar or folder, relative to the dump, with ``/``."""

    stamp: str
    """Changes when the source changes; enters no tar, index or manifest."""

    images: int | None
    """Images in the source, good or bad; None where only building tells."""

    n_bytes: int
    """Content bytes of these images."""

    shard: int
    """Number of its shard."""

    def row(self) -> dict[str, object]:
        """Return the row as it stands in ``plan.json``."""
        return {
            "movie": self.movie,
            "original": self.original,
            "source": self.source,
            "stamp": self.stamp,
            "images": self.images,
            "bytes": self.n_bytes,
            "shard": self.shard,
        }

    @classmethod
    def from_row(cls, row: object, where: str) -> Self:
        """Read one row of ``plan.json``."""
        images = row.get("images") if isinstance(row, dict) else None
        return cls(
            movie=_checked_id(_take(row, "movie", str, where), where),
            original=_take(row, "original", str, where),
            source=_take(row, "source", str, where),
            stamp=_take(row, "stamp", str, where),
            images=None if images is None else _take(row, "images", int, where),
            n_bytes=_take(row, "bytes", int, where),
            shard=_take(row, "shard", int, where),
        )


@dataclass(frozen=True)
class Part:
    """Movies that came later, in shards of their own behind those that were there."""

    first: int
    """Number of its first shard."""

    parent: str
    """Digest of the manifest before."""

    def row(self) -> dict[str, object]:
        """Return it as JSON writes it."""
        return {"first": self.first, "parent": self.parent}

    @classmethod
    def from_row(cls, row: object, where: str) -> Self:
        """Read it from JSON."""
        return cls(_take(row, "first", int, where), _take(row, "parent", str, where))


@dataclass(frozen=True)
class Plan:
    """Which movie goes to which frame shard: ``plan.json``."""

    shard_bytes: int
    """Wanted content bytes of a shard."""

    movies: tuple[PlannedMovie, ...]
    """In order of id within each part; their shards rise from 0 without a gap."""

    validation: Validation = "markers"
    """How images are judged; it decides which of them are left out."""

    parts: tuple[Part, ...] = ()
    """What came later, in order; empty if everything was planned at once."""

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
        """Digest of the manifest that the last part adds shards to."""
        return self.parts[-1].parent if self.parts else None

    def made_from(self, number: int) -> str:
        """Return the digest of a shard's plan entry, source stamps included."""
        rows = [movie.row() for movie in self.shards[number]]
        entry = {"format": FORMAT, "frames": rows}
        return sha256_hex(canonical_json(entry | self._validation_row()))

    def to_bytes(self) -> bytes:
        """Return ``plan.json``, one movie a line."""
        head: dict[str, object] = {
            "format": FORMAT,
            "kind": "frames",
            "shard_bytes": self.shard_bytes,
        }
        parts = {"parts": [part.row() for part in self.parts]} if self.parts else {}
        head |= self._validation_row() | parts
        return _json_with_rows(head, "movies", [movie.row() for movie in self.movies])

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Read ``plan.json``.

        Raises:
            DataError: it is damaged, or its movies or shards are out of order.
        """
        tree = _tree(data, where)
        _check_kind(tree, "frames", where)
        rows = _take(tree, "movies", list, where)
        movies = tuple(
            PlannedMovie.from_row(row, f"{where}: movies[{k}]") for k, row in enumerate(rows)
        )
        parts = _take(tree, "parts", list, where) if "parts" in tree else []
        plan = cls(
            _take(tree, "shard_bytes", int, where),
            movies,
            _validation(tree, where),
            tuple(Part.from_row(row, f"{where}: parts[{k}]") for k, row in enumerate(parts)),
        )
        plan._check(where)
        return plan

    def _validation_row(self) -> dict[str, object]:
        # Left out where it is the default: what was planned before there was a choice still holds.
        return {} if self.validation == "markers" else {"validate": self.validation}

    def _check(self, where: str) -> None:
        steps = [b.shard - a.shard for a, b in pairwise(self.movies)]
        if (self.movies and self.movies[0].shard != 0) or not set(steps) <= {0, 1}:
            raise DataError(f"{where}: shard numbers do not rise from 0 without a gap; plan again")
        firsts = {part.first for part in self.parts}
        for a, b in pairwise(self.movies):
            if a.movie >= b.movie and not (a.shard < b.shard and b.shard in firsts):
                raise DataError(f"{where}: movies are not in strict order of id; plan again")
        if len({movie.movie for movie in self.movies}) < len(self.movies):
            raise DataError(f"{where}: a movie stands there twice; plan again")


def _validation(tree: Mapping[str, object], where: str) -> Validation:
    value = tree.get("validate", "markers")
    if value == "markers" or value == "decode":
        return value
    raise DataError(f"{where}: validate: got {value!r}, want 'markers' or 'decode'")


# --- sidecar --------------------------------------------------------------------------------------


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
        return cls(*(_take(row, key, str, where) for key in ("movie", "member", "reason")))


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

    made_from: str
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
            "made_from": self.made_from,
            "index": self.index,
            "statistics": dict(self.statistics),
            "information": dict(self.information),
        }
        return _json_with_rows(head, "rejected", [row.row() for row in self.rejected])

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Read a sidecar.

        Raises:
            DataError: it is damaged or of another version.
        """
        tree = _tree(data, where)
        movies = _take(tree, "movies", list, where)
        rows = _take(tree, "rejected", list, where)
        index = tree.get("index")
        return cls(
            name=_take(tree, "name", str, where),
            n_bytes=_take(tree, "bytes", int, where),
            sha256=_take(tree, "sha256", str, where),
            samples=_take(tree, "samples", int, where),
            movies=tuple(_checked_id(movie, where) for movie in movies),
            made_from=_take(tree, "made_from", str, where),
            index=None if index is None else _take(tree, "index", str, where),
            statistics=_take(tree, "statistics", dict, where),
            rejected=tuple(Rejected.from_row(row, where) for row in rows),
            information=_take(tree, "information", dict, where),
        )


# --- manifest -------------------------------------------------------------------------------------


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
            name=_take(row, "name", str, where),
            n_bytes=_take(row, "bytes", int, where),
            sha256=_take(row, "sha256", str, where),
            samples=_take(row, "samples", int, where),
            movies=_take(row, "movies", int, where),
            index=None if index is None else _take(row, "index", str, where),
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
        return _json_with_rows(head, "shards", [shard.row() for shard in self.shards])

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Read ``manifest.json``.

        Raises:
            DataError: it is damaged or of another version or kind.
        """
        tree = _tree(data, where)
        kind = _take(tree, "kind", str, where)
        if kind not in ("frames", "features"):
            raise DataError(f"{where}: kind: got {kind!r}, want 'frames' or 'features'")
        rows = _take(tree, "shards", list, where)
        made = cls(
            kind="frames" if kind == "frames" else "features",
            provenance=_take(tree, "provenance", dict, where),
            shards=tuple(ManifestShard.from_row(row, where) for row in rows),
            index=None if tree.get("index") is None else _take(tree, "index", str, where),
            parent=None if tree.get("parent") is None else _take(tree, "parent", str, where),
            renamed=_take(tree, "renamed", dict, where),
        )
        if made.to_bytes() != data:
            # The digest is taken of the bytes: an edited file must not pass under an old digest.
            raise DataError(f"{where}: not in canonical form, edited by hand? seal again")
        return made


# --- indices --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FrameIndex:
    """Where each image lies in a frame shard, in the order of the tar."""

    offset: npt.NDArray[np.uint64]
    """``[N]`` first byte of the JPEG, from the start of the tar."""

    size: npt.NDArray[np.uint32]
    """``[N]`` bytes of the JPEG."""

    movie: npt.NDArray[np.uint32]
    """``[N]`` position in the shard's list of movies."""

    shot: npt.NDArray[np.int32]
    """``[N]``"""

    image: npt.NDArray[np.int16]
    """``[N]`` number of the image within its shot."""

    def __len__(self) -> int:
        return len(self.offset)

    def to_bytes(self) -> bytes:
        """Return ``NAME-00000.index.npz``."""
        return npz_bytes(
            {name: getattr(self, name).astype(dtype) for name, dtype in _FRAME_COLUMNS.items()}
        )

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Read ``NAME-00000.index.npz``.

        Raises:
            DataError: it is damaged, or its columns do not fit together.
        """
        return cls(**_columns(data, where, _FRAME_COLUMNS))


@dataclass(frozen=True, eq=False)
class FeatureIndex:
    """Where each movie's rows lie in a feature set, in order of shards and of their movies."""

    movie_id: npt.NDArray[np.bytes_]
    """``[M]`` ids, fixed width."""

    shard: npt.NDArray[np.uint32]
    """``[M]`` number of the shard."""

    offset: npt.NDArray[np.uint64]
    """``[M]`` first byte of the first row, from the start of the tar."""

    rows: npt.NDArray[np.uint32]
    """``[M]`` number of rows."""

    def __len__(self) -> int:
        return len(self.movie_id)

    @cached_property
    def movies(self) -> tuple[str, ...]:
        """The ids as text."""
        return tuple(name.decode("ascii") for name in self.movie_id.tolist())

    def to_bytes(self) -> bytes:
        """Return ``index.npz``."""
        width = max((len(name) for name in self.movie_id.tolist()), default=1)
        columns = {
            name: getattr(self, name).astype(dtype) for name, dtype in _FEATURE_COLUMNS.items()
        }
        return npz_bytes({"movie_id": self.movie_id.astype(f"S{max(1, width)}"), **columns})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Read ``index.npz``.

        Raises:
            DataError: it is damaged, or its columns do not fit together.
        """
        return cls(**_columns(data, where, {"movie_id": "S", **_FEATURE_COLUMNS}))


_FRAME_COLUMNS = {"offset": "<u8", "size": "<u4", "movie": "<u4", "shot": "<i4", "image": "<i2"}
_FEATURE_COLUMNS = {"shard": "<u4", "offset": "<u8", "rows": "<u4"}


def _columns(data: bytes, where: str, dtypes: Mapping[str, str]) -> dict[str, npt.NDArray[Any]]:
    columns = npz_arrays(data, where, dtypes)
    for name, dtype in dtypes.items():
        got = columns[name]
        fits = got.dtype.kind == "S" if dtype == "S" else got.dtype == np.dtype(dtype)
        if not fits or got.ndim != 1:
            raise DataError(f"{where}: {name}: got {got.dtype} {list(got.shape)}, want {dtype} [N]")
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{where}: columns differ in length ({lengths}); make it again")
    return columns


# --- JSON -----------------------------------------------------------------------------------------


def _json(value: object) -> str:
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def _json_with_rows(
    head: Mapping[str, object], rows_key: str, rows: Sequence[Mapping[str, object]]
) -> bytes:
    """Canonical JSON with one line for each key, and one for each row of one list."""
    body = ",\n".join(_json(row) for row in rows)
    values = {key: _json(value) for key, value in head.items()}
    values[rows_key] = f"[\n{body}\n]" if rows else "[]"
    lines = ",\n".join(f"{_json(key)}:{values[key]}" for key in sorted(values))
    return f"{{\n{lines}\n}}\n".encode("ascii")


def _tree(data: bytes, where: str) -> dict[str, Any]:
    try:
        tree = json.loads(data)
    except ValueError as error:
        raise DataError(f"{where}: not whole JSON ({error}); make it again") from None
    version = tree.get("format") if isinstance(tree, dict) else None
    if version != FORMAT:
        raise DataError(f"{where}: format: got {version!r}, want {FORMAT}; made by another version")
    return dict(tree)


def _check_kind(tree: Mapping[str, object], kind: Kind, where: str) -> None:
    if tree.get("kind") != kind:
        raise DataError(f"{where}: kind: got {tree.get('kind')!r}, want {kind!r}")


def _take(tree: object, key: str, kind: type[T], where: str) -> T:
    value = tree.get(key) if isinstance(tree, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        got = repr(value)[:60]
        raise DataError(f"{where}: {key}: got {got}, want {kind.__name__}; damaged?")
    return value


def _checked_id(value: object, where: str) -> str:
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise DataError(f"{where}: movie id: got {str(value)[:80]!r}, want {_ID_WANTED}")
    return value
