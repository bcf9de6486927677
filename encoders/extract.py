"""The encoding loop: reads frame shards, runs the tower, publishes feature shards.

Reading and decoding of the next batches, the tower, and the publication of the previous shard
overlap. Ranks share nothing and never wait for each other here.
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
Watcher = Callable[[Batch], bool]
"""Called after each batch; returns whether to continue."""

T = TypeVar("T")


@dataclass
class EncodeStats:
    """Work of one rank so far."""

    shards: int = 0
    images: int = 0
    rejected: int = 0
    """Images without a row in published shards, because they cannot be decoded."""

    by_pillow: int = 0
    """Images in published shards that simplejpeg refused and Pillow decoded."""

    seconds: float = 0.0
    waited: float = 0.0
    """Part of ``seconds`` in which the tower waited for data."""

    left: int = 0
    """Images of the current shard that are not encoded yet."""

    failed: dict[int, str] = field(default_factory=dict)
    """Reason per failed shard, by number."""

    read_errors: set[int] = field(default_factory=set)
    """Failed shards with a read error of the operating system."""

    in_tower: float = 0.0
    """Part of ``seconds`` in which the tower computed or its result was awaited."""

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def waiting(self) -> float:
        """Fraction of the time in which the tower waited for data."""
        return self.waited / self.seconds if self.seconds else 0.0

    @property
    def working(self) -> float:
        """Fraction of the time spent in the tower."""
        return self.in_tower / self.seconds if self.seconds else 0.0

    def second_try(self) -> list[int]:
        """Return the shards with a read error, and clear the errors, which may be transient."""
        numbers = sorted(self.read_errors)
        for number in numbers:
            del self.failed[number]
        self.read_errors.clear()
        return numbers

    def lines(self) -> tuple[str, ...]:
        """Return counts, rate and the bottleneck with advice, in lines of 80 columns."""
        rate = f"{self.rate:,.0f}" if self.rate >= 100 else f"{self.rate:.3g}"
        counts = f"encoded {self.shards:,} shards, {self.images:,} images, {rate} images/s"
        if not self.images:
            return (counts,)
        return (
            counts,
            f"{self.rejected:,} images rejected, {self.by_pillow:,} read by Pillow",
            f"waited for data {self.waiting:.0%}, in the tower {self.working:.0%} of the time",
            self._advice(),
        )

    def _advice(self) -> str:
        # Even a balanced task waits at its start, for a tenth of the time if it is short.
        if self.waiting > 0.25:
            return "bottleneck: data; add encoder.decode_threads and cores, or use faster storage"
        return "bottleneck: tower; add devices, or raise encoder.batch_size in a new set"


@dataclass
class OpenShard:
    """A feature shard whose rows are being collected."""

    shard: Shard
    rows: list[Rows] = field(default_factory=list)
    bad: dict[int, str] = field(default_factory=dict)
    by_pillow: int = 0
    failed: bool = False
    is_complete: bool = False


class Extractor:
    """Encoder of frame shards with one tower.

    Args:
        config: Batch size, normalization and limits.
        plan: Plan of the feature set.
        tower: Image tower, built on ``device``.
        device: Where the tower runs.
        frames: Frame shards to read.
        features: Where feature shards are published.
    """

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
        self._pipeline = InputPipeline(
            config, tower.preprocessing, frames, pinned=pinned, fail=self.fail
        )
        self._upload = _Upload(device)
        self.done = EncodeStats()

    @property
    def n_shards(self) -> int:
        """Number of shards of the set."""
        return self._plan.n_shards

    def run(self, numbers: Iterable[int], watch: Watcher = lambda _batch: True) -> None:
        """Encode and publish these shards in this order; an incomplete shard is dropped.

        A shard that cannot be read or has too many bad images does not stop the others: it is
        recorded in ``done.failed``.

        Args:
            numbers: Shards; consumed lazily, a few batches ahead of the tower.
            watch: Called after each batch; encoding ends when it returns False.

        Raises:
            DataError: the tower returns values that float16 cannot hold.
            MachineError: no shard can be read, because their storage does not respond.
        """
        start = time.monotonic() - self.done.seconds
        publishing: Future[None] | None = None
        # Closed in reverse order: reading and decoding end first, then the publication in progress
        # is completed, because its shard is encoded already.
        with (
            ThreadPoolExecutor(1, "publish") as publisher,
            closing(self._pipeline.batches(numbers)) as batches,
        ):
            for shard in self._completed_shards(batches, watch, start):
                # Publishing shard k overlaps with encoding shard k + 1, no further: the rows of two
                # shards bound the memory, and an error of k ends the run before k + 1 is published.
                if publishing:
                    publishing.result()
                publishing = publisher.submit(self._publish, shard)
            # The last one has no successor that would raise its error.
            if publishing:
                publishing.result()
        self.done.seconds = time.monotonic() - start

    def _completed_shards(
        self, batches: Iterable[Batch], watch: Watcher, start: float
    ) -> Iterator[OpenShard]:
        """Yield each shard once its last batch is encoded."""
        current: OpenShard | None = None
        in_flight: tuple[Batch, Tensor] | None = None
        for batch, waited in timed(batches):
            # On a GPU encode() returns before the result is computed, and reading the result waits
            # for it. Reading it one batch later keeps the GPU busy in between.
            features_BD = self._encode(batch)
            if in_flight:
                current = self._collect(current, *in_flight)
                if current.is_complete:
                    yield current
            in_flight = batch, features_BD
            self.done.waited += waited
            self.done.images += len(batch.frames)
            self.done.left = len(batch.shard.index) - batch.frames.stop
            self.done.seconds = time.monotonic() - start
            if not watch(batch):
                break
        # After the last batch, and after a stop: the batch in flight may complete its shard.
        if in_flight:
            current = self._collect(current, *in_flight)
            if current.is_complete:
                yield current

    def fail(self, number: int, error: Exception) -> None:
        """Record that a shard cannot be read; may be called from any thread."""
        reason = str(error)
        if isinstance(error, OSError):
            self.done.read_errors.add(number)
            reason = f"{error.filename}: {error.strerror}" if error.filename else reason
        self._record_failure(number, reason)

    def _record_failure(self, number: int, reason: str) -> None:
        self.done.failed[number] = f"{self._frames.tar_name(number)}: {reason}"
        logger.error("%s; continuing with the other shards", self.done.failed[number])

    def _encode(self, batch: Batch) -> Tensor:
        begin = time.monotonic()
        pixels_BHW3 = self._upload(batch.pixels_BHW3)
        features_BD = self._tower.encode(pixels_BHW3.permute(0, 3, 1, 2))
        if self._config.normalize:
            features_BD = normalize(features_BD, dim=-1)
        features_BD = features_BD.to(torch.float16)
        self.done.in_tower += time.monotonic() - begin
        return features_BD

    def _collect(self, current: OpenShard | None, batch: Batch, features_BD: Tensor) -> OpenShard:
        """Add the rows of a batch to its shard, and return the shard."""
        # By identity: a shard that is retried has the same number. An incomplete shard is dropped
        # here, because its last batch never came.
        if current is None or current.shard is not batch.shard:
            current = OpenShard(batch.shard)
        begin = time.monotonic()
        rows: Rows = features_BD[: len(batch.frames)].cpu().numpy()
        self.done.in_tower += time.monotonic() - begin
        self._pipeline.give_back(batch)  # its features are on the CPU, so its pixels are free
        if not current.failed:
            self._add(current, batch, rows)
        return current

    def _add(self, current: OpenShard, batch: Batch, rows: Rows) -> None:
        self._check_finite(batch, rows)
        current.rows.append(rows)
        current.bad.update(batch.bad)
        current.by_pillow += batch.by_pillow
        failure = self._too_many_bad(current)
        if failure:
            current.failed = True
            current.rows.clear()
            self._record_failure(current.shard.number, failure)
        else:
            current.is_complete = batch.is_last

    def _check_finite(self, batch: Batch, rows: Rows) -> None:
        if not np.isfinite(rows).all():
            raise DataError(
                f"shard {batch.shard.number}: {self._tower.name} returned values that float16 "
                f"cannot hold, at encoder.precision {self._plan.encoder['precision']!r}; set "
                "encoder.precision=fp32 or encoder.normalize=true"
            )

    def _too_many_bad(self, current: OpenShard) -> str | None:
        total, bad = len(current.shard.index), current.bad
        if len(bad) <= self._config.max_bad_fraction * total:
            return None
        frame, reason = next(iter(bad.items()))
        name = f"{current.shard.movie(frame)}/{current.shard.name(frame)}"
        return (
            f"{len(bad)} of {total} images cannot be decoded, more than "
            f"encoder.max_bad_fraction {self._config.max_bad_fraction}; first: {name}: {reason}"
        )

    def _publish(self, current: OpenShard) -> None:
        shard = current.shard
        input_digest = self._plan.input_digest(self._frames.sealed(shard.number).sha256)
        # The task skipped completed shards when it started, but a concurrent attempt may have
        # published this one since. The first one published is kept: readers may use it.
        if feature_shard_done(self._features, shard.number, input_digest, replace=True):
            logger.warning("shard %d: already published by a concurrent task; kept", shard.number)
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
    """Copies pixels to the device; on a GPU the copy overlaps with the previous batch."""

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
            uploaded = pixels.to(self._device, non_blocking=True)
        computing.wait_stream(self._stream)
        # The allocator must not reuse this memory before the other stream has read it.
        uploaded.record_stream(computing)
        return uploaded


def timed(items: Iterable[T]) -> Iterator[tuple[T, float]]:
    """Yield each item with the seconds spent waiting for it."""
    start = time.monotonic()
    for item in items:
        yield item, time.monotonic() - start
        start = time.monotonic()


def _movies(current: OpenShard, dim: int) -> Iterator[MovieFeatures]:
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
