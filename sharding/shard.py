"""How one shard becomes part of a set: tar, then index, then sidecar; the sidecar commits it.

Both kinds of shards go this way. What a kill leaves behind is a tar or index without a sidecar,
which counts as absent, or a temporary file, which nobody sees.
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
from sharding.format import tar
from sharding.format.encoding import sha256_hex
from sharding.format.manifest import Rejected, Sidecar
from sharding.format.names import MANIFEST, Kind, index_name, sidecar_name, tar_name
from sharding.storage.base import Storage

logger = logging.getLogger(__name__)
_FILE = re.compile(r"(?:frames|features)-([0-9]+)\.(?:tar|json|index\.npz)")
PIECE_BYTES = 2 * 1024**2
"""Read, written and hashed at once: small pieces cost calls, large ones leave the core's cache."""
PIECES = 3
"""Full buffers under way at most: one written, one hashed, one waiting."""


def read_sidecar(storage: Storage, kind: Kind, number: int) -> Sidecar | None:
    """Return the sidecar of a shard that is whole; None if the shard counts as absent.

    Looks at the sizes only; hashing is ``verify``'s work.
    """
    sidecar = sidecar_alone(storage, kind, number)
    if sidecar is None:
        return None
    whole = sidecar.name == tar_name(kind, number) and storage.size(sidecar.name) == sidecar.n_bytes
    indexed = sidecar.index is None or storage.size(index_name(kind, number)) is not None
    return sidecar if whole and indexed else None


def sidecar_alone(storage: Storage, kind: Kind, number: int) -> Sidecar | None:
    """Return the sidecar of a shard, wherever its tar is; None if there is none, or it is damaged.

    Also where the tar was dropped: then the sidecar tells what it was.
    """
    name = sidecar_name(kind, number)
    if storage.size(name) is None:
        return None
    try:
        return Sidecar.from_bytes(storage.read(name), f"{storage.location}/{name}")
    except DataError as error:
        logger.warning("%s; the shard counts as absent", error)
        return None


def shard_done(
    storage: Storage, kind: Kind, number: int, input_digest: str, *, replace: bool = False
) -> bool:
    """Tell whether a shard is there, made from just this.

    Args:
        storage: Where the set lies.
        kind: Frames or features.
        number: Of the shard.
        input_digest: Digest of everything its bytes depend on.
        replace: Count a shard that was made from something else as absent.

    Raises:
        DataError: the shard was made from something else, and ``replace`` is off.
    """
    sidecar = read_sidecar(storage, kind, number)
    if sidecar is None:
        return False
    if sidecar.input_digest != input_digest and not replace:
        raise DataError(
            f"{storage.location}/{sidecar.name}: made from {sidecar.input_digest[:12]}, want "
            f"{input_digest[:12]}: its source or options changed; say --replace to build it again"
        )
    return sidecar.input_digest == input_digest


def files_beyond(storage: Storage, n_shards: int) -> list[str]:
    """Return the files of shards that a set of ``n_shards`` has not, sidecars first.

    Whoever lists the tars would stream them.
    """
    found = [(name, match) for name in storage.names() if (match := _FILE.fullmatch(name))]
    beyond = [name for name, match in found if int(match[1]) >= n_shards]
    return sorted(beyond, key=lambda name: (not name.endswith(".json"), name))


def clear_beyond(storage: Storage, n_shards: int, *, replace: bool) -> None:
    """Remove the files of shards that a set of ``n_shards`` has not; first its seal.

    Raises:
        DataError: there are such files, and ``replace`` is off.
    """
    names = files_beyond(storage, n_shards)
    if names and not replace:
        raise DataError(
            f"{storage.location}: got {names[0]}, want {n_shards} shards: others were planned "
            "before; say --replace to remove what is beyond"
        )
    for name in [MANIFEST, *names] if names else ():
        storage.remove(name)


@dataclass
class TarDigest:
    """Size and digest of a tar; final when its ``tar_writer`` block has ended."""

    n_bytes: int = 0
    sha256: str = ""


