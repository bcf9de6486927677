"""``NAME-00000.index.npz`` and ``index.npz``: where each image and each movie's rows are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from configs.errors import DataError
from sharding.format.encoding import REBUILD, npz_arrays, npz_bytes


@dataclass(frozen=True, eq=False)
class FrameIndex:
    """Byte ranges of the images of a frame shard, in the order of the tar."""

    offset: npt.NDArray[np.uint64]
    """``[N]`` first byte of the JPEG, from the start of the tar."""

    size: npt.NDArray[np.uint32]
    """``[N]`` bytes of the JPEG."""

    movie: npt.NDArray[np.uint32]
    """``[N]`` position in the shard's list of movies."""

    shot: npt.NDArray[np.int32]
    """``[N]`` number of the shot."""

    image: npt.NDArray[np.int16]
    """``[N]`` number of the image within its shot."""

    def __len__(self) -> int:
        return len(self.offset)

    def to_bytes(self) -> bytes:
        """Return ``NAME-00000.index.npz``."""
        return npz_bytes(
            {name: getattr(self, name).astype(dtype) for name, dtype in _FRAME_COLUMNS.items()}
        )

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Read ``NAME-00000.index.npz``.

        Raises:
            DataError: the file is corrupt, or its columns differ in length.
        """
        return cls(**_columns(data, where, _FRAME_COLUMNS))


@dataclass(frozen=True, eq=False)
class FeatureIndex:
    """Byte offset of each movie's rows in a feature dataset, in order of shard, then of movie."""

    movie_id: npt.NDArray[np.bytes_]
    """``[M]`` ids, fixed width."""

    shard: npt.NDArray[np.uint32]
    """``[M]`` number of the shard."""

    offset: npt.NDArray[np.uint64]
    """``[M]`` first byte of the first row, from the start of the tar."""

    rows: npt.NDArray[np.uint32]
    """``[M]`` number of rows."""

    def __len__(self) -> int:
        return len(self.movie_id)

    @cached_property
    def movies(self) -> tuple[str, ...]:
        """The ids as text."""
        return tuple(name.decode("ascii") for name in self.movie_id.tolist())

    def to_bytes(self) -> bytes:
        """Return ``index.npz``."""
        width = max((len(name) for name in self.movie_id.tolist()), default=1)
        columns = {
            name: getattr(self, name).astype(dtype) for name, dtype in _FEATURE_COLUMNS.items()
        }
        return npz_bytes({"movie_id": self.movie_id.astype(f"S{max(1, width)}"), **columns})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Read ``index.npz``.

        Raises:
            DataError: the file is corrupt, or its columns differ in length.
        """
        index = cls(**_columns(data, where, {"movie_id": "S", **_FEATURE_COLUMNS}))
        # The text of a million ids takes 0.3 s and 130 MB. It is made when it is needed.
        ids = index.movie_id
        if ids.itemsize and ids.view(np.uint8).max(initial=0) > 0x7F:
            raise DataError(f"{where}: movie_id: got bytes outside ASCII; {REBUILD}")
        return index


_FRAME_COLUMNS = {"offset": "<u8", "size": "<u4", "movie": "<u4", "shot": "<i4", "image": "<i2"}
_FEATURE_COLUMNS = {"shard": "<u4", "offset": "<u8", "rows": "<u4"}


def _columns(data: bytes, where: str, dtypes: Mapping[str, str]) -> dict[str, npt.NDArray[Any]]:
    columns = npz_arrays(data, where, dtypes)
    for name, dtype in dtypes.items():
        got = columns[name]
        fits = got.dtype.kind == "S" if dtype == "S" else got.dtype == np.dtype(dtype)
        if not fits or got.ndim != 1:
            raise DataError(f"{where}: {name}: got {got.dtype} {list(got.shape)}, want {dtype} [N]")
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{where}: columns differ in length ({lengths}); {REBUILD}")
    return columns
