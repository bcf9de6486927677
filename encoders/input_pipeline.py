"""Input pipeline from frame shards to batches of pixels: one thread reads, a pool decodes.

Threads suffice: reading, decoding and resizing release the GIL, and batches pass between threads
without a copy. Pixel buffers are reused.
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
from encoders.decode import Decoder, Pixels
from encoders.shard_reader import READERS, EncodedImages, ReadBuffers, Shard, open_shard
from sharding.dump.jpeg import BadImage
from sharding.format.names import PLAN

if TYPE_CHECKING:
    from configs.schema import EncoderConfig
    from encoders.decode import Preprocessing
    from sharding.frames import FrameShards

AHEAD = 2
"""Batches read ahead, and batches decoded ahead."""

PIECE = 16
"""Images per decoding job: about ten milliseconds."""

T = TypeVar("T")
Fail = Callable[[int, Exception], None]
"""Called from any thread with a shard that cannot be read, and the error. The pipeline continues
unless the call raises."""


def _raise(_number: int, error: Exception) -> None:
    raise error


@dataclass(frozen=True, eq=False)
class Batch:
    """Decoded images of one forward pass."""

    shard: Shard
    frames: range
    """Their frame numbers within the shard."""

    pixels_BHW3: Tensor
    """uint8, RGB, full batch size; rows without an image are zero."""

    bad: dict[int, str] = field(default_factory=dict)
    """Reason per frame that cannot be decoded, by frame number."""

    by_pillow: int = 0
    """Images that simplejpeg refused and Pillow decoded."""

    @property
    def is_last(self) -> bool:
        """Return whether this is the last batch of its shard."""
        return self.frames.stop == len(self.shard.index)


class InputPipeline:
    """Reader and decoder of frame shards.

    Args:
        config: Reader, threads and batch size.
        preprocessing: Input format of the tower.
        frames: Frame shards to read.
        pinned: Whether pixels are in pinned memory, for asynchronous copies to a GPU.
        fail: Called with each shard that cannot be read completely; the default raises.
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
        self._decoder = Decoder(preprocessing)
        self._size = (config.batch_size, preprocessing.height, preprocessing.width, 3)
        self._free: list[Tensor] = []
        self._read_buffers = ReadBuffers()

    def batches(self, numbers: Iterable[int]) -> Generator[Batch, None, None]:
        """Yield the batches of these shards in order; a shard without frames has one empty batch.

        The batches of a shard that cannot be read completely end early, without the last one.

        Args:
            numbers: Shards; consumed lazily, a few batches ahead.

        Raises:
            MachineError: no shard can be read, because their storage does not respond.
        """
        threads = self._config.decode_threads or self._config.threads
        with ExitStack() as stack:
            # Closed in reverse order: first the reader, then the decoders. Both are joined, so that
            # no thread writes into a buffer after the loop.
            pool = ThreadPoolExecutor(threads, "decode")
            stack.callback(pool.shutdown, cancel_futures=True)
            read = ahead(self._read(numbers), AHEAD)
            stack.callback(read.close)
            decoding: deque[_Decoding] = deque()
            for shard, frames, encoded in read:
                decoding.append(self._decode(pool, shard, frames, encoded))
                # A batch is yielded only with AHEAD more in the pool, so that the threads stay busy
                # while the tower computes. The bound also limits the number of buffers.
                if len(decoding) > AHEAD:
                    yield self._decoded(decoding.popleft())
            while decoding:
                yield self._decoded(decoding.popleft())

    def give_back(self, batch: Batch) -> None:
        """Release the buffer of a batch for reuse; its pixels must not be read any more."""
        # The caller must have the features of the batch on the CPU: with pinned memory, the copy to
        # the GPU still reads these pixels after the call that started it has returned.
        self._free.append(batch.pixels_BHW3)

    def _read(self, numbers: Iterable[int]) -> Iterator[tuple[Shard, range, EncodedImages]]:
        for number in numbers:
            try:
                yield from self._read_shard(number)
            except (DataError, MachineError, OSError) as error:
                if isinstance(error, MachineError):  # the network, after all retries
                    self._check_source()
                self._fail(number, error)

    def _read_shard(self, number: int) -> Iterator[tuple[Shard, range, EncodedImages]]:
        shard = open_shard(self._frames, number)
        batches = plan_batches(len(shard.index), self._config.batch_size) or (range(0),)
        images = READERS[self._config.reader](self._frames, shard, batches, self._read_buffers)
        for frames, encoded in zip(batches, images, strict=True):
            yield shard, frames, encoded

    def _check_source(self) -> None:
        """Read a small file, which raises if the storage does not respond.

        Otherwise every shard would wait for its own time-out.
        """
        with suppress(DataError):
            self._frames.storage.read(PLAN)

    def _decode(
        self, pool: ThreadPoolExecutor, shard: Shard, frames: range, encoded: EncodedImages
    ) -> _Decoding:
        pixels_BHW3 = self._buffer()
        # A reused buffer contains the pixels of an earlier batch. The padding of the last batch
        # goes through the tower too, so it must be deterministic.
        pixels_BHW3[len(frames) :] = 0
        out_BHW3: Pixels = pixels_BHW3.numpy()

        def decode(places: range) -> list[str | bool]:
            return [self._decode_one(encoded[place], out_BHW3[place]) for place in places]

        pieces = plan_batches(len(frames), PIECE)
        return _Decoding(
            shard, frames, encoded, pixels_BHW3, [pool.submit(decode, each) for each in pieces]
        )

    def _decoded(self, decoding: _Decoding) -> Batch:
        batch = decoding.result()
        # The encoded images are views into one read buffer, free once all of them are decoded.
        self._read_buffers.give_back(decoding.encoded)
        return batch

    def _decode_one(self, data: bytes | memoryview, out_HW3: Pixels) -> str | bool:
        """Decode an image; return whether simplejpeg could decode it, or why it is bad."""
        try:
            return self._decoder.decode(data, out_HW3)
        except BadImage as error:
            # The decoder may have written a part of the image.
            out_HW3[:] = 0
            return str(error)

    def _buffer(self) -> Tensor:
        if self._free:
            return self._free.pop()
        return torch.empty(self._size, dtype=torch.uint8, pin_memory=self._pinned)


@dataclass(frozen=True)
class _Decoding:
    """A batch that the pool is decoding."""

    shard: Shard
    frames: range
    encoded: EncodedImages
    pixels_BHW3: Tensor
    pieces: list[Future[list[str | bool]]]

    def result(self) -> Batch:
        """Wait for all images and return the batch."""
        # Per image: True if simplejpeg decoded it, False if Pillow did, else the reason.
        outcomes = [outcome for piece in self.pieces for outcome in piece.result()]
        bad = {
            frame: outcome
            for frame, outcome in zip(self.frames, outcomes, strict=True)
            if isinstance(outcome, str)
        }
        by_pillow = sum(outcome is False for outcome in outcomes)
        return Batch(self.shard, self.frames, self.pixels_BHW3, bad, by_pillow)


def ahead(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """Yield the items in order; another thread produces them, up to ``depth`` ahead."""
    # One thread: a generator must not be entered concurrently, and the order of items is kept.
    reader = ThreadPoolExecutor(1, "read")
    end = object()
    pending: deque[Future[T | object]] = deque()
    try:
        while True:
            while len(pending) <= depth:
                pending.append(reader.submit(next, items, end))
            item = pending.popleft().result()
            # The remaining futures would return the end again; they are cancelled below.
            if item is end:
                return
            yield item  # type: ignore[misc]  # only the end is not a T
    finally:
        reader.shutdown(cancel_futures=True)
