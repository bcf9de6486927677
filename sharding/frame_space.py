"""Disk space of the frame shards of a plan, checked before the first byte is written."""

from __future__ import annotations

from collections.abc import Iterable

from sharding.format import tar
from sharding.format.plan import PlannedMovie
from sharding.storage.base import Storage
from sharding.storage.space import Space

_FILES_PER_SHARD = 3
_FILES_PER_SET = 3
_INDEX_BYTES = 22  # one row of ``FrameIndex``
_SHARD_BYTES = tar.RECORD + 4096  # closing blocks of the tar, headers of the index, sidecar


def needed(movies: Iterable[PlannedMovie]) -> Space:
    """Return the space that the frame shards of these movies need, with average padding."""
    member = tar.BLOCK + tar.BLOCK // 2 + _INDEX_BYTES
    rows = [(movie.n_bytes + member * (movie.images or 0), movie.shard) for movie in movies]
    shards = len({shard for _, shard in rows})
    n_bytes = sum(n_bytes for n_bytes, _ in rows) + _SHARD_BYTES * shards
    return Space(n_bytes, _FILES_PER_SHARD * shards + _FILES_PER_SET)


def check_space(storage: Storage, movies: Iterable[PlannedMovie]) -> None:
    """Raise an error if a build could not finish.

    Raises:
        DataError: the storage is read-only.
        MachineError: the shards of these movies do not fit, or the user lacks write permission.
    """
    want = needed(movies)
    if not want.files or not want.n_bytes:
        return
    storage.check_writable()
    storage.space().require(
        want,
        storage.location,
        "the frame shards",
        "set data.root elsewhere, try data.limit, or set encoder.frame_storage=temporary",
    )
