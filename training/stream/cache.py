"""A cache of complete shards on the node's local disk, shared by its ranks.

A miss is read by ranges immediately, and its shard is downloaded in the background. The folder
contains only

    SHA256.tar          a complete shard, named by its digest in the manifest, for all runs and sets
    .tmp-SHA256.tar     a download in progress, already at its full size, and locked

The lock of the folder is an flock on the folder itself. The kernel releases both kinds of lock when
a process dies: a kill leaves no lock, and any process may remove an unlocked ``.tmp-`` file.
Entries are counted, evicted, created and published under the folder's lock only.

A download is published only with the digest in its name. Before its first use in a process, an
entry must be a regular file of the size in the manifest. Its digest is compared again on a
schedule, in the background: disks rot, and other programs write to shared folders.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shlex
import stat
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from configs.errors import DataError, MovieNetError
from configs.runtime.hints import hint
from configs.runtime.launch import node_disk
from configs.runtime.publish import TEMPORARY_PREFIX
from configs.units import format_bytes
from sharding.storage.base import Range, is_url
from sharding.storage.local import DiskStorage
from training.stream.reader import join_soon

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from configs.schema import StreamConfig
    from sharding.features import FeatureSet
    from sharding.format.manifest import ManifestShard

logger = logging.getLogger(__name__)

RESERVE = 0.1
"""Share of a file system that stays free if ``stream.cache_bytes`` is not set."""

CHUNK_BYTES = 8 * 1024**2
"""Bytes of a shard that are in memory at once while it is downloaded."""

_FILE = re.compile(rf"({re.escape(TEMPORARY_PREFIX)})?[0-9a-f]{{64}}\.tar")
"""Names of entries and of downloads in progress."""

_CHECK_DAYS = 8
"""Days within which the digest of each entry that is used daily is compared again."""

_BLOCK = 4096
_TOUCH_S = 1.0
_POLL_S = 0.01
_LOCK_S = 30.0


# --- eviction -------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A file of the folder."""

    name: str
    n_bytes: int
    """Disk space that it takes, or reserves."""

    used_ns: int
    """Approximate time of the last read, in nanoseconds since the epoch."""


