"""Reads from an object store: listings, complete files, and ranges into buffers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from configs.errors import DataError
from sharding.storage.base import Range, short_file
from sharding.storage.clients import Client, ClientError, Download, FileInfo
from sharding.storage.connection import Connection
from sharding.storage.event_loop import event_loop, run_coroutine
from sharding.storage.responses import (
    ErrorResponse,
    InvalidResponseError,
    Versions,
    check_length,
    check_version,
)
from sharding.storage.transfer import Progress, receive

REQUEST_BYTES = 4 * 1024**2
"""A longer range is read in several requests."""
NEAR_BYTES = 256 * 1024
"""Bytes that a connection receives while another request waits for its response."""
MAX_FILE_BYTES = 1024**3
"""Largest file that is read completely: a manifest, plan or index; tars are read by ranges."""
Target = tuple[Range, memoryview]
"""A range, and the buffer to fill from it."""


class ObjectReader:
    """The reads of one storage.

    A body of another length, range or version than requested is a failed attempt, never data.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._in_flight = asyncio.Semaphore(connection.config.max_in_flight)
        self._versions: dict[str, Versions] = {}

    def forget(self, name: str) -> None:
        """Accept another version of a file, which this process has overwritten."""
        self._versions.pop(name, None)

    async def names(self) -> list[str]:
        """Return the names of all files, sorted."""
        prefix = self._connection.location.prefix
        names = await self._connection.retry("", lambda client: client.list_names(prefix))
        return sorted(name for name in names if name and not name.startswith("."))

    async def fingerprint(self, name: str) -> tuple[int, str] | None:
        """Return size and ETag (or modification time) of a file; None if it does not exist."""
        key = self._connection.location.key(name)

        async def head(client: Client) -> tuple[int, str] | None:
            try:
                file = await client.head(key)
            except FileNotFoundError:
                return None
            modified = file.modified.isoformat()
            if self._connection.location.is_http and _is_dated(file):
                return file.size, modified  # ETags of some servers differ between mirrors
            return file.size, file.version or modified

        fingerprint = await self._connection.retry(name, head)
        if fingerprint is None:
            await self._connection.check_bucket()
        return fingerprint

    async def read(self, name: str) -> bytes:
        """Return a complete file; a large one is requested in ranges."""
        key = self._connection.location.key(name)

        async def get(client: Client) -> tuple[FileInfo, bytes | None]:
            download = await client.get_beginning(key, REQUEST_BYTES)
            if download.file.size > MAX_FILE_BYTES:
                raise DataError(
                    f"{self._connection.url}/{name}: the server states {download.file.size:,} "
                    f"bytes, want at most {MAX_FILE_BYTES:,} for a manifest, plan or index"
                )
            if download.file.size > REQUEST_BYTES:
                return download.file, None
            data = await download.receive_async()
            check_length(len(data), download.file.size)
            return download.file, data

        file, data = await self._connection.retry(name, get)
        if data is not None:
            return data
        buffer = bytearray(file.size)
        pieces = _split([(Range(name, 0), memoryview(buffer))])
        await self.read_pieces(pieces, {name: self._versions_of(file)})
        return bytes(buffer)

    def read_into(self, targets: Sequence[Target]) -> None:
        """Fill all buffers; any number of threads may call this.

        Adjacent ranges are read as one. A single range is first read in this thread, at half the
        cost of the event loop; the loop reads several ranges, and retries a failed one.
        """
        started = time.monotonic()
        cover = _covering(targets)
        if cover is None:
            self._fill(targets, started)
            return
        buffer = memoryview(bytearray(cover.length))
        self._fill([(Range(cover.name, cover.offset), buffer)], started)
        for part, view in targets:
            begin = part.offset - cover.offset
            view[:] = buffer[begin : begin + len(view)]

    async def read_pieces(
        self,
        pieces: Sequence[Target],
        versions: dict[str, Versions],
        seconds_left: float | None = None,
        failed: Exception | None = None,
    ) -> None:
        """Fill all buffers concurrently; after this ends, even by an error, no buffer is written.

        Args:
            pieces: Ranges of at most ``REQUEST_BYTES``.
            versions: Of each file, as first seen.
            seconds_left: Until time is up; default: ``storage.timeout``.
            failed: The error of a first attempt.
        """
        if seconds_left is None:
            seconds_left = self._connection.config.timeout
        deadline = asyncio.get_running_loop().time() + seconds_left
        tasks = [
            asyncio.ensure_future(self._read_piece(part, view, versions, deadline, failed))
            for part, view in pieces
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            # The buffers belong to the caller: no task may write to them after this returns.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _fill(self, targets: Sequence[Target], started: float) -> None:
        pieces = _split(targets)
        failed = self._read_in_this_thread(*pieces[0]) if len(pieces) == 1 else None
        if len(pieces) != 1 or failed is not None:
            left = self._connection.config.timeout - (time.monotonic() - started)
            run_coroutine(self.read_pieces(pieces, self._versions, left, failed))

    def _read_in_this_thread(self, part: Range, view: memoryview) -> Exception | None:
        """Try once to read a range; return the error of a failed attempt."""
        event_loop()  # raises in a forked process, whose connections are not usable
        key, end = self._connection.location.key(part.name), part.offset + len(view)
        try:
            download = self._connection.client().get_range(key, part.offset, end)
            self._check(download, part, len(view), self._versions)
            data = download.receive()
            check_length(len(data), len(view))
        except (ClientError, OSError, ValueError, InvalidResponseError) as error:
            return error
        view[:] = data
        self._connection.count()
        return None

    async def _read_piece(
        self,
        part: Range,
        view: memoryview,
        versions: dict[str, Versions],
        deadline: float,
        failed: Exception | None,
    ) -> None:
        key, end = self._connection.location.key(part.name), part.offset + len(view)
        # The failed attempt of the caller's thread counts as the first one here.
        progress, pending = Progress(), [failed] if failed is not None else []

        async def get(client: Client) -> None:
            try:
                if pending:
                    raise pending.pop()
                download = await client.get_range_async(key, part.offset, end)
            except ClientError as error:
                if ErrorResponse.parse(error).status == 416:
                    raise short_file(self._connection.url, part, 0, len(view)) from None
                raise
            self._check(download, part, len(view), versions)
            await receive(download.chunks(), view, progress)

        async with self._in_flight:
            await self._connection.retry(
                part.name,
                get,
                deadline=deadline,
                progress=progress,
                was_read=part.name in versions,
            )

    def _check(
        self, download: Download, part: Range, length: int, versions: dict[str, Versions]
    ) -> None:
        """Raise an error unless a response has the version and range that were requested."""
        check_version(versions, part.name, self._versions_of(download.file))
        begin, end = part.offset, part.offset + length
        if download.begin == begin and download.end == download.file.size < end:
            raise short_file(self._connection.url, part, download.end - begin, length)
        if (download.begin, download.end) != (begin, end):
            got = (download.begin, download.end)
            raise InvalidResponseError(f"got bytes {got}, want {(begin, end)}")

    def _versions_of(self, file: FileInfo) -> Versions:
        dated = f"{file.size} bytes of {file.modified:%Y-%m-%d %H:%M:%S}"
        if not file.version:
            return (dated,)
        # Mirrors of one HTTP server may send different ETags, made e.g. from inode numbers.
        is_mirrored = self._connection.location.is_http and _is_dated(file)
        return (f"ETag {file.version}", dated) if is_mirrored else (f"ETag {file.version}",)


def _is_dated(file: FileInfo) -> bool:
    return file.modified.timestamp() > 0  # obstore's value for a response without a date is 1970


@dataclass(frozen=True)
class _Cover:
    """One range that contains several."""

    name: str
    offset: int
    length: int


def _covering(targets: Sequence[Target]) -> _Cover | None:
    """Return the range that contains several of one file; None if they are not adjacent."""
    names = {part.name for part, _ in targets}
    if len(targets) < 2 or len(names) > 1:
        return None
    begin = min(part.offset for part, _ in targets)
    end = max(part.offset + len(view) for part, view in targets)
    return _Cover(names.pop(), begin, end - begin) if end - begin <= NEAR_BYTES else None


def _split(targets: Sequence[Target]) -> list[Target]:
    """Split ranges into pieces of at most one request each."""
    return [
        (Range(part.name, part.offset + begin), view[begin : begin + REQUEST_BYTES])
        for part, view in targets
        for begin in range(0, len(view), REQUEST_BYTES)
    ]
