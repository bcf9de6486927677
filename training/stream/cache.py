"""Whole shards on the node's own disk, shared by its ranks, beside ranged reads of all others.

A miss is read by ranges at once, and its shard is admitted behind. The folder holds

    SHA256.tar          a whole shard, under the digest that the manifest tells: any run, any set
    .tmp-SHA256.tar     one that is being downloaded, as large as it will be, and locked

and nothing else: the one lock of the folder is an flock on the folder itself. The kernel lets go of
both when a process dies, so a kill leaves no lock, and an unlocked ``.tmp-`` is anyone's to remove.
What is counted, evicted, begun and published is so under the folder's lock, by whichever rank.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import stat
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from configs.errors import DataError, MovieNetError
from configs.runtime.launch import node_disk
from configs.runtime.publish import TEMPORARY_PREFIX
from configs.units import format_bytes
from sharding.storage.base import Range, is_url
from sharding.storage.local import DiskStorage
from training.stream.reader import join_soon

if TYPE_CHECKING:
    from configs.schema import StreamConfig
    from sharding.features import FeatureSet
    from sharding.format.manifest import ManifestShard

logger = logging.getLogger(__name__)

RESERVE = 0.1
"""Share of a file system that stays free where ``stream.cache_bytes`` says nothing."""

PIECE_BYTES = 8 * 1024**2
"""Of a shard that is being admitted, so much is in memory at once."""

_BLOCK = 4096
_TOUCH_S = 1.0
_POLL_S = 0.01
_LOCK_S = 30.0


# --- what goes ------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A file of the folder."""

    name: str
    n_bytes: int
    """Room that it takes, or will take."""

    used_ns: int
    """When a rank last read it, roughly."""


