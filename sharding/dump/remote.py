"""A dump on an object store or an HTTP server: archives that are read by ranges.

s3://BUCKET/240P/                 every tar and zip there
s3://BUCKET/movies.zip            one
https://HOST/{tt0000001,tt0000002}.tar.gz, names.txt    those that are named
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO

from configs.errors import ConfigError
from configs.schema import StorageConfig
from sharding.dump.readers import Readable
from sharding.storage.base import Range, Storage, is_url, missing_file
from sharding.storage.open import open_storage

_LEAST_BYTES = 64 * 1024
_MOST_BYTES = 16 * 1024**2
"""Bytes of a read: few at first, since a header may be all that is wanted, then more and more."""

_KEPT_BYTES = 2 * 1024**3
"""Of a larger file nothing is kept: it is no movie, and ``TMPDIR`` may be small."""


@dataclass(frozen=True)
class RemoteDump:
    """Where such a dump lies."""

    location: str
    config: StorageConfig

    def __truediv__(self, path: str) -> str:
        """Return the URL of a source, for messages; its path is a URL already."""
        return path or self.location

    def __str__(self) -> str:
        """Return the location."""
        return self.location

    def urls(self, suffixes: tuple[str, ...]) -> list[str]:
        """Return the URLs of its archives.

        Args:
            suffixes: What the name of an archive ends with.

        Raises:
            ConfigError: a file of names names something else than URLs.
            DataError: an HTTP server, which lists nothing, or a file of names that is missing.
        """
        from sharding.storage.patterns import expand

        named = self.location.lower().endswith((".txt", *suffixes)) or "{" in self.location
        if not named:
            folder = self.location.rstrip("/")
            names = _storage(folder, self.config).names()
            return [f"{folder}/{name}" for name in names if name.lower().endswith(suffixes)]
        urls = expand(self.location, self.config)
        for url in urls:
            if not is_url(url) or not url.lower().endswith(suffixes):
                raise ConfigError(f"{self.location}: got {url!r}, want URLs of tars or zips")
        return urls

    def open(self, url: str) -> RemoteFile:
        """Open one of its archives.

        Raises:
            DataError: it is gone.
        """
        folder, _, name = url.rpartition("/")
        return RemoteFile(_storage(folder, self.config), name)


class RemoteFile(Readable):
    """One file of an object store or HTTP server, with one stretch of it in memory.

    What is read from its start on without a gap, as a tar's listing is, is kept in a temporary
    file until it is closed: the images are then not fetched a second time.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self.where = f"{storage.location}/{name}"
        found = storage.fingerprint(name)
        if found is None:
            raise missing_file(storage.location, name)
        self._size, self._version = found
        self._storage, self._name = storage, name
        self._held_at, self._held = 0, b""
        self._next_bytes = _LEAST_BYTES
        self._kept: BinaryIO | None = None
        self._kept_bytes = 0

    def pread(self, at: int, length: int) -> bytes:
        """Return bytes; fewer only at the end."""
        room = bytearray(max(0, min(length, self._size - at)))
        self.pread_into(at, memoryview(room))
        return bytes(room)

    def pread_into(self, at: int, room: memoryview) -> int:
        """Fill ``room``; return how many bytes came, fewer only at the end."""
        length = max(0, min(len(room), self._size - at))
        done = 0
        while done < length:
            inside = at + done - self._held_at
            if not 0 <= inside < len(self._held):
                self._hold(at + done, length - done)
                inside = at + done - self._held_at
            piece = memoryview(self._held)[inside : inside + length - done]
            room[done : done + len(piece)] = piece
            done += len(piece)
        return length

    def end(self) -> int:
        """Return the size."""
        return self._size

    def fingerprint(self) -> str:
        """Return size and ETag; a change while it is read is an error of the storage."""
        return f"{self._size}:{self._version}"

    def close(self) -> None:
        """Let go of what is held and kept; connections are shared."""
        self._held = b""
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def _hold(self, at: int, wanted: int) -> None:
        """Hold a stretch with the byte at ``at``: a longer one each time it goes forward."""
        if self._kept is not None and at < self._kept_bytes:
            self._kept.seek(at)
            self._held = self._kept.read(min(max(wanted, _LEAST_BYTES), self._kept_bytes - at))
            self._held_at = at
            return
        behind = self._held_at + len(self._held)
        near = 0 <= at - behind < self._next_bytes
        begin = behind if near and behind == self._kept_bytes else at  # what is kept has no gap
        self._next_bytes = min(4 * self._next_bytes, _MOST_BYTES) if near else _LEAST_BYTES
        length = max(at - begin + wanted, self._next_bytes)
        room = bytearray(min(length, _MOST_BYTES, self._size - begin))
        self._storage.read_into([Range(self._name, begin)], [memoryview(room)])
        self._held_at, self._held = begin, bytes(room)
        self._keep(begin, self._held)

    def _keep(self, at: int, held: bytes) -> None:
        if at != self._kept_bytes or self._size > _KEPT_BYTES:
            return
        try:
            if self._kept is None:
                self._kept = tempfile.TemporaryFile()  # noqa: SIM115  # closed with this
            self._kept.seek(at)
            self._kept.write(held)
            self._kept.flush()
        except OSError:
            return  # no room for it: then it is fetched twice
        self._kept_bytes += len(held)


@lru_cache(maxsize=16)
def _storage(folder: str, config: StorageConfig) -> Storage:
    return open_storage(folder, config)  # cached, since all files of a folder share connections
