"""Uploads to an object store, and deletions: each file appears complete or not at all."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Awaitable, Callable

from configs.errors import DataError
from sharding.storage.base import Range, file_exists
from sharding.storage.clients import Client, ClientError, ExistsError
from sharding.storage.connection import Connection, Request
from sharding.storage.reads import ObjectReader
from sharding.storage.responses import ErrorResponse, Versions
from sharding.storage.transfer import PART_BYTES, Progress, file_parts

logger = logging.getLogger(__name__)


class ObjectUploader:
    """The writes of one storage.

    Without ``replace`` no existing file is overwritten, not even one that another process uploads
    at the same time, as far as the store supports create-only writes.
    """

    def __init__(self, connection: Connection, reader: ObjectReader) -> None:
        self._connection, self._reader = connection, reader
        self._supports_create: bool | None = None

    def check_writable(self) -> None:
        """Raise ``DataError`` for an HTTP server."""
        if self._connection.location.is_http:
            raise DataError(
                f"{self._connection.url}: an HTTP server is read-only; publish to a folder or s3://"
            )

    async def put_small(self, name: str, data: bytes, *, replace: bool) -> None:
        """Upload a file in one request."""
        key = self._connection.location.key(name)
        create = not replace and await self._can_create()

        async def is_ours() -> bool:
            return await self._reader.read(name) == data

        await self._create(name, lambda client: client.put(key, data, create=create), is_ours)

    async def put_large(self, name: str, handle: int, size: int, *, replace: bool) -> None:
        """Upload an open file in parts.

        Args:
            name: The file in the store.
            handle: File descriptor of the data.
            size: Its length in bytes.
            replace: Overwrite an existing file.
        """
        if replace or not await self._can_create():
            await self._put_parts(name, handle, size)
            return
        # A multipart upload cannot be create-only, a copy within the store can.
        temporary = f".{name}-{uuid.uuid4().hex}"
        await self._put_parts(temporary, handle, size)
        key, from_key = map(self._connection.location.key, (name, temporary))

        async def is_ours() -> bool:
            return await self._has_content(name, handle, size)

        try:
            await self._create(name, lambda client: client.copy(from_key, key), is_ours)
        finally:
            await self._connection.retry(temporary, lambda client: client.delete(from_key))

    async def remove(self, name: str) -> None:
        """Delete a file; do nothing if it does not exist."""
        key = self._connection.location.key(name)

        async def delete(client: Client) -> None:
            try:
                await client.delete(key)
            except FileNotFoundError:
                await self._connection.check_bucket()

        await self._connection.retry(name, delete)

    async def _put_parts(self, name: str, handle: int, size: int) -> None:
        key, progress = self._connection.location.key(name), Progress()

        async def put(client: Client) -> None:
            parts = progress.watch(file_parts(handle, size))
            await client.put_parts(key, parts, PART_BYTES)

        await self._connection.retry(name, put, progress=progress)

    async def _create(
        self, name: str, request: Request[None], is_ours: Callable[[], Awaitable[bool]]
    ) -> None:
        """Create a file; one that a failed attempt of this upload has created is accepted."""
        attempts = 0

        async def counted(client: Client) -> None:
            nonlocal attempts
            attempts += 1
            await request(client)

        try:
            await self._connection.retry(name, counted)
        except ExistsError:
            # The response to an earlier attempt may have been lost after the store wrote the file.
            if attempts == 1 or not await is_ours():
                raise file_exists(self._connection.url, name) from None

    async def _has_content(self, name: str, handle: int, size: int) -> bool:
        """Return whether a file in the store equals an open file."""
        fingerprint = await self._reader.fingerprint(name)
        if fingerprint is None or fingerprint[0] != size:
            return False
        buffer, versions = bytearray(PART_BYTES), dict[str, Versions]()
        for offset in range(0, size, PART_BYTES):
            view = memoryview(buffer)[: min(PART_BYTES, size - offset)]
            await self._reader.read_pieces([(Range(name, offset), view)], versions)
            if os.pread(handle, len(view), offset) != view:
                return False
        return True

    async def _can_create(self) -> bool:
        """Return whether the store supports ``If-None-Match: *``, probed once with a small file."""
        if self._supports_create is None:
            key = self._connection.location.key(f".probe-{uuid.uuid4().hex}")
            try:
                self._supports_create = await self._probe_create(key)
            finally:
                await self._connection.retry("", lambda client: client.delete(key))
            if not self._supports_create:
                logger.warning(
                    "%s: the store has no create-only writes; existing files are still detected, "
                    "but no two processes may publish the same name at once",
                    self._connection.url,
                )
        return self._supports_create

    async def _probe_create(self, key: str) -> bool:
        async def refuses_second(client: Client) -> bool:
            try:
                await client.put(key, b"probe", create=True)
            except ExistsError:
                return True
            except ClientError as error:
                status = ErrorResponse.parse(error).status
                if status in (400, 405, 501) or "NotSupported" in repr(error):
                    return False
                raise
            return False

        first = await self._connection.retry("", refuses_second)
        return first or await self._connection.retry("", refuses_second)
