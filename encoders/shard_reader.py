"""Two ways to read the pictures of a frame shard, batch by batch; their bytes are the same.

``index`` reads each batch as one stretch of the tar, found by the index. ``webdataset`` leaves the
tar to the library of that name: the reference, and several times slower.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, cast

from configs.errors import DataError
from sharding.format.names import frame_name
from sharding.storage.base import Range

if TYPE_CHECKING:
    from sharding.format.index import FrameIndex
    from sharding.frames import FrameShards

Kind = Literal["index", "webdataset"]
Pictures = list[bytes] | list[memoryview]
"""The files of one batch, in order."""


class ReadBuffers:
    """Memory that is read into again and again: a fresh piece costs a fault for every 4 KiB."""

    def __init__(self) -> None:
        self._free: list[bytearray] = []

    def take(self, n_bytes: int) -> memoryview:
        """Return room for so many bytes, whatever they hold now; only one thread may take."""
        # Taken by the reading thread, returned by the thread of the tower. Both list operations
        # are atomic; the check before pop is safe because no second thread takes.
        room = self._free.pop() if self._free else bytearray()
        # A buffer that is too small is dropped: shards are alike, so the sizes soon settle.
        return memoryview(room if len(room) >= n_bytes else bytearray(n_bytes))[:n_bytes]

    def give_back(self, pictures: Pictures) -> None:
        """Let the room of a batch be used again; nobody may look at its pictures any more."""
        # One buffer holds all pictures of a batch, so the first view leads to it. Pictures from
        # webdataset are bytes of their own and are not reused.
        if pictures and isinstance(pictures[0], memoryview):
            self._free.append(cast("bytearray", pictures[0].obj))


@dataclass(frozen=True, eq=False)
class Shard:
    """One frame shard on its way."""

    number: int
    index: FrameIndex
    movies: tuple[str, ...]

    def name(self, frame: int) -> str:
        """Return what a frame is called within its movie: ``shot_0004_img_1.jpg``."""
        return frame_name(int(self.index.shot[frame]), int(self.index.image[frame]))

    def movie(self, frame: int) -> str:
        """Return the id of the movie that a frame belongs to."""
        return self.movies[int(self.index.movie[frame])]


def open_shard(frames: FrameShards, number: int) -> Shard:
    """Read the index of a shard.

    Raises:
        DataError: it is absent, damaged, or another one than was sealed.
    """
    return Shard(number, frames.frame_index(number), frames.shard_movies(number))


def read_by_index(
    frames: FrameShards, shard: Shard, batches: Sequence[range], rooms: ReadBuffers
) -> Iterator[list[memoryview]]:
    """Yield the pictures of each batch; one read a batch.

    Raises:
        DataError: the tar is missing or cut.
    """
    name = frames.tar_name(shard.number)
    for batch in batches:
        places = slice(batch.start, batch.stop)
        offsets, sizes = shard.index.offset[places].tolist(), shard.index.size[places].tolist()
        begin = offsets[0] if offsets else 0
        stretch = rooms.take(offsets[-1] + sizes[-1] - begin if offsets else 0)
        frames.storage.read_into([Range(name, begin)], [stretch])
        yield [
            stretch[offset - begin : offset - begin + size]
            for offset, size in zip(offsets, sizes, strict=True)
        ]


def read_by_webdataset(
    frames: FrameShards, shard: Shard, batches: Sequence[range], _rooms: ReadBuffers
) -> Iterator[list[bytes]]:
    """Yield the pictures of each batch, as ``webdataset`` finds them in the tar.

    Raises:
        DataError: the tar is missing or damaged, or holds other samples than its index says.
    """
    samples = _samples(frames, shard)
    for batch in batches:
        yield [_picture(next(samples, {}), shard, frame) for frame in batch]


def _samples(frames: FrameShards, shard: Shard) -> Iterator[dict[str, Any]]:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    name = frames.tar_name(shard.number)
    try:
        with frames.storage.open(name) as stream:
            yield from group_by_keys(tar_file_expander([{"url": name, "stream": stream}]))
    except tarfile.TarError as error:
        raise DataError(f"{frames.storage.location}/{name}: {error.args[0]}") from None


def _picture(sample: dict[str, Any], shard: Shard, frame: int) -> bytes:
    want = PurePosixPath(shard.movie(frame), shard.name(frame))
    data = sample.get(want.suffix[1:])
    if sample.get("__key__") != str(want.with_suffix("")) or not isinstance(data, bytes):
        raise DataError(
            f"frame shard {shard.number}: got sample {sample.get('__key__')!r}, want {want}; "
            "verify the set"
        )
    return data


READERS: dict[
    Kind, Callable[[FrameShards, Shard, Sequence[range], ReadBuffers], Iterator[Pictures]]
] = {
    "index": read_by_index,
    "webdataset": read_by_webdataset,
}
"""By the name that ``encoder.reader`` says."""
