"""The loop: frame shards through the tower into feature shards.

One thread reads whole batches in the order of the tar, a pool decodes them, and the tower works on
the batch before. Nothing is shared between ranks, and none waits for another.
"""

# B = frames of a batch, H, W = pixels, D = feature size, F = frames of a shard

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from configs.errors import DataError
from encoders.batches import plan_batches, rows_of_movies
from encoders.decode import BadImage, Decoder, Pixels
from sharding.features import MovieFeatures, publish_feature_shard
from sharding.forms import frame_name
from sharding.storage import Range

if TYPE_CHECKING:
    from configs.schema import EncoderConfig
    from encoders.plan import EncodePlan
    from encoders.registry import Tower
    from sharding.forms import FrameIndex
    from sharding.frames import FrameSet
    from sharding.storage import Storage

logger = logging.getLogger(__name__)

AHEAD = 2
"""Batches read and decoded before the tower asks for them."""

Rows = np.ndarray[Any, np.dtype[np.float16]]
Watcher = Callable[[int, float], None]
"""Called after each batch with its images and the seconds the tower waited for them."""

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Shard:
    """One frame shard on its way."""

    number: int
    index: FrameIndex
    movies: tuple[str, ...]


@dataclass(frozen=True)
class Decoded:
    """One batch of pictures."""

    shard: Shard
    frames: range
    """Their numbers within the shard."""

    pixels_BHW3: Tensor
    """uint8, full size: places that hold no picture are zero."""

    bad: dict[int, str]
    """Why the frames of these numbers are no pictures."""

    by_pillow: int
    """Pictures that simplejpeg refused."""


@dataclass
class Encoded:
    """What has been done so far."""

    shards: int = 0
    images: int = 0
    rejected: int = 0
    by_pillow: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    """Seconds of them that the tower waited for data."""

    def line(self) -> str:
        """Return the result in one line; it says which side waited."""
        share = self.waited / self.seconds if self.seconds else 0.0
        side = (
            f"the tower waited for data {share:.0%} of the time: "
            "more encoder.decode_threads may help"
            if share > 0.1
            else f"data waited for the tower (it waited {share:.0%} of the time)"
        )
        rate = self.images / self.seconds if self.seconds else 0.0
        return (
            f"shards {self.shards:,}   images {self.images:,}   rejected {self.rejected:,}   "
            f"read by Pillow {self.by_pillow:,}   {rate:,.0f} images/s   {side}"
        )


@dataclass
class Open:
    """The shard that is being filled."""

    shard: Shard
    rows: list[Rows] = field(default_factory=list)
    bad: dict[int, str] = field(default_factory=dict)
    by_pillow: int = 0


