"""Publication of one shard, of frames or features: tar, then index, then sidecar.

The sidecar commits the shard. A kill can leave a tar or index without a sidecar, which counts as
missing, or a temporary file, which no reader opens.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, BinaryIO

from configs.errors import DataError
from configs.runtime.hints import hint
from sharding.format import tar
from sharding.format.encoding import sha256_hex
from sharding.format.manifest import Manifest, Rejected, Sidecar
from sharding.format.names import MANIFEST, Kind, index_name, sidecar_name, tar_name
from sharding.storage.base import Storage

logger = logging.getLogger(__name__)
_FILE = re.compile(r"(?:frames|features)-([0-9]+)\.(?:tar|json|index\.npz)")
PIECE_BYTES = 2 * 1024**2
"""Bytes per read, write and hash call: small ones cost overhead, large ones miss the CPU cache."""
PIECES = 3
"""Maximum number of full buffers in flight: one written, one hashed, one waiting."""


def read_manifest(storage: Storage) -> Manifest | None:
    """Return the manifest of a set; None if it is not sealed.

    Raises:
        DataError: the manifest is corrupt.
    """
    if storage.size(MANIFEST) is None:
        return None
    return Manifest.from_bytes(storage.read(MANIFEST), f"{storage.location}/{MANIFEST}")


def read_sidecar(storage: Storage, kind: Kind, number: int) -> Sidecar | None:
    """Return the sidecar of a complete shard; None if the shard counts as missing.

    Compares sizes only; ``verify`` compares digests.
    """
    sidecar = sidecar_alone(storage, kind, number)
    if sidecar is None:
        return None
    has_tar = (
        sidecar.name == tar_name(kind, number) and storage.size(sidecar.name) == sidecar.n_bytes
    )
    has_index = sidecar.index is None or storage.size(index_name(kind, number)) is not None
    return sidecar if has_tar and has_index else None


def sidecar_alone(storage: Storage, kind: Kind, number: int) -> Sidecar | None:
    """Return the sidecar of a shard even without its tar; None if it is missing or corrupt.

    The sidecar of a temporary frame shard remains after its tar was removed, as a record of it.
    """
    name = sidecar_name(kind, number)
    if storage.size(name) is None:
        return None
    try:
        return Sidecar.from_bytes(storage.read(name), f"{storage.location}/{name}")
    except DataError as error:
        logger.warning("%s; the shard counts as missing", error)
        return None


def shard_done(
    storage: Storage, kind: Kind, number: int, input_digest: str, *, replace: bool = False
) -> bool:
    """Return whether a shard is complete and has this input digest.

    Args:
        storage: Storage of the set.
        kind: Frames or features.
        number: Shard number.
        input_digest: Digest of everything its bytes depend on.
        replace: Count a shard with another input digest as missing.

    Raises:
        DataError: the shard has another input digest, and ``replace`` is off.
    """
    sidecar = read_sidecar(storage, kind, number)
    if sidecar is None:
        return False
    if sidecar.input_digest != input_digest and not replace:
        raise DataError(
            f"{storage.location}/{sidecar.name}: input digest: got {sidecar.input_digest[:12]}, "
            f"want {input_digest[:12]}; source or options changed; {_replace(kind)} to rebuild it"
        )
    return sidecar.input_digest == input_digest


def _replace(kind: Kind) -> str:
    # Features are made by an encoder or an import, so only the option can be named.
    if kind == "frames":
        return f"run {hint('movienet-shard build --replace')}"
    return "pass `--replace`"


def files_beyond(storage: Storage, n_shards: int) -> list[str]:
    """Return the shard files that do not belong to a set of ``n_shards``, sidecars first.

    Other tools that stream all tars of the folder would read them.
    """
    matches = [(name, match) for name in storage.names() if (match := _FILE.fullmatch(name))]
    beyond = [name for name, match in matches if int(match[1]) >= n_shards]
    return sorted(beyond, key=lambda name: (not name.endswith(".json"), name))


def clear_beyond(storage: Storage, n_shards: int, *, replace: bool) -> None:
    """Remove the manifest and all shard files that do not belong to a set of ``n_shards``.

    Raises:
        DataError: there are such files, and ``replace`` is off.
    """
    names = files_beyond(storage, n_shards)
    if names and not replace:
        raise DataError(
            f"{storage.location}: got {names[0]}, want {n_shards} shards: an older plan had more; "
            f"{_replace('frames' if names[0].startswith('frames') else 'features')} to remove them"
        )
    for name in [MANIFEST, *names] if names else ():
        storage.remove(name)


@dataclass
class TarDigest:
    """Size and digest of a tar; valid after the end of its ``tar_writer`` block."""

    n_bytes: int = 0
    sha256: str = ""


class TarWriter:
    """Writer of a tar that writes and hashes full buffers while the next one fills.

    Writing, hashing and the caller's reads release the interpreter lock, so they overlap.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._buffer = bytearray(PIECE_BYTES)
        self._at = 0
        self._written = 0
        self._digest = hashlib.sha256()
        self._in_flight: deque[_Piece] = deque()
        # One thread each: pieces are written and hashed in order.
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._hashing = ThreadPoolExecutor(1, thread_name_prefix="sha256")

    def reserve(self, size: int) -> memoryview:
        """Return a buffer for the content of the next member; then ``commit``, or reserve again.

        The buffer may be filled with a run of members with their header blocks between them. They
        are then committed one by one; after a rejected member, each following one is reserved again
        and moved. A member never moves backwards, so none is overwritten before it is committed.
        """
        need = tar.BLOCK + size + tar.padding(size)
        if self._at + need > len(self._buffer):
            self._flush()
        if need > len(self._buffer):
            self._buffer = bytearray(need)
        begin = self._at + tar.BLOCK
        return memoryview(self._buffer)[begin : begin + size]

    def commit(self, name: str, size: int) -> int:
        """Commit the reserved buffer as a member; return the offset of its content in the tar."""
        content = self._at + tar.BLOCK
        after = content + size + tar.padding(size)
        self._buffer[self._at : content] = tar.header(name, size)
        self._buffer[content + size : after] = bytes(after - content - size)
        self._at = after
        return self._written + content

    def add(self, name: str, *pieces: bytes | memoryview) -> int:
        """Add a member from bytes in memory; return the offset of its content in the tar."""
        size = sum(len(piece) for piece in pieces)
        buffer, at = self.reserve(size), 0
        for piece in pieces:
            buffer[at : at + len(piece)] = piece
            at += len(piece)
        buffer.release()
        return self.commit(name, size)

    def finish(self) -> TarDigest:
        """Close the tar and return its size and digest."""
        self._flush()
        closing = tar.end(self._written)
        self._buffer[: len(closing)] = closing
        self._at = len(closing)
        self._flush()
        while self._in_flight:
            self._in_flight.popleft().wait()
        return TarDigest(self._written, self._digest.hexdigest())

    def close(self) -> None:
        """Stop the threads after the pieces in flight."""
        self._writing.shutdown()
        self._hashing.shutdown()

    def _flush(self) -> None:
        piece = memoryview(self._buffer)[: self._at]
        tasks = (
            self._writing.submit(self._write, piece, self._written),
            self._hashing.submit(self._digest.update, piece),
        )
        self._in_flight.append(_Piece(self._buffer, tasks))
        self._written += self._at
        self._at = 0
        # Reuse the oldest buffer once the limit is reached: this bounds the memory of a worker.
        is_full = len(self._in_flight) == PIECES
        self._buffer = self._in_flight.popleft().wait() if is_full else bytearray(PIECE_BYTES)

    def _write(self, piece: memoryview, offset: int) -> None:
        self._file.write(piece)
        # Starts the disk write now; otherwise the disk would idle until the final sync.
        if isinstance(self._file, io.BufferedWriter) and hasattr(os, "posix_fadvise"):
            self._file.flush()
            os.posix_fadvise(self._file.fileno(), offset, len(piece), os.POSIX_FADV_DONTNEED)


