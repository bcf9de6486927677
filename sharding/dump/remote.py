"""A dump on an object store or an HTTP server, whose archives are read by ranges.

s3://BUCKET/240P/                           all tars and zips directly below the URL
s3://BUCKET/movies.zip                      one archive
https://HOST/{tt0000001,tt0000002}.tar.gz   all archives of a pattern
https://HOST/movies.zip?X-Amz-Signature=…   one archive by a signed URL
names.txt                                   all URLs or patterns of the file, signed or not

Plan and messages contain URLs without password and signature. So a plan remains valid after the
URLs have been signed again.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import BinaryIO

from configs.errors import ConfigError, DataError
from configs.redaction import bare_url, has_secret, redact_urls
from configs.schema import StorageConfig
from sharding.dump.readers import Readable
from sharding.storage.base import Range, Storage, is_url, missing_file
from sharding.storage.location import split_file
from sharding.storage.open import open_storage

_MIN_READ_BYTES = 64 * 1024
_MAX_READ_BYTES = 16 * 1024**2
"""Bytes of a read: few at first, since a header may suffice, then four times as many each time."""

_MAX_COPY_BYTES = 2 * 1024**3
"""A larger file is not copied: it is not a single movie, and ``TMPDIR`` may be small."""


@dataclass(frozen=True)
class RemoteDump:
    """The location of a remote dump, and how to reach it."""

    location: str = field(repr=False)
    config: StorageConfig

    def __truediv__(self, path: str) -> str:
        """Return the URL of a source, for messages; the path of a source is a URL already."""
        return path or str(self)

    def __str__(self) -> str:
        """Return the location, without password and signature."""
        return redact_urls(self.location)

    def urls(self, suffixes: tuple[str, ...]) -> list[str]:
        """Return the URLs of the archives, without passwords and signatures.

        Args:
            suffixes: Suffixes of archive names.

        Raises:
            ConfigError: a pattern or file of names contains something other than URLs of archives.
            DataError: an HTTP server, which lists no files; a missing file of names; or no archive
                below the URL.
        """
        bare = bare_url(self.location).lower()
        if not bare.endswith((".txt", *suffixes)) and "{" not in self.location:
            storage = _storage(self.location.rstrip("/"), self.config)
            names = [name for name in storage.names() if name.lower().endswith(suffixes)]
            if not names:
                raise DataError(
                    f"{self}: got no .tar, .tar.gz or .zip directly below this URL; loose images "
                    "and videos are only read from disk: pack each movie, e.g. "
                    "`tar cf tt0000001.tar tt0000001`, or set data.dump to a copy on disk"
                )
            return [f"{storage.location}/{name}" for name in names]
        for url in self._urls:
            if not is_url(url) or not url.lower().endswith(suffixes):
                raise ConfigError(f"{self}: got {url!r}, want URLs of tars or zips")
        return list(self._urls)

    @cached_property
    def _urls(self) -> dict[str, str]:
        """The URLs of a pattern or file of names as given, by their bare URLs."""
        from sharding.storage.patterns import expand

        return {
            bare_url(url) if is_url(url) else url: url for url in expand(self.location, self.config)
        }

    def open(self, url: str) -> RemoteFile:
        """Open an archive by its URL of ``urls``.

        Raises:
            DataError: the archive does not exist.
        """
        if has_secret(self.location) or self.location.endswith(".txt"):
            url = self._urls.get(url, url)
        folder, name = split_file(url)
        return RemoteFile(_storage(folder, self.config), name)


class RemoteFile(Readable):
    """A file of an object store or HTTP server; one byte range of it is buffered.

    Bytes that are read from the start without a gap, as for the listing of a tar, are also copied
    to a temporary file until the file is closed. So the images are not downloaded a second time.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self.where = f"{storage.location}/{name}"
        fingerprint = storage.fingerprint(name)
        if fingerprint is None:
            raise missing_file(storage.location, name)
        self._size, self._version = fingerprint
        self._storage, self._name = storage, name
        self._buffer_at, self._buffer = 0, b""
        self._next_bytes = _MIN_READ_BYTES
        self._copy: BinaryIO | None = None
        self._copied_bytes = 0

    def pread(self, at: int, length: int) -> bytes:
        """Return bytes; fewer only at the end."""
        buffer = bytearray(max(0, min(length, self._size - at)))
        self.pread_into(at, memoryview(buffer))
        return bytes(buffer)

    def pread_into(self, at: int, buffer: memoryview) -> int:
        """Fill ``buffer``; return the number of bytes, fewer only at the end."""
        length = max(0, min(len(buffer), self._size - at))
        done = 0
        while done < length:
            start = at + done - self._buffer_at
            if not 0 <= start < len(self._buffer):
                self._fill_buffer(at + done, length - done)
                start = at + done - self._buffer_at
            piece = memoryview(self._buffer)[start : start + length - done]
            buffer[done : done + len(piece)] = piece
            done += len(piece)
        return length

    def end(self) -> int:
        """Return the size in bytes."""
        return self._size

    def fingerprint(self) -> str:
        """Return size and ETag; the storage raises an error if they change during a read."""
        return f"{self._size}:{self._version}"

    def close(self) -> None:
        """Release buffer and copy; connections are shared and stay open."""
        self._buffer = b""
        if self._copy is not None:
            self._copy.close()
            self._copy = None

    def _fill_buffer(self, at: int, length: int) -> None:
        """Buffer a range that contains the byte ``at``, longer with each sequential read."""
        if self._copy is not None and at < self._copied_bytes:
            self._copy.seek(at)
            size = min(max(length, _MIN_READ_BYTES), self._copied_bytes - at)
            self._buffer_at, self._buffer = at, self._copy.read(size)
            return
        end = self._buffer_at + len(self._buffer)
        sequential = 0 <= at - end < self._next_bytes
        # The copy may have no gap, so bytes that a sequential read skips are read as well.
        begin = end if sequential and end == self._copied_bytes else at
        # A listing jumps from header to header, and images are read one after the other.
        self._next_bytes = (
            min(4 * self._next_bytes, _MAX_READ_BYTES) if sequential else _MIN_READ_BYTES
        )
        size = max(at - begin + length, self._next_bytes)
        buffer = bytearray(min(size, _MAX_READ_BYTES, self._size - begin))
        self._storage.read_into([Range(self._name, begin)], [memoryview(buffer)])
        self._buffer_at, self._buffer = begin, bytes(buffer)
        self._append_to_copy(begin, self._buffer)

    def _append_to_copy(self, at: int, data: bytes) -> None:
        if at != self._copied_bytes or self._size > _MAX_COPY_BYTES:
            return
        try:
            if self._copy is None:
                self._copy = tempfile.TemporaryFile()  # noqa: SIM115  # closed with this file
            self._copy.seek(at)
            self._copy.write(data)
            self._copy.flush()
        except OSError:
            return  # TMPDIR is full: these bytes are downloaded twice
        self._copied_bytes += len(data)


@lru_cache(maxsize=16)
def _storage(folder: str, config: StorageConfig) -> Storage:
    return open_storage(folder, config)  # cached: all files of a folder share connections
