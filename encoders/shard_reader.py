"""Two readers of the images of a frame shard; both return the same bytes, batch by batch.

``index`` reads each batch as one byte range of the tar, located by the index. ``webdataset`` reads
the tar with the library of that name: it is the reference, and several times slower.

Both read each byte of the tar once and compare its sha256 with the sealed one before they yield the
last batch. The sidecar of a feature shard names this digest: features of other bytes, such as a
flipped one, would otherwise pass for features of the sealed frames for ever.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, cast

from configs.errors import DataError
from configs.runtime.hints import hint
from sharding.format.names import frame_name
from sharding.storage.base import Range

if TYPE_CHECKING:
    from sharding.format.index import FrameIndex
    from sharding.frames import FrameShards

_CHUNK_BYTES = 1 << 20

Kind = Literal["index", "webdataset"]
EncodedImages = list[bytes] | list[memoryview]
"""The image files of one batch, in order."""


class ReadBuffers:
    """Pool of reusable read buffers; fresh memory costs a page fault per 4 KiB."""

    def __init__(self) -> None:
        self._free: list[bytearray] = []

    def take(self, n_bytes: int) -> memoryview:
        """Return a buffer of ``n_bytes`` with arbitrary content; only one thread may call this."""
        # Taken by the reading thread, returned by the thread of the tower. Both list operations
        # are atomic, and the check before pop is safe because no second thread takes.
        buffer = self._free.pop() if self._free else bytearray()
        # A buffer that is too small is dropped: shards are similar, so the sizes soon settle.
        return memoryview(buffer if len(buffer) >= n_bytes else bytearray(n_bytes))[:n_bytes]

    def give_back(self, images: EncodedImages) -> None:
        """Release the buffer of a batch for reuse; its images must not be read any more."""
        # All images of a batch are views of one buffer, so the first view leads to it. Images from
        # webdataset are separate bytes objects and are not reused.
        if images and isinstance(images[0], memoryview):
            self._free.append(cast("bytearray", images[0].obj))


@dataclass(frozen=True, eq=False)
class Shard:
    """A frame shard that is being read."""

    number: int
    index: FrameIndex
    movies: tuple[str, ...]

    def name(self, frame: int) -> str:
        """Return the file name of a frame within its movie, e.g. ``shot_0004_img_1.jpg``."""
        return frame_name(int(self.index.shot[frame]), int(self.index.image[frame]))

    def movie(self, frame: int) -> str:
        """Return the movie id of a frame."""
        return self.movies[int(self.index.movie[frame])]


def open_shard(frames: FrameShards, number: int) -> Shard:
    """Read the index of a shard.

    Raises:
        DataError: the index is absent, corrupt, or differs from the sealed one.
    """
    return Shard(number, frames.frame_index(number), frames.shard_movies(number))


def read_by_index(
    frames: FrameShards, shard: Shard, batches: Sequence[range], buffers: ReadBuffers
) -> Iterator[list[memoryview]]:
    """Yield the images of each batch, with one read per batch.

    Raises:
        DataError: the tar is missing, truncated, or differs from the sealed one.
    """
    name, digest, begin = frames.tar_name(shard.number), hashlib.sha256(), 0
    for batch in batches:
        places = slice(batch.start, batch.stop)
        offsets, sizes = shard.index.offset[places].tolist(), shard.index.size[places].tolist()
        is_last = batch.stop == len(shard.index)
        end = frames.sealed(shard.number).n_bytes if is_last else offsets[-1] + sizes[-1]
        buffer = buffers.take(end - begin)
        frames.storage.read_into([Range(name, begin)], [buffer])
        digest.update(buffer)
        if is_last:
            _check_digest(frames, shard, digest.hexdigest())
        yield [
            buffer[offset - begin : offset - begin + size]
            for offset, size in zip(offsets, sizes, strict=True)
        ]
        begin = end


def read_by_webdataset(
    frames: FrameShards, shard: Shard, batches: Sequence[range], _buffers: ReadBuffers
) -> Iterator[list[bytes]]:
    """Yield the images of each batch as ``webdataset`` reads them from the tar.

    Raises:
        DataError: the tar is missing, corrupt, or does not match its index.
    """
    samples = _samples(frames, shard)
    for batch in batches:
        images = [_image(next(samples, {}), shard, frame) for frame in batch]
        if batch.stop == len(shard.index):
            next(samples, None)  # the check at its end
        yield images


def _samples(frames: FrameShards, shard: Shard) -> Iterator[dict[str, Any]]:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    name = frames.tar_name(shard.number)
    try:
        with frames.storage.open(name) as file:
            stream = _HashedReader(file)
            yield from group_by_keys(tar_file_expander([{"url": name, "stream": stream}]))
            while stream.read(_CHUNK_BYTES):  # the padding at the end
                pass
            _check_digest(frames, shard, stream.digest.hexdigest())
    except tarfile.TarError as error:
        raise DataError(f"{frames.storage.location}/{name}: {error.args[0]}") from None


class _HashedReader:
    """A stream that hashes what is read from it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.digest.update(data)
        return data


def _check_digest(frames: FrameShards, shard: Shard, got: str) -> None:
    want = frames.sealed(shard.number).sha256
    if got != want:
        name = frames.tar_name(shard.number)
        raise DataError(
            f"{frames.storage.location}/{name}: got sha256 {got[:12]}, want {want[:12]} as sealed: "
            f"bytes are damaged; run {hint('movienet-shard verify --repair')}, and "
            f"{hint('movienet-shard build')}"
        )


def _image(sample: dict[str, Any], shard: Shard, frame: int) -> bytes:
    want = PurePosixPath(shard.movie(frame), shard.name(frame))
    data = sample.get(want.suffix[1:])
    if sample.get("__key__") != str(want.with_suffix("")) or not isinstance(data, bytes):
        raise DataError(
            f"frame shard {shard.number}: got sample {sample.get('__key__')!r}, want {want}; "
            f"run {hint('movienet-shard verify')}"
        )
    return data


READERS: dict[
    Kind, Callable[[FrameShards, Shard, Sequence[range], ReadBuffers], Iterator[EncodedImages]]
] = {
    "index": read_by_index,
    "webdataset": read_by_webdataset,
}
"""Readers by the value of ``encoder.reader``; each yields the images per batch, in order."""