class TarWriter:
    """Collects members in large buffers; each is written and hashed while the next one fills.

    Writing, hashing and the caller's reading let go of the interpreter lock, so they overlap.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._buffer = bytearray(PIECE_BYTES)
        self._at = 0
        self._written = 0
        self._digest = hashlib.sha256()
        self._under_way: deque[_Piece] = deque()
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._hashing = ThreadPoolExecutor(1, thread_name_prefix="sha256")

    def reserve(self, size: int) -> memoryview:
        """Return room for the content of the next member; ``commit`` or reserve again.

        Room for a row of members, header blocks between them, may be filled at once: members that
        are committed in turn, or reserved and moved, never lie behind where they stood in it.
        """
        need = tar.BLOCK + size + tar.padding(size)
        if self._at + need > len(self._buffer):
            self._flush()
        if need > len(self._buffer):
            self._buffer = bytearray(need)
        begin = self._at + tar.BLOCK
        return memoryview(self._buffer)[begin : begin + size]

    def commit(self, name: str, size: int) -> int:
        """Make the reserved room a member; return where its content begins in the tar."""
        content = self._at + tar.BLOCK
        after = content + size + tar.padding(size)
        self._buffer[self._at : content] = tar.header(name, size)
        self._buffer[content + size : after] = bytes(after - content - size)
        self._at = after
        return self._written + content

    def add(self, name: str, *pieces: bytes | memoryview) -> int:
        """Add a member that is at hand; return where its content begins in the tar."""
        size = sum(len(piece) for piece in pieces)
        room, at = self.reserve(size), 0
        for piece in pieces:
            room[at : at + len(piece)] = piece
            at += len(piece)
        room.release()
        return self.commit(name, size)

    def finish(self) -> TarDigest:
        """Close the tar and return its size and digest."""
        self._flush()
        closing = tar.end(self._written)
        self._buffer[: len(closing)] = closing
        self._at = len(closing)
        self._flush()
        while self._under_way:
            self._under_way.popleft().wait()
        return TarDigest(self._written, self._digest.hexdigest())

    def close(self) -> None:
        """Stop the threads; what is under way ends first."""
        self._writing.shutdown()
        self._hashing.shutdown()

    def _flush(self) -> None:
        piece = memoryview(self._buffer)[: self._at]
        tasks = (
            self._writing.submit(self._write, piece, self._written),
            self._hashing.submit(self._digest.update, piece),
        )
        self._under_way.append(_Piece(self._buffer, tasks))
        self._written += self._at
        self._at = 0
        full = len(self._under_way) == PIECES
        self._buffer = self._under_way.popleft().wait() if full else bytearray(PIECE_BYTES)

    def _write(self, piece: memoryview, offset: int) -> None:
        self._file.write(piece)
        # Lets the disk begin at once; else it idles until the sync at the end, which then waits.
        if isinstance(self._file, io.BufferedWriter) and hasattr(os, "posix_fadvise"):
            self._file.flush()
            os.posix_fadvise(self._file.fileno(), offset, len(piece), os.POSIX_FADV_DONTNEED)


@dataclass(frozen=True)
class _Piece:
    """A full buffer on its way."""

    buffer: bytearray
    tasks: tuple[Future[Any], ...]

    def wait(self) -> bytearray:
        """Return the buffer, free again; raise what went wrong."""
        wait(self.tasks)  # both: the buffer must not be filled while it is hashed
        for task in self.tasks:
            task.result()
        return self.buffer


@contextmanager
def tar_writer(storage: Storage, kind: Kind, number: int) -> Iterator[tuple[TarWriter, TarDigest]]:
    """Publish a shard's tar when the block ends well.

    Before it takes its place, what stands there stops counting: first the seal of the set, then the
    sidecar. So no kill can leave an old sidecar beside a new tar.
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
    """What the sidecar of a shard tells beside its bytes."""

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
    """Publish index and sidecar beside a tar that was published; return the sidecar."""
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
    """Read a tar from end to end; return its size and sha256."""
    digest, n_bytes = hashlib.sha256(), 0
    with storage.open(name) as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
            n_bytes += len(piece)
    return TarDigest(n_bytes, digest.hexdigest())


def library_versions() -> dict[str, object]:
    """Return what the sidecar tells of the software that made it."""
    return {"python": sys.version.split()[0], "numpy": metadata.version("numpy")}
