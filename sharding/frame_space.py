"""Whether the frame shards of a plan fit, checked before the first byte is written."""

from __future__ import annotations

from collections.abc import Iterable

from configs.errors import MachineError
from configs.units import format_bytes
from sharding.format import tar
from sharding.format.plan import PlannedMovie
from sharding.storage.base import Storage
from sharding.storage.space import Space, check_permission, free, quota

_FILES_A_SHARD = 3
_FILES_A_SET = 3
_INDEX_BYTES = 22  # a row of ``FrameIndex``
_SHARD_BYTES = tar.RECORD + 4096  # closing blocks; headers of the index, sidecar


def needed(movies: Iterable[PlannedMovie]) -> Space:
    """Return what the frame shards of these movies take, padding counted on the average."""
    member = tar.BLOCK + tar.BLOCK // 2 + _INDEX_BYTES
    rows = [(movie.n_bytes + member * (movie.images or 0), movie.shard) for movie in movies]
    shards = len({shard for _, shard in rows})
    n_bytes = sum(n_bytes for n_bytes, _ in rows) + _SHARD_BYTES * shards
    return Space(n_bytes, _FILES_A_SHARD * shards + _FILES_A_SET)


def check_space(storage: Storage, movies: Iterable[PlannedMovie]) -> None:
    """Refuse to begin what cannot end.

    Raises:
        MachineError: the shards of these movies do not fit, or may not be written there.
    """
    want = needed(movies)
    if not want.files or not want.n_bytes:
        return
    check_permission(storage)
    for got, what in ((free(storage), "free"), (quota(storage), "left of the user's quota")):
        if got and got.n_bytes is not None and got.n_bytes < want.n_bytes:
            short = f"got {format_bytes(got.n_bytes)} {what}, want {format_bytes(want.n_bytes)}"
        elif got and got.files is not None and got.files < want.files:
            short = f"got {got.files} files {what}, want {want.files}"
        else:
            continue
        raise MachineError(
            f"{storage.location}: {short} for the frame shards; free some, set data.root "
            "elsewhere, or try data.limit"
        )
