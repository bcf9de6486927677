"""Frame shards become batches of pixels: one thread reads ahead, a pool decodes, buffers go round.

Threads, not processes: reading, decoding and resizing let go of the interpreter's lock, and what
one thread has made another takes without a copy.
"""

# B = frames of a batch, H, W = pixels, 3 = RGB

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from configs.errors import DataError, MachineError
from encoders.batching import plan_batches
from encoders.decode import BadImage, Decoder, Pixels
from encoders.shard_reader import READERS, Pictures, ReadBuffers, Shard, open_shard
from sharding.format.names import PLAN

if TYPE_CHECKING:
    from configs.schema import EncoderConfig
    from encoders.decode import Preprocessing
    from sharding.frames import FrameShards

AHEAD = 2
"""Batches read, and batches decoded, before they are asked for."""

PIECE = 16
"""Pictures that a thread decodes at a time: about ten milliseconds."""

T = TypeVar("T")
Fail = Callable[[int, Exception], None]
"""Told of a shard that cannot be read, by any thread; the others go on, unless it raises."""


def _raise(_number: int, error: Exception) -> None:
    raise error


@dataclass(frozen=True, eq=False)
class Batch:
    """Pictures that go through the tower together."""

    shard: Shard
    frames: range
    """Their numbers within the shard."""

    pixels_BHW3: Tensor
    """uint8, RGB, full size: places that hold no picture are zero."""

    bad: dict[int, str] = field(default_factory=dict)
    """Why the frames of these numbers are no pictures."""

    by_pillow: int = 0
    """Pictures that simplejpeg refused."""

    @property
    def is_last(self) -> bool:
        """Whether the shard ends with it."""
        return self.frames.stop == len(self.shard.index)