def room_of(n_bytes: int) -> int:
    """Return the room that a file takes: whole blocks."""
    return -(-n_bytes // _BLOCK) * _BLOCK


def choose_victims(
    entries: Collection[Entry], *, need: int, limit: int, keep: Collection[str]
) -> list[Entry] | None:
    """Return which entries must go for ``need`` more bytes, least recently used first.

    Args:
        entries: All files of the folder.
        need: Bytes that are to be added.
        limit: Bytes that all may take together.
        keep: Names that may not go.

    Returns:
        None if even all that may go would not do.
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
    """A folder that several processes fill, never beyond a limit.

    Args:
        path: Made if it is missing, readable by its owner alone.
        max_bytes: Room of all files together; None leaves ``RESERVE`` of the file system free.

    Raises:
        OSError: it cannot be made, or the file system knows no locks.
    """

    def __init__(self, path: Path, max_bytes: int | None) -> None:
        self.path, self._max_bytes = path, max_bytes
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self.locked(threading.Event()) as held:
            if held:
                self._make_room(0, keep=())  # the limit may have been lowered

    def limit(self) -> int:
        """Return the room that all files may take, as of now."""
        return limit_of(self.path, self._max_bytes)

    def entries(self) -> list[Entry]:
        """Return all files, unfinished ones too."""
        return [
            Entry(name, room_of(status.st_size), status.st_mtime_ns)
            for name, status in _files(self.path)
        ]

    def touch(self, name: str) -> None:
        """Say that an entry is in use."""
        try:
            os.utime(self.path / name)
        except FileNotFoundError:
            return

    def begin(
        self, name: str, n_bytes: int, *, keep: Collection[str], closing: threading.Event
    ) -> Admission | None:
        """Reserve the room of an entry; None if it is there, under way, or finds no room.

        Args:
            name: Of the entry.
            n_bytes: Its size.
            keep: Entries that may not be evicted for it.
            closing: Ends the wait for the folder's lock; None is returned.

        Raises:
            OSError: the folder cannot be written.
        """
        temporary, path = self.path / f"{TEMPORARY_PREFIX}{name}", self.path / name
        with self.locked(closing) as held:
            # Another rank is downloading the shard, or has finished it since it was a miss here.
            if not held or not _remove_abandoned(temporary) or path.exists():
                return None
            if not self._make_room(room_of(n_bytes), keep=keep):
                return None
            handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                # Held until the handle is closed: an unlocked temporary file is an abandoned one.
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(handle, n_bytes)  # its full size counts against the limit from now on
            except BaseException:
                # Without its lock the file would be an empty reservation until the next admission.
                temporary.unlink()
                os.close(handle)
                raise
        return Admission(self, temporary, path, handle)

    @contextmanager
    def locked(self, closing: threading.Event) -> Iterator[bool]:
        """Hold the folder's lock; give False if ``closing`` came first, or it cannot be had."""
        handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield _lock(handle, closing)
        finally:
            os.close(handle)

    def _make_room(self, need: int, *, keep: Collection[str]) -> bool:
        """Evict what must go for ``need`` bytes; False if there is no room, and nothing goes."""
        # Downloads of killed processes first: their space is free, and no entry goes for it.
        for name, _ in _files(self.path):
            if name.startswith(TEMPORARY_PREFIX):
                _remove_abandoned(self.path / name)
        entries = self.entries()
        # A download in progress cannot be evicted: its writer would then publish it truncated.
        under_way = {entry.name for entry in entries if entry.name.startswith(TEMPORARY_PREFIX)}
        victims = choose_victims(entries, need=need, limit=self.limit(), keep={*under_way, *keep})
        for victim in victims or ():
            _evict(self.path / victim.name)
        return victims is not None


class Admission:
    """A shard on its way into the folder; nobody sees it before ``publish``."""

    def __init__(self, folder: CacheFolder, temporary: Path, path: Path, handle: int) -> None:
        self._folder, self._temporary, self._path, self._handle = folder, temporary, path, handle

    def write(self, data: memoryview, at: int) -> None:
        """Write a piece."""
        while data:
            done = os.pwrite(self._handle, data, at)
            data, at = data[done:], at + done

    def publish(self, closing: threading.Event) -> None:
        """Make it an entry, on the disk for good."""
        os.fsync(self._handle)  # else a power cut could leave the name without the bytes
        # Under the lock: whoever counts meanwhile would find it under neither name.
        with self._folder.locked(closing) as held:
            if held:
                self._temporary.rename(self._path)

    def close(self) -> None:
        """Remove it unless it was published."""
        self._temporary.unlink(missing_ok=True)
        os.close(self._handle)


def limit_of(path: Path, max_bytes: int | None) -> int:
    """Return the room of a cache in a folder, which need not be there, as of now."""
    if max_bytes is not None:
        return max_bytes
    there = next(
        folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists()
    )
    disk = os.statvfs(there)
    # By blocks: a download takes its size in the end, and so far what it has written.
    stored = sum(512 * status.st_blocks for _, status in _files(path)) if path.exists() else 0
    return stored + disk.f_bavail * disk.f_frsize - int(RESERVE * disk.f_blocks * disk.f_frsize)


def _files(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    for path in list(folder.iterdir()):
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue
        if stat.S_ISREG(status.st_mode):
            yield path.name, status


def _lock(handle: int, closing: threading.Event) -> bool:
    limit = time.monotonic() + _LOCK_S  # a rank may be stopped while it holds the lock
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if closing.wait(_POLL_S) or time.monotonic() > limit:
                return False
        else:
            return True


def _remove_abandoned(temporary: Path) -> bool:
    """Remove a download that nobody works on; tell whether there is none any more."""
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
    """Remove an entry and free its room at once, though other ranks may hold it open.

    They get short reads from then on, and read by ranges. The name goes first: killed in between,
    nothing is left but what the kernel frees.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
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
    """None where nobody knows it: the tar of somebody else."""


class ShardCache:
    """Reads what is in the folder from there, all else from the source, and admits it behind.

    One thread at most downloads, and lives only while there is something to download. Each rank
    asks once an epoch for a shard, so one that was evicted is not fetched again for stragglers.

    Args:
        features: The set; its shards are the entries.
        folder: Where entries lie.
        rolling: Shards of this set may be evicted for others, since the order comes back to none
            within an epoch. Otherwise what fits stays, and the rest is read by ranges.
    """

    def __init__(self, features: FeatureSet, folder: CacheFolder, *, rolling: bool) -> None:
        self._source, self._folder = features.storage, folder
        self._hits = self._misses = self._admitted_bytes = 0
        self._disk = DiskStorage(folder.path)
        ours = "tars" not in features.manifest.provenance
        self._shards = {
            shard.name: _entry_of(shard, ours=ours) for shard in features.manifest.shards
        }
        self._keep = set() if rolling else {shard.entry for shard in self._shards.values()}
        self._touched: dict[str, float] = {}
        self._asked: set[str] = set()
        self._fault: MovieNetError | None = None
        self._admitting = True
        self._lock = threading.Lock()
        self._behind = _Behind(self._admit)
        self.close = weakref.finalize(self, self._behind.close)
        """Stop admitting; no thread is left."""

    @property
    def near_bytes(self) -> int:
        """Bytes between two ranges that cost less to read than one range more."""
        return self._source.near_bytes

    @property
    def ranges_a_call(self) -> int:
        """Ranges that ``read_into`` should get at once."""
        return self._source.ranges_a_call

    @property
    def readers(self) -> int | None:
        """Threads that should read at once."""
        return self._source.readers

    def counts(self) -> dict[str, int]:
        """Return what the source counts, and ours.

        ``cache_hits`` and ``cache_misses`` are ranges, ``cache_admitted_bytes`` what was downloaded
        behind them.
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
            DataError: a shard is not the one of the manifest.
            MovieNetError: what the source says.
        """
        # Found by the admitting thread, which has no caller of its own to raise it to.
        if self._fault is not None:
            raise self._fault
        missed = [
            place for place in zip(ranges, buffers, strict=True) if not self._read_entry(*place)
        ]
        with self._lock:
            self._misses += len(missed)
            self._hits += len(ranges) - len(missed)
        if missed:
            # Admission first: it only queues the shard, and the ranges are read meanwhile.
            self._ask({part.name for part, _ in missed})
            self._source.read_into([part for part, _ in missed], [view for _, view in missed])

    def new_epoch(self) -> None:
        """Allow each shard to be asked for again."""
        with self._lock:
            self._asked.clear()

    @property
    def admitting(self) -> bool:
        """Whether shards are being downloaded."""
        return self._behind.busy

    def _read_entry(self, part: Range, buffer: memoryview) -> bool:
        entry = self._shards[part.name].entry
        try:
            self._disk.read_into([Range(entry, part.offset)], [buffer])
        except DataError:  # not there, or evicted under our eyes
            self._disk.forget(entry)
            return False
        except OSError as error:
            self._give_up(error)
            return False
        # At most once per second: eviction needs no finer order, and utime is a system call.
        now = time.monotonic()
        if now > self._touched.get(entry, 0.0) + _TOUCH_S:
            self._touched[entry] = now
            self._folder.touch(entry)
        return True

    def _ask(self, names: set[str]) -> None:
        with self._lock:
            # Once per epoch: a shard that was evicted or found no space is not tried at each miss.
            fresh = sorted(names - self._asked) if self._admitting else []
            self._asked.update(fresh)
        for name in fresh:
            self._behind.add(name)

    def _admit(self, name: str) -> None:
        shard, closing = self._shards[name], self._behind.closing
        if not self._admitting:
            return  # given up while this shard was queued
        try:
            admission = self._folder.begin(
                shard.entry, shard.n_bytes, keep=self._keep, closing=closing
            )
            if admission is None:
                return  # reads of this shard stay ranged reads
            try:
                if self._download(name, shard, admission):
                    admission.publish(closing)
            finally:
                admission.close()
        except OSError as error:
            self._give_up(error)  # the local disk failed: training continues by ranged reads
        except DataError as error:
            self._fault = error  # the data is wrong: training must stop
        except MovieNetError as error:
            # Whoever reads a batch meets it as well, and tells; trying on would only delay the end.
            logger.debug("cache: %s", error)
            self._admitting = False

    def _download(self, name: str, shard: _Shard, admission: Admission) -> bool:
        """Bring a shard; tell whether it came whole, and is the one of the manifest.

        Raises:
            DataError: it is another, twice.
        """
        room = memoryview(bytearray(min(PIECE_BYTES, shard.n_bytes)))
        got = want = ""
        # Twice: the first mismatch may be a shard that was replaced during its download.
        for _ in range(2):
            digest = hashlib.sha256()
            for at in range(0, shard.n_bytes, PIECE_BYTES):
                if self._behind.closing.is_set():
                    return False  # the stream is closed: do not delay it by a complete shard
                piece = room[: min(PIECE_BYTES, shard.n_bytes - at)]
                self._source.read_into([Range(name, at)], [piece])
                digest.update(piece)
                admission.write(piece, at)
                with self._lock:
                    self._admitted_bytes += len(piece)
            got, want = digest.hexdigest(), shard.sha256 or digest.hexdigest()
            if got == want:
                return True
        raise DataError(
            f"{self._source.location}/{name}: got sha256 {got[:12]}, want {want[:12]} of "
            "the manifest; the shard was replaced or damaged, run `movienet-shard verify`"
        )

    def _give_up(self, error: OSError) -> None:
        with self._lock:
            # Several threads may fail at once: one warning is enough.
            told, self._admitting = not self._admitting, False
        if not told:
            logger.warning(
                "cache %s: %s; going on without it, by ranged reads", self._folder.path, error
            )


class _Behind:
    """Does jobs one by one, in a thread that lives only while there are any."""

    def __init__(self, job: Callable[[str], None]) -> None:
        self.closing = threading.Event()
        self.busy = False
        """Whether a job is under way or waits."""
        self._job = weakref.WeakMethod(job)
        self._names: deque[str] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, name: str) -> None:
        """Do the job for ``name``, after those that were added before."""
        with self._lock:
            self._names.append(name)
            if self.busy or self.closing.is_set():
                return  # the running thread takes it, or none may start any more
            self.busy = True
            self._thread = threading.Thread(target=self._run, name="stream-cache", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Let the job under way end soon, drop the others, and wait for the thread if it can."""
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


# --- which source serves --------------------------------------------------------------------------


def open_cache(features: FeatureSet, config: StreamConfig, *, tell: bool) -> ShardCache | None:
    """Return the cache before a feature set; None where the set itself is read.

    Args:
        features: A sealed feature set.
        config: ``cache`` and ``max_bytes`` decide, and ``blocks`` whether shards are evicted.
        tell: Log which source serves.
    """
    where, path = features.storage.location, cache_path(features, config)
    folder = None if path is None else _open_folder(path, config.cache_bytes)
    if folder is None:
        if tell:
            how = "by ranged requests, without a cache" if is_url(where) else "where it lies"
            logger.info("stream: reads %s %s", where, how)
        return None
    limit, sizes = folder.limit(), [shard.n_bytes for shard in features.manifest.shards]
    if tell:
        logger.info(
            "stream: reads %s by ranges, and keeps whole shards in %s: room for %s, the set has %s",
            *(where, folder.path, format_bytes(max(0, limit)), format_bytes(sum(sizes))),
        )
    rolling = is_rolling(sizes, config.shuffle_block_shards, limit)
    return ShardCache(features, folder, rolling=rolling)


def cache_path(features: FeatureSet, config: StreamConfig) -> Path | None:
    """Return the folder of the cache that is asked for; None without one."""
    near = config.cache_dir == "auto" and not is_url(features.storage.location)
    converted = features.manifest.provenance.get("dtype", "<f2") != "<f2"  # rows are not its bytes
    if config.cache_dir == "off" or near or converted:
        return None
    if config.cache_dir != "auto":
        return Path(config.cache_dir)
    return node_disk() / f"movienet-stream-{os.geteuid()}"


def is_rolling(sizes: Sequence[int], blocks: int, limit: int) -> bool:
    """Tell whether shards are evicted for others of the same set.

    Without blocks every shard is needed until the end of the epoch: to evict one for another would
    only cost downloads. With blocks, the group that is being read must fit.

    Args:
        sizes: Bytes of the set's shards.
        blocks: Shards of a group; 0 for none.
        limit: Room of the cache, in bytes.
    """
    largest = sorted(map(room_of, sizes), reverse=True)[:blocks]
    return bool(blocks) and sum(largest) <= limit


def _open_folder(path: Path, max_bytes: int | None) -> CacheFolder | None:
    try:
        folder = CacheFolder(path, max_bytes)
        if path.stat().st_uid != os.geteuid():  # whoever owns it could plant shards
            raise PermissionError(f"it belongs to user {path.stat().st_uid}")
    except OSError as error:
        logger.warning("cache %s: %s; going on without it, by ranged reads", path, error)
        return None
    return folder


def _entry_of(shard: ManifestShard, *, ours: bool) -> _Shard:
    # Of somebody else's tar nobody knows the sha256: there stands a digest of place and version.
    return _Shard(f"{shard.sha256}.tar", shard.n_bytes, shard.sha256 if ours else None)