@dataclass(frozen=True)
class _Piece:
    """Full buffer that is being written and hashed."""

    buffer: bytearray
    tasks: tuple[Future[Any], ...]

    def wait(self) -> bytearray:
        """Return the buffer for reuse; raise the error of a failed write."""
        wait(self.tasks)  # for both: the buffer must not be refilled while it is hashed
        for task in self.tasks:
            task.result()
        return self.buffer


@contextmanager
def tar_writer(storage: Storage, kind: Kind, number: int) -> Iterator[tuple[TarWriter, TarDigest]]:
    """Publish the tar of a shard if the block succeeds.

    The manifest, then the old sidecar are removed before the new tar replaces the old one, so a
    kill cannot leave an old sidecar with a new tar.
    """
    digest = TarDigest()
    with storage.publishing(tar_name(kind, number), replace=True) as file:
        writer = TarWriter(file)
        try:
            yield writer, digest
            done = writer.finish()
            digest.n_bytes, digest.sha256 = done.n_bytes, done.sha256
        finally:
            writer.close()
        storage.remove(MANIFEST)
        storage.remove(sidecar_name(kind, number))


@dataclass(frozen=True)
class Content:
    """Entries of a sidecar that describe the content of a shard."""

    samples: int
    movies: tuple[str, ...]
    input_digest: str
    statistics: Mapping[str, object] = field(default_factory=dict)
    rejected: tuple[Rejected, ...] = ()
    information: Mapping[str, object] = field(default_factory=dict)


def commit_shard(
    storage: Storage,
    kind: Kind,
    number: int,
    digest: TarDigest,
    content: Content,
    index: bytes | None = None,
) -> Sidecar:
    """Publish index and sidecar of a published tar; return the sidecar."""
    if index is not None:
        storage.publish(index_name(kind, number), index, replace=True)
    sidecar = Sidecar(
        name=tar_name(kind, number),
        n_bytes=digest.n_bytes,
        sha256=digest.sha256,
        samples=content.samples,
        movies=content.movies,
        input_digest=content.input_digest,
        index=None if index is None else sha256_hex(index),
        statistics=content.statistics,
        rejected=content.rejected,
        information=library_versions() | dict(content.information),
    )
    storage.publish(sidecar_name(kind, number), sidecar.to_bytes(), replace=True)
    return sidecar


def tar_digest(storage: Storage, name: str) -> TarDigest:
    """Read a complete tar; return its size and sha256."""
    digest, n_bytes = hashlib.sha256(), 0
    with storage.open(name) as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
            n_bytes += len(piece)
    return TarDigest(n_bytes, digest.hexdigest())


def library_versions() -> dict[str, object]:
    """Return the library versions that a sidecar records."""
    return {"python": sys.version.split()[0], "numpy": metadata.version("numpy")}
