"""The loop: frame shards through the tower into feature shards.

The feed decodes the next batches while the tower works on this one, and a thread publishes the
shard before. Nothing is shared between ranks, and none waits for another.
"""

# B = frames of a batch, H, W = pixels, D = feature size, F = frames of a shard

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from configs.errors import DataError
from encoders.batching import rows_of_movies
from encoders.input_pipeline import Batch, InputPipeline
from sharding.features import MovieFeatures, feature_shard_done, publish_feature_shard

if TYPE_CHECKING:
    from configs.schema import EncoderConfig
    from encoders.encode_plan import EncodePlan
    from encoders.registry import Tower
    from encoders.shard_reader import Shard
    from sharding.frames import FrameShards
    from sharding.storage.base import Storage

logger = logging.getLogger(__name__)

Rows = np.ndarray[Any, np.dtype[np.float16]]
Watcher = Callable[[int], bool]
"""Called after each batch with its images; tells whether to go on."""

T = TypeVar("T")


@dataclass
class EncodeStats:
    """What has been done so far."""

    shards: int = 0
    images: int = 0
    rejected: int = 0
    by_pillow: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    """Seconds of them that the tower waited for data."""

    left: int = 0
    """Images of the shard in hand that are still to come."""

    failed: dict[int, str] = field(default_factory=dict)
    """What is wrong with the shards that failed, by number."""

    read_errors: set[int] = field(default_factory=set)
    """Those of them that the system could not read."""

    in_tower: float = 0.0
    """Seconds of them that the tower worked, or its result was waited for."""

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def waiting(self) -> float:
        """Share of the time that the tower waited for data."""
        return self.waited / self.seconds if self.seconds else 0.0

    @property
    def working(self) -> float:
        """Share of the time that was spent in the tower."""
        return self.in_tower / self.seconds if self.seconds else 0.0

    def second_try(self) -> list[int]:
        """Return the shards that the system could not read, and forget that: it may pass."""
        numbers = sorted(self.read_errors)
        for number in numbers:
            del self.failed[number]
        self.read_errors.clear()
        return numbers

    def line(self) -> str:
        """Return the result in one line; it says which side waited, and what that means."""
        return (
            f"shards {self.shards:,}   images {self.images:,}   rejected {self.rejected:,}   "
            f"read by Pillow {self.by_pillow:,}   {self.rate:,.0f} images/s   "
            f"waited for data {self.waiting:.0%}, in the tower {self.working:.0%} of the time: "
            f"{self._advice()}"
        )

    def _advice(self) -> str:
        if not self.images:
            return "nothing was to be encoded"
        if self.waiting > 0.25:  # a short task waits a tenth: at its start
            return (
                "the tower waited; more cores a rank with more encoder.decode_threads, or faster "
                "storage, would help"
            )
        return (
            "data waited for the tower; more devices, or a larger encoder.batch_size in a new "
            "set, would help"
        )


@dataclass
class Open:
    """The shard that is being filled."""

    shard: Shard
    rows: list[Rows] = field(default_factory=list)
    bad: dict[int, str] = field(default_factory=dict)
    by_pillow: int = 0
    failed: bool = False
    whole: bool = False


