"""Datasets on object stores (``s3://``, ``gs://``, ``az://``) and HTTP servers.

``ObjectStorage`` is the blocking interface; the requests run on the event loop of ``event_loop``.

    object_store -> uploads -> reads -> connection -> clients, transfer, responses, location
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO, cast

from configs.errors import DataError
from sharding.storage.base import Range, RangedFile, checked_name, file_exists, missing_file
from sharding.storage.connection import Connection
from sharding.storage.event_loop import run_coroutine
from sharding.storage.reads import NEAR_BYTES, REQUEST_BYTES, ObjectReader
from sharding.storage.space import FreeSpace
from sharding.storage.transfer import PART_BYTES
from sharding.storage.uploads import ObjectUploader

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from configs.schema import StorageConfig

_FILE_BUFFER_BYTES = 256 * 1024


class ObjectStorage:
    """The files below a URL; ``http(s)`` is read-only.

    Args:
        location: ``s3://BUCKET/PREFIX``, ``gs://…``, ``az://CONTAINER/…`` or ``http(s)://HOST/…``.
        config: How the store is reached.

    Raises:
        ConfigError: the URL is not supported, or has no bucket or host.
    """

    near_bytes = NEAR_BYTES
    request_bytes: int | None = REQUEST_BYTES
    ranges_a_call = 1  # a call blocks its thread, so there are as many requests as threads

    def __init__(self, location: str, config: StorageConfig) -> None:
        self._connection = Connection(location, config)
        self._reader = ObjectReader(self._connection)
        self._uploader = ObjectUploader(self._connection, self._reader)

    @property
    def location(self) -> str:
        """The URL, without password and signature."""
        return self._connection.url

    def names(self) -> list[str]:
        """Return the names of all files, sorted; none if there is nothing below the URL.

        Raises:
            DataError: it is an HTTP server, which lists no files.
        """
        if self._connection.location.is_http:
            raise DataError(
                f"{self.location}: an HTTP server does not list its files; give a .txt file of "
                "names, or a pattern such as frames-{000..370}.tar"
            )
        return run_coroutine(self._reader.names())

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes; None if it does not exist."""
        fingerprint = self.fingerprint(name)
        return None if fingerprint is None else fingerprint[0]

    def fingerprint(self, name: str) -> tuple[int, str] | None:
        """Return size and ETag (or modification time) of a file; None if it does not exist."""
        return run_coroutine(self._reader.fingerprint(checked_name(name)))

    def read(self, name: str) -> bytes:
        """Return the contents of a file."""
        return run_coroutine(self._reader.read(checked_name(name)))

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading and seeking."""
        size = self.size(name)
        if size is None:
            raise missing_file(self.location, name)
        file = io.BufferedReader(RangedFile(self, name, size), buffer_size=_FILE_BUFFER_BYTES)
        return cast("BinaryIO", file)

    @property
    def readers(self) -> int:
        """Best number of threads that read concurrently: ``storage.max_in_flight``."""
        return self._connection.config.max_in_flight

    def read_into(self, ranges: Sequence[Range], buffers: Sequence[memoryview]) -> None:
        """Fill each buffer from its range; any number of threads may call this."""
        targets = [
            (Range(checked_name(part.name), part.offset), buffer.cast("B"))
            for part, buffer in zip(ranges, buffers, strict=True)
        ]
        self._reader.read_into(targets)

    def copy_cached(
        self, _names: Sequence[str], _offsets: Sequence[int], _rows: Sequence[NDArray[np.uint8]], /
    ) -> bool:
        """Return False: nothing is kept in memory."""
        return False

    def counts(self) -> Mapping[str, int]:
        """Return the number of ``requests`` sent, and of ``retries`` among them."""
        return self._connection.counts()

    def publish(self, name: str, data: bytes, *, replace: bool = False) -> None:
        """Upload ``data`` to ``name`` atomically."""
        with self.publishing(name, replace=replace) as file:
            file.write(data)

    @contextmanager
    def publishing(self, name: str, *, replace: bool = False) -> Iterator[BinaryIO]:
        """Yield a file to write; it is uploaded if the block ends without an exception."""
        checked_name(name)
        self.check_writable()
        if not replace and self.size(name) is not None:
            raise file_exists(self.location, name)
        with tempfile.SpooledTemporaryFile(max_size=PART_BYTES) as file:
            try:
                yield cast("BinaryIO", file)
                size = file.seek(0, os.SEEK_END)
                file.flush()
            except OSError as error:
                # The system reports no file name when a write fails, e.g. on a full disk.
                error.filename = error.filename or f"{tempfile.gettempdir()} (for {name})"
                raise
            if size > PART_BYTES:
                file.rollover()
                handle = file.fileno()
                run_coroutine(self._uploader.put_large(name, handle, size, replace=replace))
            else:
                file.seek(0)
                run_coroutine(self._uploader.put_small(name, file.read(), replace=replace))
        self._reader.forget(name)

    def remove(self, name: str) -> None:
        """Delete a file; do nothing if it does not exist."""
        self.check_writable()
        run_coroutine(self._uploader.remove(checked_name(name)))
        self._reader.forget(name)

    def space(self) -> FreeSpace:
        """Return unknown space: an object store does not report it."""
        return FreeSpace()

    def check_writable(self) -> None:
        """Raise ``DataError`` for an HTTP server; a store refuses writes only when they happen."""
        self._uploader.check_writable()

    def sweep(self) -> None:
        """Do nothing: aborted uploads are invisible, and lifecycle rules of the bucket end them."""

    def close(self) -> None:
        """Release connections; the storage may be used again."""
        self._connection.close()