class Extractor:
    """Encodes frame shards with one tower."""

    def __init__(
        self,
        config: EncoderConfig,
        plan: EncodePlan,
        tower: Tower,
        device: torch.device,
        *,
        frames: FrameSet,
        features: Storage,
    ) -> None:
        self._config, self._plan, self._tower, self._device = config, plan, tower, device
        self._frames, self._features = frames, features
        self._decoder = Decoder(tower.preprocessing, config.preprocess)
        self.done = Encoded()

    def run(self, numbers: Iterable[int], watch: Watcher = lambda _images, _seconds: None) -> None:
        """Encode and publish these shards, in this order.

        Raises:
            DataError: a shard cannot be read, or too many of its images cannot be decoded.
        """
        start = time.monotonic()
        current: Open | None = None
        flying: tuple[Decoded, Tensor] | None = None
        for batch, waited in self._batches(numbers):
            # A GPU returns at once and computes on; so look at a result one batch later.
            features_BD = self._encode(batch)
            if flying:
                current = self._collect(current, *flying)
            flying = batch, features_BD
            self.done.waited += waited
            self.done.images += len(batch.frames)
            self.done.seconds = time.monotonic() - start
            watch(len(batch.frames), waited)
        if flying:
            self._collect(current, *flying)
        self.done.seconds = time.monotonic() - start

    def _batches(self, numbers: Iterable[int]) -> Iterator[tuple[Decoded, float]]:
        """Yield decoded batches of all shards, each with the seconds it was waited for."""
        with ExitStack() as stack:
            threads = self._config.decode_threads or self._config.threads
            pool = stack.enter_context(ThreadPoolExecutor(threads, "decode"))

            def load(work: tuple[Shard, range]) -> Decoded:
                return self._load(pool, *work)

            batches = ahead(load, self._work(numbers), AHEAD)
            stack.callback(batches.close)
            while True:
                start = time.monotonic()
                batch = next(batches, None)
                if batch is None:
                    return
                yield batch, time.monotonic() - start

    def _work(self, numbers: Iterable[int]) -> Iterator[tuple[Shard, range]]:
        for number in numbers:
            index = self._frames.frame_index(number)
            shard = Shard(number, index, self._frames.shard_movies(number))
            batches = plan_batches(len(index), self._config.batch_size)
            if not batches:
                self._publish(Open(shard))
            for frames in batches:
                yield shard, frames

    def _load(self, pool: ThreadPoolExecutor, shard: Shard, frames: range) -> Decoded:
        """Read one stretch of the tar and decode the pictures in it."""
        index = shard.index
        begin = int(index.offset[frames[0]])
        end = int(index.offset[frames[-1]]) + int(index.size[frames[-1]])
        stretch = memoryview(bytearray(end - begin))
        name = self._frames.tar_name(shard.number)
        self._frames.storage.read_into([Range(name, begin)], [stretch])
        want = self._tower.preprocessing
        size = (self._config.batch_size, want.height, want.width, 3)
        pixels = torch.zeros(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        out_BHW3: Pixels = pixels.numpy()

        def decode(frame: int) -> str | bool:
            first = int(index.offset[frame]) - begin
            data = stretch[first : first + int(index.size[frame])]
            try:
                return self._decoder.decode(data, out_BHW3[frame - frames.start])
            except BadImage as error:
                return str(error)

        said = dict(zip(frames, pool.map(decode, frames), strict=True))
        bad = {frame: reason for frame, reason in said.items() if isinstance(reason, str)}
        return Decoded(shard, frames, pixels, bad, sum(word is False for word in said.values()))

    def _encode(self, batch: Decoded) -> Tensor:
        pixels = batch.pixels_BHW3.to(self._device, non_blocking=True)
        features_BD = self._tower.encode(pixels.permute(0, 3, 1, 2))
        if self._config.normalize:
            features_BD = normalize(features_BD, dim=-1)
        return features_BD.to(torch.float16)

    def _collect(self, current: Open | None, batch: Decoded, features_BD: Tensor) -> Open:
        """Add the rows of a batch to its shard; publish the shard after the last one."""
        if current is None or current.shard is not batch.shard:
            current = Open(batch.shard)
        rows: Rows = features_BD[: len(batch.frames)].cpu().numpy()
        self._check_finite(batch, rows)
        current.rows.append(rows)
        current.bad.update(batch.bad)
        current.by_pillow += batch.by_pillow
        self._check_bad(current)
        if batch.frames.stop == len(batch.shard.index):
            self._publish(current)
        return current

    def _check_finite(self, batch: Decoded, rows: Rows) -> None:
        if not np.isfinite(rows).all():
            raise DataError(
                f"shard {batch.shard.number}: {self._tower.name} gave values that float16 cannot "
                f"hold, at encoder.precision {self._plan.encoder['precision']!r}; try 'fp32', or "
                "encoder.normalize=true"
            )

    def _check_bad(self, current: Open) -> None:
        total, bad = len(current.shard.index), current.bad
        if len(bad) <= self._config.max_bad_fraction * total:
            return
        frame, reason = next(iter(bad.items()))
        movie = current.shard.movies[int(current.shard.index.movie[frame])]
        raise DataError(
            f"{self._frames.tar_name(current.shard.number)}: {len(bad)} of {total} images cannot "
            f"be decoded, more than encoder.max_bad_fraction {self._config.max_bad_fraction}; "
            f"first: {movie}/{_name(current.shard.index, frame)}: {reason}"
        )

    def _publish(self, current: Open) -> None:
        shard = current.shard
        source = self._frames.manifest.shards[shard.number].sha256
        publish_feature_shard(
            self._features,
            shard.number,
            _movies(current, self._plan.dim),
            made_from=self._plan.made_from(source),
            information={
                "torch": torch.__version__,
                "open_clip_torch": version("open_clip_torch"),
                "device": _device_name(self._device),
                "read_by_pillow": current.by_pillow,
            },
        )
        self.done.shards += 1
        self.done.rejected += len(current.bad)
        self.done.by_pillow += current.by_pillow


def ahead(load: Callable[[T], U], work: Iterable[T], depth: int) -> Generator[U, None, None]:
    """Yield ``load(item)`` for each item, in order; another thread is ``depth`` items ahead."""
    reader = ThreadPoolExecutor(1, "read")
    loading: deque[Future[U]] = deque()
    try:
        for item in work:
            loading.append(reader.submit(load, item))
            if len(loading) > depth:
                yield loading.popleft().result()
        while loading:
            yield loading.popleft().result()
    finally:
        reader.shutdown(cancel_futures=True)


def _movies(current: Open, dim: int) -> Iterator[MovieFeatures]:
    index, bad = current.shard.index, current.bad
    rows_FD = np.concatenate([np.empty((0, dim), np.float16), *current.rows])
    good_F = np.ones(len(index), dtype=bool)
    good_F[list(bad)] = False
    places = rows_of_movies(index.movie, len(current.shard.movies))
    for movie, rows in zip(current.shard.movies, places, strict=True):
        yield MovieFeatures(
            movie=movie,
            features_ND=rows_FD[rows][good_F[rows]],
            shots_N=index.shot[rows][good_F[rows]],
            images=rows.stop - rows.start,
            rejected={
                _name(index, frame): bad[frame]
                for frame in range(rows.start, rows.stop)
                if frame in bad
            },
        )


def _name(index: FrameIndex, frame: int) -> str:
    return frame_name(int(index.shot[frame]), int(index.image[frame]))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