class Extractor:
    """Encodes frame shards with one tower."""

    def __init__(
        self,
        config: EncoderConfig,
        plan: EncodePlan,
        tower: Tower,
        device: torch.device,
        *,
        frames: FrameShards,
        features: Storage,
    ) -> None:
        self._config, self._plan, self._tower, self._device = config, plan, tower, device
        self._frames, self._features = frames, features
        pinned = device.type == "cuda"
        self._feed = InputPipeline(
            config, tower.preprocessing, frames, pinned=pinned, fail=self.fail
        )
        self._upload = _Upload(device)
        self.done = EncodeStats()

    @property
    def n_shards(self) -> int:
        """Shards of the whole set."""
        return self._plan.n_shards

    def run(self, numbers: Iterable[int], watch: Watcher = lambda _images: True) -> None:
        """Encode and publish these shards, in this order; a shard that is not ended is dropped.

        One with too many bad images, or that cannot be read, is left out and stands in
        ``done.failed``: it is no reason to leave the others undone.

        Raises:
            DataError: the tower gives values that float16 cannot hold.
            MachineError: not a shard, but their source as a whole cannot be read.
        """
        start = time.monotonic() - self.done.seconds
        publishing: Future[None] | None = None
        # Closed in reverse order: reading and decoding end first, then the publication in progress
        # is completed, because its shard is encoded already.
        with (
            ThreadPoolExecutor(1, "publish") as publisher,
            closing(self._feed.batches(numbers)) as batches,
        ):
            for shard in self._whole_shards(batches, watch, start):
                # Publishing shard k overlaps with encoding shard k + 1, no further: the rows of two
                # shards bound the memory, and an error of k ends the run before k + 1 is published.
                if publishing:
                    publishing.result()
                publishing = publisher.submit(self._publish, shard)
            # The last one has no successor that would raise its error.
            if publishing:
                publishing.result()
        self.done.seconds = time.monotonic() - start

    def _whole_shards(
        self, batches: Iterable[Batch], watch: Watcher, start: float
    ) -> Iterator[Open]:
        """Yield each shard after its last batch."""
        current: Open | None = None
        flying: tuple[Batch, Tensor] | None = None
        for batch, waited in timed(batches):
            # On a GPU encode() returns before the result is computed, and reading the result waits
            # for it. Reading it one batch later keeps the GPU busy in between.
            features_BD = self._encode(batch)
            if flying:
                current = self._collect(current, *flying)
                if current.whole:
                    yield current
            flying = batch, features_BD
            self.done.waited += waited
            self.done.images += len(batch.frames)
            self.done.left = len(batch.shard.index) - batch.frames.stop
            self.done.seconds = time.monotonic() - start
            if not watch(len(batch.frames)):
                break
        # After the last batch, and after a stop: the batch in flight may complete its shard.
        if flying:
            current = self._collect(current, *flying)
            if current.whole:
                yield current

    def fail(self, number: int, error: Exception) -> None:
        """Leave out a shard that cannot be read; any thread may say so."""
        reason = str(error)
        if isinstance(error, OSError):
            self.done.read_errors.add(number)
            reason = f"{error.filename}: {error.strerror}" if error.filename else reason
        self._leave_out(number, reason)

    def _leave_out(self, number: int, reason: str) -> None:
        self.done.failed[number] = f"{self._frames.tar_name(number)}: {reason}"
        logger.error("%s; the other shards go on", self.done.failed[number])

    def _encode(self, batch: Batch) -> Tensor:
        begin = time.monotonic()
        pixels_BHW3 = self._upload(batch.pixels_BHW3)
        features_BD = self._tower.encode(pixels_BHW3.permute(0, 3, 1, 2))
        if self._config.normalize:
            features_BD = normalize(features_BD, dim=-1)
        features_BD = features_BD.to(torch.float16)
        self.done.in_tower += time.monotonic() - begin
        return features_BD

    def _collect(self, current: Open | None, batch: Batch, features_BD: Tensor) -> Open:
        """Add the rows of a batch to its shard."""
        # By identity: a shard that is retried has the same number. An incomplete shard is dropped
        # here, because its last batch never came.
        if current is None or current.shard is not batch.shard:
            current = Open(batch.shard)
        begin = time.monotonic()
        rows: Rows = features_BD[: len(batch.frames)].cpu().numpy()
        self.done.in_tower += time.monotonic() - begin
        self._feed.give_back(batch)  # what was made of its pixels is here
        if not current.failed:
            self._add(current, batch, rows)
        return current

    def _add(self, current: Open, batch: Batch, rows: Rows) -> None:
        self._check_finite(batch, rows)
        current.rows.append(rows)
        current.bad.update(batch.bad)
        current.by_pillow += batch.by_pillow
        failure = self._too_many_bad(current)
        if failure:
            current.failed = True
            current.rows.clear()
            self._leave_out(current.shard.number, failure)
        else:
            current.whole = batch.is_last

    def _check_finite(self, batch: Batch, rows: Rows) -> None:
        if not np.isfinite(rows).all():
            raise DataError(
                f"shard {batch.shard.number}: {self._tower.name} gave values that float16 cannot "
                f"hold, at encoder.precision {self._plan.encoder['precision']!r}; try 'fp32', or "
                "encoder.normalize=true"
            )

    def _too_many_bad(self, current: Open) -> str | None:
        total, bad = len(current.shard.index), current.bad
        if len(bad) <= self._config.max_bad_fraction * total:
            return None
        frame, reason = next(iter(bad.items()))
        name = f"{current.shard.movie(frame)}/{current.shard.name(frame)}"
        return (
            f"{len(bad)} of {total} images cannot be decoded, more than "
            f"encoder.max_bad_fraction {self._config.max_bad_fraction}; first: {name}: {reason}"
        )

    def _publish(self, current: Open) -> None:
        shard = current.shard
        input_digest = self._plan.input_digest(self._frames.sealed(shard.number).sha256)
        # The task skipped finished shards when it started, but a second attempt may be alive and
        # may have published this one since. The first one published is kept: readers may use it.
        if feature_shard_done(self._features, shard.number, input_digest, replace=True):
            logger.warning("shard %d: another task has published it; its bytes stay", shard.number)
            return
        publish_feature_shard(
            self._features,
            shard.number,
            _movies(current, self._plan.dim),
            input_digest=input_digest,
            information={
                **self._tower.versions(),
                "torch": torch.__version__,
                "device": _device_name(self._device),
                "read_by_pillow": current.by_pillow,
            },
        )
        self.done.shards += 1
        self.done.rejected += len(current.bad)
        self.done.by_pillow += current.by_pillow


class _Upload:
    """Copies pixels to the device, on a GPU while it still computes on those before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]

    def __call__(self, pixels: Tensor) -> Tensor:
        if self._stream is None:
            return pixels.to(self._device)
        # On a stream of its own the copy overlaps with the batch that is being computed; the
        # stream of the tower then waits for the copy, not the CPU.
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            there = pixels.to(self._device, non_blocking=True)
        computing.wait_stream(self._stream)
        there.record_stream(computing)  # its memory is not free before that stream has read it
        return there


def timed(items: Iterable[T]) -> Iterator[tuple[T, float]]:
    """Yield each item with the seconds it was waited for."""
    start = time.monotonic()
    for item in items:
        yield item, time.monotonic() - start
        start = time.monotonic()


def _movies(current: Open, dim: int) -> Iterator[MovieFeatures]:
    shard, index, bad = current.shard, current.shard.index, current.bad
    rows_FD = np.concatenate([np.empty((0, dim), np.float16), *current.rows])
    good_F = np.ones(len(index), dtype=bool)
    good_F[list(bad)] = False
    places = rows_of_movies(index.movie, len(shard.movies))
    for movie, rows in zip(shard.movies, places, strict=True):
        yield MovieFeatures(
            movie=movie,
            features_ND=rows_FD[rows][good_F[rows]],
            shots_N=index.shot[rows][good_F[rows]],
            images=rows.stop - rows.start,
            rejected={
                shard.name(frame): bad[frame]
                for frame in range(rows.start, rows.stop)
                if frame in bad
            },
        )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
