"""Data sets on object stores and HTTP servers; the only file that knows obstore and boto3.

A request that fails is tried again, later and later, inside one time limit; obstore's own retries
are off. A body of another length, another range or another version than was asked for is a failed
try, never data. Requests run on one event loop in a thread of its own.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import logging
import os
import random
import re
import tempfile
import threading
import time
import uuid
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from math import inf
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast
from urllib.parse import unquote

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

from configs.errors import ConfigError, DataError, MachineError, MovieNetError
from sharding.storage.base import (
    Range,
    RangedFile,
    checked_name,
    file_exists,
    missing_file,
    short_file,
)

if TYPE_CHECKING:
    from obstore import GetResult, PutMode
    from obstore.store import ClientConfig, ObjectStore, RetryConfig, S3Credential

    from configs.schema import StorageConfig

logger = logging.getLogger(__name__)
T = TypeVar("T")
PIECE_BYTES = 4 * 1024**2
"""A longer range is read as several requests."""
CHUNK_BYTES = 256 * 1024
"""A body is received in chunks of at least this size."""
PART_BYTES = 8 * 1024**2
"""A larger file is uploaded in parts of this size, through a temporary file."""
UPLOADS = 2
"""Parts of one file under way at once."""
TRIES_A_LIMIT = 4
"""A silent try is given up after this share of the time limit."""
WRONG_TRIES = 4
"""Wrong answers in a row that are believed: a server that ignores ranges will go on to."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 10.0
_CREDENTIAL_LIFE = timedelta(minutes=10)
_SCHEMES = ("s3", "gs", "az", "http", "https")
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired"}
_WRONG_REGION = {"AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraint"}