class InputPipeline:
    """Reads and decodes frame shards.

    Args:
        config: Reader, threads, batch size and kind of preprocessing.
        preprocessing: What the tower wants.
        frames: The set.
        pinned: Whether the pixels lie in memory that a GPU copies from by itself.
        fail: Told of each shard that cannot be read to its end; the default raises.
    """

    def __init__(
        self,
        config: EncoderConfig,
        preprocessing: Preprocessing,
        frames: FrameShards,
        *,
        pinned: bool = False,
        fail: Fail = _raise,
    ) -> None:
        self._config, self._frames, self._pinned, self._fail = config, frames, pinned, fail
        self._decoder = Decoder(preprocessing, config.preprocess)
        self._size = (config.batch_size, preprocessing.height, preprocessing.width, 3)
        self._free: list[Tensor] = []
        self._rooms = ReadBuffers()

    def batches(self, numbers: Iterable[int]) -> Generator[Batch, None, None]:
        """Yield the batches of these shards, in order; a shard without frames has an empty one.

        One that cannot be read to its end ends early, without its last batch.

        Raises:
            MachineError: not a shard, but their source as a whole cannot be read.
        """
        threads = self._config.decode_threads or self._config.threads
        with ExitStack() as stack:
            # Closed in reverse order: the reader ends, then the decoders. Both are waited for, so
            # that no thread writes into a buffer after the loop.
            pool = ThreadPoolExecutor(threads, "decode")
            stack.callback(pool.shutdown, cancel_futures=True)
            read = ahead(self._read(numbers), AHEAD)
            stack.callback(read.close)
            decoding: deque[_Decoding] = deque()
            for shard, frames, pictures in read:
                decoding.append(self._decode(pool, shard, frames, pictures))
                # A batch is handed out only with AHEAD more in the pool, so that the threads stay
                # busy while the tower works. The bound also limits the buffers in use.
                if len(decoding) > AHEAD:
                    yield self._decoded(decoding.popleft())
            while decoding:
                yield self._decoded(decoding.popleft())

    def give_back(self, batch: Batch) -> None:
        """Let the buffer of a batch be used again; nobody may look at its pixels any more."""
        # The caller must have the features of the batch on the CPU: with pinned memory, a copy to
        # the GPU reads these pixels after the call that started it has returned.
        self._free.append(batch.pixels_BHW3)

    def _read(self, numbers: Iterable[int]) -> Iterator[tuple[Shard, range, Pictures]]:
        for number in numbers:
            try:
                yield from self._read_shard(number)
            except (DataError, MachineError, OSError) as error:
                if isinstance(error, MachineError):  # the network, after all tries
                    self._check_source()
                self._fail(number, error)

    def _read_shard(self, number: int) -> Iterator[tuple[Shard, range, Pictures]]:
        shard = open_shard(self._frames, number)
        batches = plan_batches(len(shard.index), self._config.batch_size) or (range(0),)
        pictures = READERS[self._config.reader](self._frames, shard, batches, self._rooms)
        for frames, files in zip(batches, pictures, strict=True):
            yield shard, frames, files

    def _check_source(self) -> None:
        """Read a small file; a source that is dead would hold each shard for its whole time."""
        with suppress(DataError):
            self._frames.storage.read(PLAN)

    def _decode(
        self, pool: ThreadPoolExecutor, shard: Shard, frames: range, pictures: Pictures
    ) -> _Decoding:
        pixels_BHW3 = self._buffer()
        # A reused buffer holds the pictures of an earlier batch. The rest of the last batch must be
        # the same in every run, since it goes through the tower too.
        pixels_BHW3[len(frames) :] = 0
        out_BHW3: Pixels = pixels_BHW3.numpy()

        def decode(places: range) -> list[str | bool]:
            return [self._decode_one(pictures[place], out_BHW3[place]) for place in places]

        pieces = plan_batches(len(frames), PIECE)
        return _Decoding(
            shard, frames, pictures, pixels_BHW3, [pool.submit(decode, each) for each in pieces]
        )

    def _decoded(self, decoding: _Decoding) -> Batch:
        batch = decoding.result()
        # The pictures are views into one read buffer: it is free once all of them are decoded.
        self._rooms.give_back(decoding.pictures)
        return batch

    def _decode_one(self, data: bytes | memoryview, out_HW3: Pixels) -> str | bool:
        """Return whether simplejpeg could do it, or why nobody can."""
        try:
            return self._decoder.decode(data, out_HW3)
        except BadImage as error:
            # A decoder may have written half a picture, and the buffer holds an older one.
            out_HW3[:] = 0
            return str(error)

    def _buffer(self) -> Tensor:
        if self._free:
            return self._free.pop()
        return torch.empty(self._size, dtype=torch.uint8, pin_memory=self._pinned)


@dataclass(frozen=True)
class _Decoding:
    """A batch that the pool works on."""

    shard: Shard
    frames: range
    pictures: Pictures
    pixels_BHW3: Tensor
    pieces: list[Future[list[str | bool]]]

    def result(self) -> Batch:
        """Wait for all of it."""
        said = [word for piece in self.pieces for word in piece.result()]
        bad = {
            frame: word
            for frame, word in zip(self.frames, said, strict=True)
            if isinstance(word, str)
        }
        by_pillow = sum(word is False for word in said)
        return Batch(self.shard, self.frames, self.pixels_BHW3, bad, by_pillow)


def ahead(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """Yield the items in order; another thread makes them, up to ``depth`` ahead."""
    # One thread: a generator must not be entered twice at once, and the order of items is kept.
    reader = ThreadPoolExecutor(1, "read")
    end = object()
    making: deque[Future[T | object]] = deque()
    try:
        while True:
            while len(making) <= depth:
                making.append(reader.submit(next, items, end))
            item = making.popleft().result()
            # Futures after this one only meet the end again; they are cancelled below.
            if item is end:
                return
            yield item  # type: ignore[misc]  # the end is the only item that is no T
    finally:
        reader.shutdown(cancel_futures=True)