def disk_bytes(n_bytes: int) -> int:
    """Return the disk space of a file: its size, rounded up to complete blocks."""
    return -(-n_bytes // _BLOCK) * _BLOCK


def choose_victims(
    entries: Collection[Entry], *, need: int, limit: int, keep: Collection[str]
) -> list[Entry] | None:
    """Return the entries to evict for ``need`` more bytes, least recently used first.

    Args:
        entries: All files of the folder.
        need: Bytes to add.
        limit: Maximum bytes of all files together.
        keep: Names that may not be evicted.

    Returns:
        None if evicting all permitted entries would not free enough.
    """
    excess = sum(entry.n_bytes for entry in entries) + need - limit
    victims = []
    for entry in sorted(entries, key=lambda entry: (entry.used_ns, entry.name)):
        if excess <= 0:
            break
        if entry.name not in keep:
            victims.append(entry)
            excess -= entry.n_bytes
    return victims if excess <= 0 else None


# --- the folder -----------------------------------------------------------------------------------


class CacheFolder:
    """A folder that several processes fill concurrently, never above a limit.

    Args:
        path: The folder; created if it is missing, readable by its owner only.
        max_bytes: Maximum bytes of all files; None leaves ``RESERVE`` of the file system free.

    Raises:
        OSError: the folder cannot be created, or its file system does not support locks.
    """

    def __init__(self, path: Path, max_bytes: int | None) -> None:
        self.path, self._max_bytes = path, max_bytes
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self.locked(threading.Event()) as held:
            if held:
                self._free_space(0, keep=())  # the limit may be lower than in earlier runs

    def limit(self) -> int:
        """Return the current maximum of all files together, in bytes."""
        return limit_of(self.path, self._max_bytes)

    def entries(self) -> list[Entry]:
        """Return all files, including downloads in progress."""
        return [
            Entry(name, disk_bytes(status.st_size), status.st_mtime_ns)
            for name, status in _files(self.path)
        ]

    def touch(self, name: str) -> None:
        """Mark an entry as recently used; a failure only affects the order of eviction."""
        with suppress(OSError):
            os.utime(self.path / name)

    def begin(
        self, name: str, n_bytes: int, *, keep: Collection[str], closing: threading.Event
    ) -> Admission | None:
        """Reserve the disk space of an entry.

        Args:
            name: Name of the entry.
            n_bytes: Its size.
            keep: Entries that may not be evicted for it.
            closing: Cancels the wait for the folder's lock.

        Returns:
            None if the entry exists, is being downloaded or does not fit, or on ``closing``.

        Raises:
            OSError: the folder is not writable.
        """
        temporary, path = self.path / f"{TEMPORARY_PREFIX}{name}", self.path / name
        with self.locked(closing) as held:
            # Another rank is downloading the shard, or has finished it since the miss.
            if not held or not _remove_abandoned(temporary) or path.exists():
                return None
            if not self._free_space(disk_bytes(n_bytes), keep=keep):
                return None
            handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                # Held until the handle is closed: unlocked temporary files count as abandoned.
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(handle, n_bytes)  # from now on, the full size counts
            except BaseException:
                # Without its lock, the file would reserve space until the next admission.
                temporary.unlink()
                os.close(handle)
                raise
        return Admission(self, temporary, path, handle)

    @contextmanager
    def locked(self, closing: threading.Event) -> Iterator[bool]:
        """Hold the folder's lock; yield False on ``closing``, or if the wait takes too long."""
        handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield _lock(handle, closing)
        finally:
            os.close(handle)

    def _free_space(self, need: int, *, keep: Collection[str]) -> bool:
        """Evict entries for ``need`` bytes; return False, and evict none, if they do not fit."""
        # Downloads of killed processes first: removing them may make evictions unnecessary.
        for name, _ in _files(self.path):
            if name.startswith(TEMPORARY_PREFIX):
                _remove_abandoned(self.path / name)
        entries = self.entries()
        # A download in progress cannot be evicted: its writer would publish it truncated.
        downloads = {entry.name for entry in entries if entry.name.startswith(TEMPORARY_PREFIX)}
        victims = choose_victims(entries, need=need, limit=self.limit(), keep={*downloads, *keep})
        for victim in victims or ():
            _evict(self.path / victim.name)
        return victims is not None


class Admission:
    """A shard being written to the folder; not visible to readers before ``publish``."""

    def __init__(self, folder: CacheFolder, temporary: Path, path: Path, handle: int) -> None:
        self._folder, self._temporary, self._path, self._handle = folder, temporary, path, handle

    def write(self, data: memoryview, at: int) -> None:
        """Write ``data`` at an offset in bytes."""
        while data:
            done = os.pwrite(self._handle, data, at)
            data, at = data[done:], at + done

    def publish(self, closing: threading.Event) -> None:
        """Turn the file into an entry, durably and atomically."""
        os.fsync(self._handle)  # otherwise a power failure could keep the name without the bytes
        # Under the lock: a concurrent count could otherwise miss the file under both names.
        with self._folder.locked(closing) as held:
            if held:
                self._temporary.rename(self._path)

    def close(self) -> None:
        """Remove the file unless it was published."""
        self._temporary.unlink(missing_ok=True)
        os.close(self._handle)


def limit_of(path: Path, max_bytes: int | None) -> int:
    """Return the current maximum size of a cache in ``path``, which need not exist, in bytes."""
    if max_bytes is not None:
        return max_bytes
    existing = next(
        folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists()
    )
    disk = os.statvfs(existing)
    # Counted in blocks: so far, a sparse download takes only the space of its written part.
    stored = sum(512 * status.st_blocks for _, status in _files(path)) if path.exists() else 0
    return stored + disk.f_bavail * disk.f_frsize - int(RESERVE * disk.f_blocks * disk.f_frsize)


def _files(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Return the files that a cache wrote; others are the user's: not counted, not deleted."""
    for path in [path for path in folder.iterdir() if _FILE.fullmatch(path.name)]:
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue
        if stat.S_ISREG(status.st_mode):
            yield path.name, status


def _lock(handle: int, closing: threading.Event) -> bool:
    deadline = time.monotonic() + _LOCK_S  # a rank may be suspended while it holds the lock
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if closing.wait(_POLL_S) or time.monotonic() > deadline:
                return False
        else:
            return True


def _remove_abandoned(temporary: Path) -> bool:
    """Remove a download without a writer; return whether the file is now absent."""
    try:
        handle = os.open(temporary, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        temporary.unlink(missing_ok=True)
        return True
    finally:
        os.close(handle)


def _evict(path: Path) -> None:
    """Remove an entry and free its disk space immediately, even if other ranks have it open.

    Their next reads are short, and they fall back to ranged reads. The name is removed first: after
    a kill between the two calls, the kernel frees the rest. A rank that copies from the entry
    (``page_cache.py``) gives it back within a second, which frees it as well.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except BlockingIOError:
        path.unlink()
        return
    try:
        path.unlink()
        os.ftruncate(handle, 0)
    finally:
        os.close(handle)


# --- the cache ------------------------------------------------------------------------------------


class _Shard(NamedTuple):
    entry: str
    n_bytes: int
    sha256: str | None
    """None for external tars, whose digest is unknown."""


class ShardCache:
    """A range reader that serves cached shards from disk and all others from the source.

    Missed shards are downloaded by at most one thread, which exists only while downloads are
    queued. A rank requests each shard once per epoch: a shard that was evicted is not downloaded
    again for a few remaining windows.

    Args:
        features: The feature set whose shards are cached.
        folder: Folder of the entries.
        rolling: Whether shards of this set may be evicted for each other, because the order does
            not return to a shard within an epoch. Otherwise the shards that fit are kept, and the
            others are read by ranges.
    """

    def __init__(self, features: FeatureSet, folder: CacheFolder, *, rolling: bool) -> None:
        self._source, self._folder = features.storage, folder
        self._hits = self._misses = self._admitted_bytes = 0
        self._disk = DiskStorage(folder.path)
        external = "tars" in features.manifest.provenance
        self._shards = {
            shard.name: _entry_of(shard, external=external) for shard in features.manifest.shards
        }
        self._keep = set() if rolling else {shard.entry for shard in self._shards.values()}
        self._numbers = {
            shard.name: number for number, shard in enumerate(features.manifest.shards)
        }
        self._known: set[str] = set()
        self._touched: dict[str, float] = {}
        self._requested: set[str] = set()
        self._fault: MovieNetError | None = None
        # Here, since the command line is unknown to the downloading thread.
        location = shlex.quote(features.storage.location)
        self._verify = hint(f"movienet-shard verify --features {location}")
        self._admitting = True
        self._lock = threading.Lock()
        self._downloads = _BackgroundQueue(self._admit)
        self._checks = _BackgroundQueue(self._check_digest)
        self.close = weakref.finalize(self, _close, self._downloads, self._checks)
        """Stop downloading and checking, and end the threads."""

    @property
    def near_bytes(self) -> int:
        """Largest gap between two ranges that is cheaper to read than a separate range."""
        return self._source.near_bytes

    @property
    def ranges_a_call(self) -> int:
        """Recommended number of ranges per call of ``read_into``."""
        return self._source.ranges_a_call

    @property
    def readers(self) -> int | None:
        """Recommended number of concurrent reading threads."""
        return self._source.readers

    def counts(self) -> dict[str, int]:
        """Return the counters of the source and of the cache.

        ``cache_hits`` and ``cache_misses`` count ranges, ``cache_admitted_bytes`` the bytes that
        were downloaded into the cache.
        """
        return {
            **self._source.counts(),
            "cache_hits": self._hits,
            "cache_misses": self._misses,
            "cache_admitted_bytes": self._admitted_bytes,
        }

    def read_into(self, ranges: Sequence[Range], buffers: Sequence[memoryview]) -> None:
        """Fill each buffer from its range; any number of threads may call this.

        Raises:
            DataError: a shard differs from the manifest.
            MovieNetError: the source cannot be read.
        """
        # Detected by the downloading thread, which has no caller to raise it to.
        if self._fault is not None:
            raise self._fault
        missed = [read for read in zip(ranges, buffers, strict=True) if not self._read_entry(*read)]
        with self._lock:
            self._misses += len(missed)
            self._hits += len(ranges) - len(missed)
        if missed:
            # Admission first: it only queues the shard, and the download overlaps with the reads.
            self._request({span.name for span, _ in missed})
            self._source.read_into([span for span, _ in missed], [view for _, view in missed])

    def copy_cached(
        self, names: Sequence[str], offsets: Sequence[int], rows: Sequence[NDArray[np.uint8]], /
    ) -> bool:
        """Fill each row if all shards are entries in the page cache; else return False."""
        unknown = set(names) - self._known
        if self._fault is not None or not all(map(self._recognize, unknown)):
            return False
        entries = [self._shards[name].entry for name in names]
        if not self._disk.copy_cached(entries, offsets, rows):
            return False
        for entry in set(entries):
            self._touch(entry)
        with self._lock:
            self._hits += len(names)
        return True

    def new_epoch(self) -> None:
        """Allow each shard to be requested again."""
        with self._lock:
            self._requested.clear()

    @property
    def admitting(self) -> bool:
        """Whether shards are being downloaded."""
        return self._downloads.busy

    def _read_entry(self, span: Range, buffer: memoryview) -> bool:
        """Read a range from the cache; return False if its shard is not an entry."""
        entry = self._shards[span.name].entry
        if span.name not in self._known and not self._recognize(span.name):
            return False
        try:
            self._disk.read_into([Range(entry, span.offset)], [buffer])
        except DataError:  # absent, or evicted during the read
            self._disk.forget(entry)
            return False
        except OSError as error:
            self._give_up(error)
            return False
        self._touch(entry)
        return True

    def _touch(self, entry: str) -> None:
        # At most once per second: eviction needs no finer order, and utime is a system call.
        now = time.monotonic()
        if now > self._touched.get(entry, 0.0) + _TOUCH_S:
            self._touched[entry] = now
            self._folder.touch(entry)

    def _recognize(self, name: str) -> bool:
        """Check the file of an entry before its first use; remove anything else of its name."""
        shard = self._shards[name]
        path = self._folder.path / shard.entry
        try:
            status = path.lstat()  # a link could lead anywhere, for example to /dev/zero
        except OSError:
            return False
        if not stat.S_ISREG(status.st_mode) or status.st_size != shard.n_bytes:
            logger.warning("cache %s: not the file that was stored; removed", path)
            with suppress(OSError):
                path.unlink()
            return False
        self._known.add(name)
        if shard.sha256 and is_due(self._numbers[name], time.time()):
            self._checks.add(name)
        return True

    def _check_digest(self, name: str) -> None:
        """Compare the digest of an entry; remove it if it is damaged."""
        shard, closing = self._shards[name], self._checks.closing
        buffer, digest = memoryview(bytearray(min(CHUNK_BYTES, shard.n_bytes))), hashlib.sha256()
        try:
            for at in range(0, shard.n_bytes, CHUNK_BYTES):
                if closing.is_set():
                    return
                chunk = buffer[: min(CHUNK_BYTES, shard.n_bytes - at)]
                self._disk.read_into([Range(shard.entry, at)], [chunk])
                digest.update(chunk)
        except (DataError, OSError):
            return  # evicted meanwhile; or unreadable, which the next read reports
        if digest.hexdigest() != shard.sha256:
            path = self._folder.path / shard.entry
            logger.warning(
                "cache %s: damaged, and removed; rows that this run has read from it may be wrong: "
                "restart the run from a checkpoint of before, and check this disk",
                path,
            )
            with suppress(OSError):
                _evict(path)

    def _request(self, names: set[str]) -> None:
        """Queue the download of shards."""
        with self._lock:
            # Once per epoch: a shard that was evicted or did not fit is not retried on each miss.
            new = sorted(names - self._requested) if self._admitting else []
            self._requested.update(new)
        for name in new:
            self._downloads.add(name)

    def _admit(self, name: str) -> None:
        """Download a shard into the folder, if it fits."""
        shard, closing = self._shards[name], self._downloads.closing
        if not self._admitting:
            return  # the cache was abandoned while this shard was queued
        try:
            admission = self._folder.begin(
                shard.entry, shard.n_bytes, keep=self._keep, closing=closing
            )
            if admission is None:
                return  # this shard is still read by ranges
            try:
                if self._download(name, shard, admission):
                    admission.publish(closing)
            finally:
                admission.close()
        except OSError as error:
            self._give_up(error)  # the local disk failed: training continues with ranged reads
        except DataError as error:
            self._fault = error  # the data is wrong: training must stop
        except MovieNetError as error:
            # Reading a batch raises the same error. Further downloads would only delay the end.
            logger.debug("cache: %s", error)
            self._admitting = False

    def _download(self, name: str, shard: _Shard, admission: Admission) -> bool:
        """Download a shard; return whether it is complete, False on ``close``.

        Raises:
            DataError: its sha256 differs from the manifest, twice.
        """
        buffer = memoryview(bytearray(min(CHUNK_BYTES, shard.n_bytes)))
        got = want = ""
        # Twice: after a first mismatch, the shard may have been replaced during its download.
        for _ in range(2):
            digest = hashlib.sha256()
            for at in range(0, shard.n_bytes, CHUNK_BYTES):
                if self._downloads.closing.is_set():
                    return False  # do not delay closing by a complete shard
                chunk = buffer[: min(CHUNK_BYTES, shard.n_bytes - at)]
                self._source.read_into([Range(name, at)], [chunk])
                digest.update(chunk)
                admission.write(chunk, at)
                with self._lock:
                    self._admitted_bytes += len(chunk)
            got, want = digest.hexdigest(), shard.sha256 or digest.hexdigest()
            if got == want:
                return True
        raise DataError(
            f"{self._source.location}/{name}: got sha256 {got[:12]}, want {want[:12]} as in the "
            f"manifest: the shard was replaced or is corrupt; run {self._verify}"
        )

    def _give_up(self, error: OSError) -> None:
        """Stop admitting shards, with one warning."""
        with self._lock:
            # Several threads may fail at the same time: one warning is enough.
            was_admitting, self._admitting = self._admitting, False
        if was_admitting:
            logger.warning(_WITHOUT_CACHE, self._folder.path, error)


def is_due(number: int, now_s: float) -> bool:
    """Return whether the entry of shard ``number`` is to be checked today.

    Each day another part of the shards is, so that a start costs little, however large the cache.
    """
    day = int(now_s // 86_400)
    return (number + day) % _CHECK_DAYS == 0


def _close(*queues: _BackgroundQueue) -> None:
    for queue in queues:
        queue.close()


class _BackgroundQueue:
    """Jobs that run one by one, in a thread that exists only while there are jobs."""

    def __init__(self, job: Callable[[str], None]) -> None:
        self.closing = threading.Event()
        self.busy = False
        """Whether a job is running or queued."""
        self._job = weakref.WeakMethod(job)
        self._names: deque[str] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, name: str) -> None:
        """Queue the job for ``name``."""
        with self._lock:
            self._names.append(name)
            if self.busy or self.closing.is_set():
                return  # the running thread takes it, or no thread may start any more
            self.busy = True
            self._thread = threading.Thread(target=self._run, name="stream-cache", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Signal the running job to end, drop the queued ones, and wait briefly for the thread."""
        self.closing.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            join_soon([thread])

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._names or self.closing.is_set():
                    self.busy = False
                    return
                name = self._names.popleft()
            # Weak, so that this thread does not keep a dropped cache alive between two jobs.
            job = self._job()
            if job is not None:
                job(name)
            del job


# --- opening a cache ------------------------------------------------------------------------------

_WITHOUT_CACHE = "cache %s: %s; continuing without a cache, with ranged reads"


def open_cache(features: FeatureSet, config: StreamConfig, *, log: bool) -> ShardCache | None:
    """Return the cache in front of a feature set; None if the set is read without one.

    Args:
        features: A sealed feature set.
        config: ``cache_dir`` and ``cache_bytes`` define the cache, ``shuffle_block_shards`` whether
            shards are evicted.
        log: Whether to log how the set is read.
    """
    location, path = features.storage.location, cache_path(features, config)
    folder = None if path is None else _open_folder(path, config.cache_bytes)
    if folder is None:
        if log:
            how = "by ranged requests, without a cache" if is_url(location) else "from disk"
            logger.info("stream: reading %s %s", location, how)
        return None
    limit, sizes = folder.limit(), [shard.n_bytes for shard in features.manifest.shards]
    if log:
        logger.info(
            "stream: reading %s by ranged requests, caching shards in %s (limit %s, set %s)",
            *(location, folder.path, format_bytes(max(0, limit)), format_bytes(sum(sizes))),
        )
    rolling = is_rolling(sizes, config.shuffle_block_shards, limit)
    return ShardCache(features, folder, rolling=rolling)


def cache_path(features: FeatureSet, config: StreamConfig) -> Path | None:
    """Return the folder of the configured cache; None without a cache."""
    local = config.cache_dir == "auto" and not is_url(features.storage.location)
    # Converted rows differ from the bytes of the shard, so a copy of the shard cannot serve them.
    converted = features.manifest.provenance.get("dtype", "<f2") != "<f2"
    if config.cache_dir == "off" or local or converted:
        return None
    if config.cache_dir != "auto":
        return Path(config.cache_dir)
    return node_disk() / f"movienet-stream-{os.geteuid()}"


def is_rolling(sizes: Sequence[int], blocks: int, limit: int) -> bool:
    """Return whether shards are evicted for other shards of the same set.

    Without blocks, every shard is needed until the end of the epoch, and evicting one for another
    would only cost downloads. With blocks, the group that is being read must fit.

    Args:
        sizes: Bytes of each shard of the set.
        blocks: Shards per group; 0 for none.
        limit: Maximum size of the cache in bytes.
    """
    largest = sorted(map(disk_bytes, sizes), reverse=True)[:blocks]
    return bool(blocks) and sum(largest) <= limit


def _open_folder(path: Path, max_bytes: int | None) -> CacheFolder | None:
    try:
        folder = CacheFolder(path, max_bytes)
        if path.stat().st_uid != os.geteuid():  # its owner could replace shards
            raise PermissionError(f"the folder belongs to user {path.stat().st_uid}")
    except OSError as error:
        logger.warning(_WITHOUT_CACHE, path, error)
        return None
    return folder


def _entry_of(shard: ManifestShard, *, external: bool) -> _Shard:
    # The manifest of external tars has a digest of location and version in place of the sha256.
    return _Shard(f"{shard.sha256}.tar", shard.n_bytes, None if external else shard.sha256)
