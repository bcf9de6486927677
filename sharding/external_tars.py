"""Opens a feature set whose tars were written by other tools; they are read in place."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import numpy as np

from configs.errors import DataError
from configs.schema import StorageConfig
from sharding.format.encoding import sha256_hex
from sharding.format.manifest import Manifest
from sharding.storage.base import Range, Storage, missing_file
from sharding.storage.open import open_storage

HALF = np.dtype("<f2")
"""What rows are in a batch."""
ROW_TYPES: dict[str, np.dtype[Any]] = {name: np.dtype(name) for name in ("<f2", "<f4", "<f8")}
HEADER_THREADS = 16


def open_tars(manifest: Manifest, config: StorageConfig | None) -> Storage:
    """Return where the tars of an indexed set lie, when none has changed.

    Rows of another type are given as float16; see ``Float16View``.

    Raises:
        DataError: a tar is gone or has changed.
    """
    provenance = manifest.provenance
    storage = open_storage(str(provenance["tars"]), config)
    with ThreadPoolExecutor(HEADER_THREADS, thread_name_prefix="index") as threads:
        for shard, now in zip(
            manifest.shards,
            threads.map(lambda shard: external_tar(storage, shard.name), manifest.shards),
            strict=True,
        ):
            if (now.n_bytes, now.sha256) != (shard.n_bytes, shard.sha256):
                differs = f"got {now.n_bytes:,} bytes, want {shard.n_bytes:,}"
                if now.n_bytes == shard.n_bytes:
                    differs = "its size is the same, its time or ETag is not"
                raise DataError(
                    f"{storage.location}/{shard.name}: changed since it was indexed: {differs}; "
                    "run `movienet-shard index-tars` again"
                )
    dtype = ROW_TYPES[str(provenance["dtype"])]
    return storage if dtype == HALF else cast("Storage", Float16View(storage, dtype))


class Float16View:
    """A storage whose rows are read as float16, though the tars hold wider numbers.

    Byte b of a row stands for bytes ``t * b`` to ``t * (b + 1)`` of the tar, t being how much wider
    its numbers are, and so do the offsets of the index; so whoever reads need not know.
    """

    def __init__(self, storage: Storage, dtype: np.dtype[Any]) -> None:
        self._storage, self._dtype, self._times = storage, dtype, width_ratio(dtype)

    def __getattr__(self, name: str) -> object:
        """Return what the storage itself has."""
        return getattr(self._storage, name)

    def read_into(self, ranges: Sequence[Range], buffers: Sequence[memoryview]) -> None:
        """Fill each buffer from its range; any number of threads may call this.

        Raises:
            DataError: a number is beyond float16, or what the storage says.
        """
        wide = [np.empty(view.nbytes // HALF.itemsize, self._dtype) for view in buffers]
        self._storage.read_into(
            [Range(part.name, part.offset * self._times) for part in ranges],
            [numbers.view(np.uint8).data for numbers in wide],
        )
        for part, numbers, view in zip(ranges, wide, buffers, strict=True):
            room = np.frombuffer(view, HALF)
            with np.errstate(over="ignore"):
                room[:] = numbers
            if np.isinf(room).any() and not np.isinf(numbers).any():
                raise DataError(
                    f"{self._storage.location}/{part.name}: numbers above 65,504 at byte "
                    f"{part.offset * self._times}; scale them: rows are kept in float16"
                )


def width_ratio(dtype: np.dtype[Any]) -> int:
    """Return how many times wider than float16 a dtype is."""
    return dtype.itemsize // HALF.itemsize


class ExternalTar(NamedTuple):
    """One tar, identified by location, size and fingerprint."""

    name: str
    n_bytes: int
    sha256: str
    """Of place, size and stamp."""


def external_tar(storage: Storage, name: str) -> ExternalTar:
    """Return the identity of a tar; raise ``DataError`` if it is missing."""
    found = storage.fingerprint(name)
    if found is None:
        raise missing_file(storage.location, name)
    size, fingerprint = found
    return ExternalTar(
        name, size, sha256_hex(f"{storage.location}/{name}\n{size}\n{fingerprint}".encode())
    )