class ObjectStorage:
    """The files below a URL; ``http(s)`` is read-only.

    Args:
        location: ``s3://BUCKET/PREFIX``, ``gs://…``, ``az://CONTAINER/…`` or ``http(s)://HOST/…``.
        config: How the store is reached.

    Raises:
        ConfigError: a URL of another kind, or without a bucket or host.
    """

    near_bytes = 256 * 1024  # what a connection receives while another request waits for its answer
    ranges_a_call = 1  # a thread waits in a call; so many are under way as there are threads

    def __init__(self, location: str, config: StorageConfig) -> None:
        self._place = _Place.of(location)
        self._location = location.rstrip("/")
        self._config = config
        self._lock = threading.Lock()
        self._store: ObjectStore | None = None
        self._signed = True
        self._in_flight = asyncio.Semaphore(config.max_in_flight)
        self._versions: dict[str, str] = {}
        self._creates: bool | None = None
        self._seen = False
        self._counts = {"requests": 0, "retries": 0}

    @property
    def location(self) -> str:
        """The URL."""
        return self._location

    def names(self) -> list[str]:
        """Return the names of all whole files, sorted; none if there is nothing below the URL.

        Raises:
            DataError: an HTTP server, which cannot tell.
        """
        if self._place.read_only:
            raise DataError(
                f"{self.location}: an HTTP server does not list its files; give a file of names, "
                "or a pattern such as frames-{000..370}.tar"
            )
        return _wait(self._names())

    def size(self, name: str) -> int | None:
        """Return the bytes of a file; None if there is none."""
        found = self.stamp(name)
        return None if found is None else found[0]

    def stamp(self, name: str) -> tuple[int, str] | None:
        """Return size and ETag (or time of change) of a file; None if there is none."""
        return _wait(self._stamp(checked_name(name)))

    def read(self, name: str) -> bytes:
        """Return a whole file."""
        return _wait(self._read(checked_name(name)))

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading and seeking."""
        size = self.size(name)
        if size is None:
            raise missing_file(self.location, name)
        file = io.BufferedReader(RangedFile(self, name, size), buffer_size=256 * 1024)
        return cast("BinaryIO", file)

    @property
    def readers(self) -> int:
        """Threads that should read at once: ``storage.max_in_flight``."""
        return self._config.max_in_flight

    def read_into(self, ranges: Sequence[Range], buffers: Sequence[memoryview]) -> None:
        """Fill each buffer from its range; any number of threads may call this.

        Neighbours are read as one. One range is read in this thread, which costs half of what the
        event loop does; only if that fails, and for several at once, the loop takes over.
        """
        begun = time.monotonic()
        wanted = [
            (Range(checked_name(part.name), part.offset), buffer.cast("B"))
            for part, buffer in zip(ranges, buffers, strict=True)
        ]
        cover = _cover(wanted, self.near_bytes)
        if cover is None:
            self._fill(wanted, begun)
            return
        room = memoryview(bytearray(cover.length))
        self._fill([(Range(cover.name, cover.offset), room)], begun)
        for part, view in wanted:
            at = part.offset - cover.offset
            view[:] = room[at : at + len(view)]

    def _fill(self, wanted: Sequence[tuple[Range, memoryview]], begun: float) -> None:
        pieces = [
            (Range(part.name, part.offset + at), view[at : at + PIECE_BYTES])
            for part, view in wanted
            for at in range(0, len(view), PIECE_BYTES)
        ]
        failed = self._read_here(*pieces[0]) if len(pieces) == 1 else None
        if len(pieces) != 1 or failed is not None:
            left = self._config.timeout - (time.monotonic() - begun)
            _wait(self._read_pieces(pieces, self._versions, left, failed))

    def _read_here(self, part: Range, view: memoryview) -> Exception | None:
        """Try once to read a range in this thread; return what went wrong."""
        _running()  # refuses in a forked child
        path, end = self._place.path(part.name), part.offset + len(view)
        try:
            result = obstore.get(self._connected(), path, options={"range": (part.offset, end)})
            self._check_answer(result, part, len(view))
            data = memoryview(result.bytes())
            _check_length(len(data), len(view))
        except (BaseError, OSError, ValueError, _WrongAnswerError) as error:
            return error
        view[:] = data
        with self._lock:
            self._counts["requests"] += 1
        return None

    def counts(self) -> Mapping[str, int]:
        """Return ``requests`` sent, and the ``retries`` among them."""
        return dict(self._counts)

    def publish(self, name: str, data: bytes, *, replace: bool = False) -> None:
        """Make ``data`` the content of ``name``, whole or not at all."""
        with self.publishing(name, replace=replace) as file:
            file.write(data)

    @contextmanager
    def publishing(self, name: str, *, replace: bool = False) -> Iterator[BinaryIO]:
        """Give a file to write; it is uploaded when the block ends without an exception."""
        checked_name(name)
        self._check_writable()
        if not replace and self.size(name) is not None:
            raise file_exists(self.location, name)
        with tempfile.SpooledTemporaryFile(max_size=PART_BYTES) as file:
            try:
                yield cast("BinaryIO", file)
                size = file.seek(0, os.SEEK_END)
                file.flush()
            except OSError as error:
                # The system tells no name when a write fails, e.g. on a full disk.
                error.filename = error.filename or f"{tempfile.gettempdir()} (for {name})"
                raise
            if size > PART_BYTES:
                file.rollover()
                _wait(self._publish_large(name, file.fileno(), size, replace=replace))
            else:
                file.seek(0)
                _wait(self._publish_small(name, file.read(), replace=replace))
        self._versions.pop(name, None)

    def remove(self, name: str) -> None:
        """Remove a file; nothing happens if there is none."""
        self._check_writable()
        path = self._place.path(checked_name(name))

        async def delete(store: ObjectStore) -> None:
            try:
                await obstore.delete_async(store, path)
            except FileNotFoundError:
                await self._check_bucket()

        _wait(self._persist(name, delete))
        self._versions.pop(name, None)

    def free_bytes(self) -> int | None:
        """Return None: nobody knows."""
        return None

    def sweep(self) -> None:
        """Do nothing: what a killed upload leaves, nobody sees; the bucket's rules remove it."""

    def close(self) -> None:
        """Let go of connections; the storage may be used again."""
        self._renew()

    # --- reading ----------------------------------------------------------------------------------

    async def _names(self) -> list[str]:
        async def collect(store: ObjectStore) -> list[str]:
            found = await obstore.list_with_delimiter_async(store, self._place.prefix or None)
            return [str(entry["path"]).rpartition("/")[2] for entry in found["objects"]]

        names = await self._persist("", collect)
        return sorted(name for name in names if name and not name.startswith("."))

    async def _stamp(self, name: str) -> tuple[int, str] | None:
        path = self._place.path(name)

        async def head(store: ObjectStore) -> tuple[int, str] | None:
            try:
                found = await obstore.head_async(store, path)
            except FileNotFoundError:
                return None
            return found["size"], found["e_tag"] or found["last_modified"].isoformat()

        stamp = await self._persist(name, head)
        if stamp is None:
            await self._check_bucket()
        return stamp

    async def _read(self, name: str) -> bytes:
        path = self._place.path(name)

        async def get(store: ObjectStore) -> tuple[int, str | None, bytes | None]:
            result = await obstore.get_async(store, path)
            size, version = result.meta["size"], result.meta["e_tag"]
            if size > PIECE_BYTES:
                return size, version, None
            data = bytes(await result.bytes_async())
            _check_length(len(data), size)
            return size, version, data

        size, version, data = await self._persist(name, get)
        if data is not None:
            return data
        room = bytearray(size)
        view = memoryview(room)
        pieces = [
            (Range(name, at), view[at : at + PIECE_BYTES]) for at in range(0, size, PIECE_BYTES)
        ]
        await self._read_pieces(pieces, {name: version} if version else {})
        return bytes(room)

    async def _read_pieces(
        self,
        pieces: Sequence[tuple[Range, memoryview]],
        versions: dict[str, str],
        left: float | None = None,
        failed: Exception | None = None,
    ) -> None:
        """Read all pieces; when this ends, also by an error, no buffer is written any more.

        Args:
            pieces: Where to read, and into what.
            versions: ETag of each file, as it was first seen.
            left: Seconds until the time is over; default: the time limit.
            failed: What a first try has met already.
        """
        left = self._config.timeout if left is None else left
        limit = asyncio.get_running_loop().time() + left
        tasks = [
            asyncio.ensure_future(self._read_piece(part, view, versions, limit, failed))
            for part, view in pieces
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read_piece(
        self,
        part: Range,
        view: memoryview,
        versions: dict[str, str],
        limit: float,
        failed: Exception | None,
    ) -> None:
        path, end = self._place.path(part.name), part.offset + len(view)
        progress, met = _Progress(), [failed] if failed is not None else []

        async def get(store: ObjectStore) -> None:
            try:
                if met:
                    raise met.pop()
                result = await obstore.get_async(store, path, options={"range": (part.offset, end)})
            except BaseError as error:
                if _Refusal.of(error).status == 416:
                    raise short_file(self.location, part, 0, len(view)) from None
                raise
            self._check_answer(result, part, len(view), versions)
            await _receive(result, view, progress)

        async with self._in_flight:
            await self._persist(part.name, get, limit=limit, progress=progress)

    def _check_answer(
        self, result: GetResult, part: Range, length: int, versions: dict[str, str] | None = None
    ) -> None:
        """Refuse an answer that is not just what was asked for."""
        _check_version(self._versions if versions is None else versions, part.name, result)
        wanted, got = (part.offset, part.offset + length), result.range
        if got[0] == wanted[0] and got[1] == result.meta["size"] < wanted[1]:
            raise short_file(self.location, part, got[1] - got[0], length)
        if got != wanted:
            raise _WrongAnswerError(f"got bytes {got}, want {wanted}")

    # --- writing ----------------------------------------------------------------------------------

    async def _publish_small(self, name: str, data: bytes, *, replace: bool) -> None:
        path = self._place.path(name)
        mode: PutMode = "overwrite" if replace or not await self._can_create() else "create"

        async def put(store: ObjectStore) -> None:
            await obstore.put_async(store, path, data, mode=mode, use_multipart=False)

        async def ours() -> bool:
            return await self._read(name) == data

        await self._create(name, put, ours)

    async def _publish_large(self, name: str, handle: int, size: int, *, replace: bool) -> None:
        if replace or not await self._can_create():
            await self._upload(name, handle, size)
            return
        # An upload in parts cannot be made create-only, a copy within the store can.
        aside = f".{name}-{uuid.uuid4().hex}"
        await self._upload(aside, handle, size)
        path, from_ = self._place.path(name), self._place.path(aside)

        async def copy(store: ObjectStore) -> None:
            await obstore.copy_async(store, from_, path, overwrite=False)

        async def ours() -> bool:
            return await self._equal(name, handle, size)

        try:
            await self._create(name, copy, ours)
        finally:
            await self._persist(aside, lambda store: obstore.delete_async(store, from_))

    async def _upload(self, name: str, handle: int, size: int) -> None:
        path, progress = self._place.path(name), _Progress()

        async def put(store: ObjectStore) -> None:
            parts = progress.watch(_parts(handle, size))
            await obstore.put_async(
                store,
                path,
                parts,
                use_multipart=True,
                chunk_size=PART_BYTES,
                max_concurrency=UPLOADS,
            )

        await self._persist(name, put, progress=progress)

    async def _create(
        self,
        name: str,
        call: Callable[[ObjectStore], Awaitable[None]],
        ours: Callable[[], Awaitable[bool]],
    ) -> None:
        """Create a file; what an earlier try of ours has created after all, is ours."""
        tries = 0

        async def counted(store: ObjectStore) -> None:
            nonlocal tries
            tries += 1
            await call(store)

        try:
            await self._persist(name, counted)
        except AlreadyExistsError:
            if tries == 1 or not await ours():
                raise file_exists(self.location, name) from None

    async def _equal(self, name: str, handle: int, size: int) -> bool:
        stamp = await self._stamp(name)
        if stamp is None or stamp[0] != size:
            return False
        room = bytearray(PART_BYTES)
        for at in range(0, size, PART_BYTES):
            view = memoryview(room)[: min(PART_BYTES, size - at)]
            await self._read_pieces([(Range(name, at), view)], {name: stamp[1]})
            if os.pread(handle, len(view), at) != view:
                return False
        return True

    async def _can_create(self) -> bool:
        """Tell whether the store keeps ``If-None-Match: *``; asked once, with an object of ours."""
        if self._creates is None:
            path = self._place.path(f".probe-{uuid.uuid4().hex}")
            try:
                self._creates = await self._try_create(path)
            finally:
                await self._persist("", lambda store: obstore.delete_async(store, path))
            if not self._creates:
                logger.warning(
                    "%s: the store has no create-only writes; a file is looked for before it is "
                    "written, so let no two processes publish the same name",
                    self.location,
                )
        return self._creates

    async def _try_create(self, path: str) -> bool:
        async def put(store: ObjectStore) -> bool:
            try:
                await obstore.put_async(store, path, b"probe", mode="create")
            except AlreadyExistsError:
                return True
            except BaseError as error:
                if _Refusal.of(error).status in (400, 405, 501) or "NotSupported" in repr(error):
                    return False
                raise
            return False

        first = await self._persist("", put)
        return first or await self._persist("", put)

    def _check_writable(self) -> None:
        if self._place.read_only:
            raise DataError(
                f"{self.location}: an HTTP server is read-only; publish to a folder or s3://"
            )

    # --- the store, and trying again --------------------------------------------------------------

    def _connected(self) -> ObjectStore:
        with self._lock:
            if self._store is None:
                try:
                    self._store, self._signed = _make_store(self._place, self._config)
                except (BaseError, ValueError) as error:
                    raise ConfigError(f"{self.location}: {_Refusal.of(error).summary}") from None
            return self._store

    def _renew(self) -> None:
        """Make the next try ask for credentials anew."""
        with self._lock:
            self._store = None

    async def _check_bucket(self, *, may_list: bool = False) -> None:
        """Complain if it is the bucket that is missing, or the login: HEAD gives no reason.

        Args:
            may_list: Complain also if only the right to list is missing.

        Raises:
            MovieNetError: why the store refuses to list.
        """
        if self._place.read_only or (self._seen and not may_list):
            return

        async def look(store: ObjectStore) -> None:
            async for _ in _pages(store, self._place.prefix):
                break

        try:
            await asyncio.wait_for(look(self._connected()), self._config.timeout / TRIES_A_LIMIT)
        except (BaseError, FileNotFoundError) as error:
            refusal = _Refusal.of(error)
            if may_list or refusal.status != 403 or refusal.code in _EXPIRED:
                raise self._explained(refusal, "") from None
        except TimeoutError:
            return
        self._seen = True

    async def _persist(
        self,
        name: str,
        call: Callable[[ObjectStore], Awaitable[T]],
        *,
        limit: float | None = None,
        progress: _Progress | None = None,
    ) -> T:
        """Try until it works, the store says no for good, or the time is over.

        Args:
            name: File, for messages.
            call: One try.
            limit: When the time is over, by the loop's clock; default: the time limit from now,
                or from the last progress.
            progress: Of a long transfer: while it goes on, it is not silent.

        Raises:
            AlreadyExistsError: a create-only write met a file.
            MovieNetError: everything else.
        """
        clock = asyncio.get_running_loop().time
        grows = limit is None and progress is not None
        limit = limit or clock() + self._config.timeout
        silence = self._config.timeout / TRIES_A_LIMIT
        wrong, renewed, reached = 0, False, 0
        for tries in itertools.count(1):
            with self._lock:
                self._counts["requests"] += 1
                self._counts["retries"] += tries > 1
            try:
                end = inf if grows else limit
                return await _unless_silent(self._once(call), silence, progress, end)
            except TimeoutError:
                fault = "no answer"
            except _WrongAnswerError as error:
                fault, wrong = str(error), wrong + 1
            except (MovieNetError, AlreadyExistsError):
                raise
            except (BaseError, OSError, ValueError) as error:
                refusal = _Refusal.of(error)
                fault = refusal.summary
                if refusal.expired and not renewed and self._place.scheme == "s3":
                    self._renew()
                    renewed = True
                    continue
                if refusal.final:
                    raise await self._reason(refusal, name, error) from None
                wrong += refusal.wrong
            if grows and progress is not None and progress.furthest > reached:
                reached, limit = progress.furthest, clock() + self._config.timeout
            left = limit - clock()
            if wrong >= WRONG_TRIES or left < _FIRST_PAUSE_S:
                raise self._gave_up(name, fault, tries, wrong=wrong)
            pause = min(_FIRST_PAUSE_S * 2 ** (tries - 1), _LONGEST_PAUSE_S, left / 2)
            pause *= random.uniform(0.5, 1.0)
            logger.debug("%s/%s: %s; trying again in %.1f s", self.location, name, fault, pause)
            await asyncio.sleep(pause)
        raise AssertionError

    async def _once(self, call: Callable[[ObjectStore], Awaitable[T]]) -> T:
        store = self._store
        if store is None:
            store = await asyncio.to_thread(self._connected)  # may ask boto3, which may log in
        return await call(store)

    def _gave_up(self, name: str, fault: str, tries: int, *, wrong: int) -> MovieNetError:
        where = f"{self.location}/{name}".rstrip("/")
        if wrong >= WRONG_TRIES:
            return DataError(f"{where}: {fault}, {tries} times; the server answers wrongly")
        return MachineError(
            f"{where}: gave up after {tries} tries in {self._config.timeout:g} s (storage.timeout),"
            f" last: {fault}; check {self._place.endpoint(self._config)} and the network"
        )

    async def _reason(self, refusal: _Refusal, name: str, error: Exception) -> MovieNetError:
        if isinstance(error, FileNotFoundError) and refusal.code != "NoSuchBucket":
            try:
                await self._check_bucket()
            except MovieNetError as reason:
                return reason
            return missing_file(self.location, name)
        if not refusal.code:
            try:
                await self._check_bucket(may_list=True)
            except MovieNetError as reason:
                return reason
        return self._explained(refusal, name)

    def _explained(self, refusal: _Refusal, name: str) -> MovieNetError:
        where = f"{self.location}/{name}".rstrip("/")
        said = refusal.summary
        if refusal.code == "NoSuchBucket" or (refusal.status == 404 and not name):
            return DataError(f"{where}: no bucket {self._place.bucket}; create it, or fix the URL")
        if refusal.code in _WRONG_REGION or refusal.redirected:
            region = self._config.region or "none"
            return ConfigError(
                f"{where}: wrong region: storage.region is {region}, the store says: {said}; "
                "set storage.region to the bucket's"
            )
        if refusal.code in _EXPIRED:
            return MachineError(f"{where}: credentials have expired: {said}; log in again")
        if refusal.unauthenticated or (refusal.status == 403 and not self._signed):
            return MachineError(
                f"{where}: no valid credentials: {said}; log in, or set storage.profile or "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        if refusal.status == 403:
            return MachineError(
                f"{where}: not permitted: {said}; ask for the right to it, or use another "
                "storage.profile"
            )
        return MachineError(f"{where}: refused: {said}")


@dataclass(frozen=True)
class _Cover:
    """A range that holds several."""

    name: str
    offset: int
    length: int


def _cover(wanted: Sequence[tuple[Range, memoryview]], near_bytes: int) -> _Cover | None:
    """Return what holds several ranges of one file, if it is no longer than ``near_bytes``."""
    names = {part.name for part, _ in wanted}
    if len(wanted) < 2 or len(names) > 1:
        return None
    first = min(part.offset for part, _ in wanted)
    end = max(part.offset + len(view) for part, view in wanted)
    return _Cover(names.pop(), first, end - first) if end - first <= near_bytes else None


@dataclass(frozen=True)
class _Place:
    """A URL in its parts."""

    scheme: str
    bucket: str
    """Bucket, container, or host with port."""

    prefix: str

    @classmethod
    def of(cls, location: str) -> _Place:
        scheme, _, rest = location.partition("://")
        bucket, _, prefix = rest.partition("/")
        if scheme not in _SCHEMES:
            raise ConfigError(
                f"{location}: got a URL of {scheme}://, want s3://, gs://, az:// or http(s)://"
            )
        if not bucket:
            raise ConfigError(f"{location}: no bucket or host, want e.g. s3://BUCKET/PREFIX")
        return cls(scheme, bucket, "/".join(part for part in prefix.split("/") if part))

    @property
    def read_only(self) -> bool:
        return self.scheme in ("http", "https")

    def path(self, name: str) -> str:
        path = f"{self.prefix}/{name}" if self.prefix else name
        return unquote(path) if self.read_only else path  # a URL is quoted, a key is not

    def endpoint(self, config: StorageConfig) -> str:
        if self.read_only:
            return self.bucket
        return f"storage.endpoint_url ({config.endpoint_url or 'default'})"


_NO_RETRIES: RetryConfig = {"max_retries": 0, "retry_timeout": timedelta(0)}


def _make_store(place: _Place, config: StorageConfig) -> tuple[ObjectStore, bool]:
    """Return a store, and whether requests are signed: for public files they need not be."""
    client: ClientConfig = {
        # Ours is the time limit; theirs only keeps a lost connection from lasting for ever.
        "timeout": timedelta(seconds=config.timeout + 1),
        "read_timeout": timedelta(seconds=config.timeout / TRIES_A_LIMIT),
        "connect_timeout": timedelta(seconds=config.timeout / TRIES_A_LIMIT),
        "allow_http": place.scheme == "http" or (config.endpoint_url or "").startswith("http:"),
    }
    if place.read_only:
        url = f"{place.scheme}://{place.bucket}"
        return HTTPStore.from_url(url, client_options=client, retry_config=_NO_RETRIES), True
    if place.scheme == "gs":
        return GCSStore(place.bucket, client_options=client, retry_config=_NO_RETRIES), True
    if place.scheme == "az":
        return AzureStore(place.bucket, client_options=client, retry_config=_NO_RETRIES), True
    if not (config.endpoint_url or "https://").startswith(("http://", "https://")):
        raise ConfigError(
            f"storage.endpoint_url: got {config.endpoint_url!r}, want http://… or https://…"
        )
    session = _session(config.profile)
    region = config.region or (session.region_name if session is not None else None)
    options: dict[str, Any] = {"copy_if_not_exists": "multipart"}
    options |= {"endpoint": config.endpoint_url} if config.endpoint_url else {}
    options |= {"region": region} if region else {}
    signed = session is None or _credentials(session) is not None
    if not signed:
        options["skip_signature"] = True  # boto3 has looked everywhere
    elif session is not None:
        options["credential_provider"] = _Credentials(config.profile)
    store = S3Store(place.bucket, client_options=client, retry_config=_NO_RETRIES, **options)
    return store, signed


def _session(profile: str | None) -> Any:
    """Return a boto3 session; None without boto3: obstore then finds what it can by itself.

    Raises:
        ConfigError: a profile is asked for that is not there, or boto3 is missing for it.
    """
    try:
        import boto3
        from botocore.exceptions import BotoCoreError
    except ImportError:
        if profile is not None:
            raise ConfigError(
                f"storage.profile: got {profile!r}, but boto3 is missing; "
                "install it: pip install 'movienet-stream[s3]'"
            ) from None
        return None
    try:
        return boto3.Session(profile_name=profile)
    except BotoCoreError as error:
        raise ConfigError(f"storage.profile: got {profile!r}: {error}") from None


def _credentials(session: Any) -> Any:
    """Return the session's credentials as they are now; None if there are none.

    Raises:
        MachineError: there is a profile, but its login has expired.
    """
    from botocore.exceptions import BotoCoreError

    try:
        found = session.get_credentials()
        return None if found is None else found.get_frozen_credentials()
    except BotoCoreError as error:
        raise MachineError(f"AWS credentials: {error}; log in again") from None


class _Credentials:
    """Asks boto3 anew every few minutes, so what is refreshed anywhere is used here."""

    def __init__(self, profile: str | None) -> None:
        self._profile = profile

    def __call__(self) -> S3Credential:
        frozen = _credentials(_session(self._profile))
        if frozen is None:
            raise MachineError("AWS credentials are gone; log in again")
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _CREDENTIAL_LIFE,
        }


class _WrongAnswerError(Exception):
    """A try that brought something, but not what was asked for."""


@dataclass(frozen=True)
class _Refusal:
    """What an error of obstore says."""

    status: int | None
    code: str
    text: str
    kind: str

    @classmethod
    def of(cls, error: Exception) -> _Refusal:
        text = str(error)
        status = re.search(r"status code: (\d{3})", text)
        code = re.search(r"<Code>(\w+)</Code>", text)
        return cls(
            int(status[1]) if status else None, code[1] if code else "", text, type(error).__name__
        )

    @property
    def summary(self) -> str:
        """In a few words."""
        said = re.search(r"<Message>(.*?)</Message>", self.text, re.DOTALL)
        if self.status is not None:
            words = (str(self.status), self.code, f"({said[1]})" if said and said[1] else "")
            return " ".join(word for word in words if word)
        for sign, cause in _CAUSES.items():
            if sign in self.text:
                return cause
        told = self.text.partition("\n\nDebug source")[0].removeprefix("Generic ")
        return " ".join(told.split())[-200:]

    @property
    def redirected(self) -> bool:
        return self.status in (301, 307) or "redirect without LOCATION" in self.text

    @property
    def unauthenticated(self) -> bool:
        return self.status == 401 or self.kind == "UnauthenticatedError" or _METADATA in self.text

    @property
    def expired(self) -> bool:
        """Other credentials may help: HEAD gives no reason, so any refusal may be it."""
        return self.code in _EXPIRED or (self.status in (400, 401, 403) and not self.code)

    @property
    def final(self) -> bool:
        """Another try would bring the same."""
        if self.kind in _FINAL or self.unauthenticated or self.redirected:
            return True
        return self.status is not None and self.status < 500 and self.status not in (408, 429)

    @property
    def wrong(self) -> bool:
        """The server answered something else than was asked."""
        told = self.text.partition("\n")[0].lower()
        return self.status is None and ("range" in told or "requested" in told)


_METADATA = "169.254.169.254"
_FINAL = {"FileNotFoundError", "InvalidPathError", "UnknownConfigurationKeyError", "ValueError"}
_CAUSES = {
    "ConnectionRefused": "connection refused",
    "dns error": "unknown host",
    "kind: Timeout": "no answer",
    "kind: Connect": "no connection",
    "IncompleteMessage": "the body was cut",
    "end of file before message length reached": "the body was cut",
}


def _check_version(versions: dict[str, str], name: str, result: GetResult) -> None:
    now = result.meta["e_tag"]
    if now is not None and versions.setdefault(name, now) != now:
        raise _WrongAnswerError(f"changed while it was read (ETag {versions[name]}, now {now})")


def _check_length(got: int, wanted: int) -> None:
    if got != wanted:
        raise _WrongAnswerError(f"got a body of {got} bytes, want {wanted}")


def _parts(handle: int, size: int) -> Iterator[bytes]:
    """Yield a file part by part; several tries may read it at once."""
    for at in range(0, size, PART_BYTES):
        yield os.pread(handle, PART_BYTES, at)


@dataclass
class _Progress:
    """How far an upload is."""

    at: int = 0
    furthest: int = 0

    def watch(self, parts: Iterator[bytes]) -> Iterator[bytes]:
        for number, part in enumerate(parts, 1):
            self.at, self.furthest = number, max(self.furthest, number)
            yield part


async def _unless_silent(
    call: Awaitable[T], silence: float, progress: _Progress | None, limit: float
) -> T:
    """Wait for a try as long as it goes on.

    Raises:
        TimeoutError: nothing happened for ``silence`` seconds, or the loop's clock says ``limit``.
    """
    clock = asyncio.get_running_loop().time
    task = asyncio.ensure_future(call)
    try:
        while True:
            seen = progress.at if progress else 0
            done, _ = await asyncio.wait({task}, timeout=max(min(silence, limit - clock()), 0.0))
            if done:
                return task.result()
            if progress is None or progress.at == seen or clock() >= limit:
                raise TimeoutError
    finally:
        task.cancel()


async def _receive(result: GetResult, view: memoryview, progress: _Progress) -> None:
    """Fill ``view`` with a body, chunk by chunk: a slow link is no silent one.

    Raises:
        _WrongAnswerError: the body has another length.
    """
    at = 0
    async for chunk in result.stream(min_chunk_size=CHUNK_BYTES):
        data = memoryview(chunk)
        if at + len(data) > len(view):
            raise _WrongAnswerError(f"got a body of more than {len(view)} bytes")
        view[at : at + len(data)] = data
        at += len(data)
        progress.at += 1
    _check_length(at, len(view))


async def _pages(store: ObjectStore, prefix: str) -> AsyncIterator[object]:
    async for page in obstore.list(store, prefix or None, chunk_size=1):
        yield page


@dataclass(frozen=True)
class _Engine:
    """The event loop of this process, in a thread of its own."""

    process: int = field(default_factory=os.getpid)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    def start(self) -> _Engine:
        threading.Thread(target=self.loop.run_forever, name="objects", daemon=True).start()
        return self


_engine: _Engine | None = None
_engine_lock = threading.Lock()


def _running() -> _Engine:
    global _engine
    if _engine is not None and _engine.process != os.getpid():
        raise MachineError(
            f"object store: used in process {os.getpid()}, which was forked from {_engine.process} "
            "after that had used one: connections do not survive a fork; start workers by spawn "
            "(multiprocessing.get_context('spawn')), or use none"
        )
    with _engine_lock:
        if _engine is None:
            _engine = _Engine().start()
        return _engine


def _wait(work: Coroutine[Any, Any, T]) -> T:
    """Run on the event loop; return the result to this thread.

    Raises:
        MachineError: this is a forked child.
    """
    try:
        engine = _running()
    except MachineError:
        work.close()
        raise
    future = asyncio.run_coroutine_threadsafe(work, engine.loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise
