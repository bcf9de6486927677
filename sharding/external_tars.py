"""Reading of external feature tars: an indexed set reads them in place, after a check."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from configs.errors import DataError
from configs.runtime.hints import hint
from configs.schema import StorageConfig
from sharding.format.encoding import sha256_hex
from sharding.format.manifest import Manifest
from sharding.storage.base import Range, Storage, missing_file
from sharding.storage.open import open_storage

HALF = np.dtype("<f2")
"""Type of the rows in a batch."""
ROW_TYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(name) for name in ("<f2", "<f4", "<f8", ">f2", ">f4", ">f8")
}
"""Types of the rows of external tars."""
HEADER_THREADS = 16


class OutOfRangeError(DataError):
    """Number of an external tar that exceeds the range of float16."""


def open_tars(manifest: Manifest, config: StorageConfig | None) -> Storage:
    """Return the storage of the tars of an indexed set, after checking that none has changed.

    Rows of another type are read as float16; see ``Float16View``.

    Raises:
        DataError: a tar is missing or has changed.
    """
    provenance = manifest.provenance
    storage = open_storage(str(provenance["tars"]), config)
    with ThreadPoolExecutor(HEADER_THREADS, thread_name_prefix="index") as threads:
        for shard, current in zip(
            manifest.shards,
            threads.map(lambda shard: external_tar(storage, shard.name), manifest.shards),
            strict=True,
        ):
            if (current.n_bytes, current.sha256) != (shard.n_bytes, shard.sha256):
                change = f"got {current.n_bytes:,} bytes, want {shard.n_bytes:,}"
                if current.n_bytes == shard.n_bytes:
                    change = "same size, but another modification time or ETag"
                raise DataError(
                    f"{storage.location}/{shard.name}: changed since it was indexed: {change}; "
                    f"run {hint('movienet-shard index-tars')} again"
                )
    return float16_view(storage, ROW_TYPES[str(provenance["dtype"])])


def float16_view(storage: Storage, dtype: np.dtype[Any]) -> Storage:
    """Return a storage from which rows of ``dtype`` are read as float16."""
    return storage if dtype == HALF else cast("Storage", Float16View(storage, dtype))


class Float16View:
    """Storage view that converts rows of a wider or big-endian type to float16.

    With numbers t times as wide as float16, byte b of the view corresponds to bytes ``t * b`` to
    ``t * (b + 1)`` of the tar. The offsets of the index count bytes of the view, so readers need no
    special case.
    """

    def __init__(self, storage: Storage, dtype: np.dtype[Any]) -> None:
        self._storage, self._dtype, self._ratio = storage, dtype, width_ratio(dtype)

    def __getattr__(self, name: str) -> object:
        """Return an attribute of the underlying storage."""
        return getattr(self._storage, name)

    def copy_cached(
        self, _names: Sequence[str], _offsets: Sequence[int], _rows: Sequence[NDArray[np.uint8]], /
    ) -> bool:
        """Return False: rows are converted."""
        return False

    def read_into(self, ranges: Sequence[Range], buffers: Sequence[memoryview]) -> None:
        """Fill each buffer from its range; thread-safe.

        Raises:
            OutOfRangeError: a number exceeds the range of float16, or the storage raised an error.
        """
        wide = [np.empty(view.nbytes // HALF.itemsize, self._dtype) for view in buffers]
        self._storage.read_into(
            [Range(each.name, each.offset * self._ratio) for each in ranges],
            [numbers.view(np.uint8).data for numbers in wide],
        )
        for each, numbers, view in zip(ranges, wide, buffers, strict=True):
            rows = np.frombuffer(view, HALF)
            # An overflow becomes infinity; the check below reports it by tar and byte.
            with np.errstate(over="ignore"):
                rows[:] = numbers
            if np.isinf(rows).any() and not np.isinf(numbers).any():
                raise OutOfRangeError(
                    f"{self._storage.location}/{each.name}: got numbers above 65,504 at byte "
                    f"{each.offset * self._ratio}, want the range of float16; scale them"
                )


def width_ratio(dtype: np.dtype[Any]) -> int:
    """Return the width of a dtype as a multiple of float16."""
    return dtype.itemsize // HALF.itemsize


class ExternalTar(NamedTuple):
    """One tar, identified by location, size and fingerprint."""

    name: str
    n_bytes: int
    sha256: str
    """Digest of location, size and fingerprint."""


def external_tar(storage: Storage, name: str) -> ExternalTar:
    """Return the identity of a tar; raise ``DataError`` if it is missing."""
    size_and_fingerprint = storage.fingerprint(name)
    if size_and_fingerprint is None:
        raise missing_file(storage.location, name)
    size, fingerprint = size_and_fingerprint
    return ExternalTar(
        name, size, sha256_hex(f"{storage.location}/{name}\n{size}\n{fingerprint}".encode())
    )
