"""A stream that reads the same shards with the webdataset library: a reference for tests.

Complete samples are read sequentially; windows are cut from them and mixed in a shuffle buffer. An
epoch has exactly the windows of the plan, with their labels, but their order is only approximately
random and depends on the world size. To resume, the completed part of the epoch is read again.

Axes: B = windows of a batch, T = rows of a window, D = feature size, N = rows of a movie.
"""

from __future__ import annotations

import io
import logging
import random
import shlex
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import webdataset
from numpy.typing import NDArray

from configs.corrupt import report_corrupt
from configs.errors import ConfigError, DataError, StateError
from configs.runtime.hints import hint
from sharding.format.encoding import read_npy_header
from sharding.format.names import movie_id
from training.stream.base import BatchStream, checked_movies, checked_share, order_of
from training.stream.cursor import Digests, EpochCursor
from training.stream.epoch_plan import IntArray, Slice, WindowPlan, plan_epoch, slice_size
from training.stream.read_plan import ROW_TYPE
from training.stream.reader import Features, ReadSlice

if TYPE_CHECKING:
    from configs.schema import StreamConfig
    from sharding.features import FeatureSet
    from sharding.storage.base import Storage
    from training.stream.batch import Batch
    from training.stream.cursor import StreamState

logger = logging.getLogger(__name__)

MIXED_WINDOWS = 256
"""Windows in the shuffle buffer, which is in memory."""


class _Window(NamedTuple):
    number: int
    """Position in the plan."""

    rows_ND: Features


class WebDatasetStream(BatchStream):
    """Epochs of training windows for one rank, read with webdataset.

    Shard n is read by rank n modulo the world size. Ranks whose shards have fewer windows end with
    all-zero windows of weight 0, so that every rank yields the same number of batches.

    Args:
        features: A sealed feature set.
        movies: int64 ``[N]``, distinct positions in the feature index.
        config: The ``stream`` section; ``threads``, ``prefetch`` and the cache are not used.
        rank: 0 to ``world_size - 1``.
        world_size: Ranks that share the epoch.
        accumulation: Micro-batches per optimizer step.
        shuffle_frames: Permute the rows of every movie by (seed, movie) before windows are cut.
        partners: Not supported.

    Raises:
        ConfigError: webdataset does not support the configuration.
        DataError: there are no movies, or a movie has no rows.
    """

    def __init__(
        self,
        features: FeatureSet,
        movies: IntArray,
        config: StreamConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        shuffle_frames: bool = False,
        partners: bool = False,
    ) -> None:
        _check_config(config)
        if partners:
            raise ConfigError(
                "training.mixup: got above 0 with stream.reader webdataset, which does not support "
                "it; want 0, or stream.reader=index"
            )
        self._features, self._window = features, config.window
        self._movies = checked_movies(features, movies)
        share = checked_share(rank, world_size, accumulation)
        self._order = order_of(config, shuffle_frames=shuffle_frames)
        self._counts = self._windows_per_rank(world_size)
        """``[ranks]`` windows of each rank, the same in every epoch."""
        self.batch_size = slice_size(int(self._counts.sum()), config.global_batch, share.n_slices)
        steps = int(-(-self._counts.max() // (self.batch_size * accumulation)))
        digests = Digests(
            data=features.digest,
            labels=features.labels.digest,
            # Names the reader: neither kind of stream can resume from a state of the other.
            plan=f"webdataset-{self._order.digest(self._movies)}",
        )
        super().__init__(EpochCursor(steps, digests), share, features.storage)
        self._field, self._movie_of = _field_of(features)
        if rank == 0:
            logger.info(
                "stream: webdataset reads complete samples, in an approximately random order that "
                "depends on the world size; stream.reader=index is exact and faster"
            )
            self._log_epoch(len(self._movies))

    @property
    def padding_share(self) -> float:
        """Share of windows that are padding, 0 to 1."""
        places = self.steps_per_epoch * self.batch_size * self._share.n_slices
        return float(1 - self._counts.sum() / places)

    def state_dict(self) -> StreamState:
        """Return the position, valid for the same world size only."""
        return self._on_this_world(super().state_dict())

    def state_after(self, batch: Batch) -> StreamState:
        """Return the state after ``batch``, valid for the same world size only."""
        return self._on_this_world(super().state_after(batch))

    def _on_this_world(self, state: StreamState) -> StreamState:
        return {**state, "plan": f"{state['plan']} on {self._share.world_size}"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at ``state``: the completed part of its epoch is read again and discarded.

        Raises:
            StateError: the state was saved with different data, or another world size.
        """
        plan, _, ranks = str(state.get("plan")).partition(" on ")
        if ranks and ranks != str(self._share.world_size):
            raise StateError(
                f"stream state: world size: got {ranks}, want {self._share.world_size}: webdataset "
                "assigns shards to ranks; resume with the same number of ranks, or start a new run "
                "with stream.reader=index"
            )
        super().load_state_dict({**state, "plan": plan})

    def _windows_per_rank(self, world_size: int) -> IntArray:
        """Return the windows of each rank, ``[ranks]``: the shard of a movie decides its rank."""
        owner = self._features.index.shard[self._plan(0).movie] % world_size
        return np.bincount(owner, minlength=world_size)

    def _plan(self, epoch: int) -> WindowPlan:
        index = self._features.index
        return plan_epoch(self._order, self._movies, index.rows, epoch=epoch, shard=index.shard)

    def _read_epoch(self, epoch: int, first_step: int) -> Generator[Batch, None, None]:
        from training.stream.batch import add_features, plan_batch

        plan, share = self._plan(epoch), self._share
        windows = self._windows(plan, epoch)
        # The state of the shuffle buffer is not saved: read the completed part again to restore it.
        n_done = first_step * share.accumulation * self.batch_size
        for _ in islice(windows, n_done):
            pass
        for step in range(first_step, self.steps_per_epoch):
            for micro in range(share.accumulation):
                batch = list(islice(windows, self.batch_size))
                self._stats.windows += len(batch)
                read_slice = self._collated(plan, batch, step)
                n_rows, hot_MG = read_slice.features_BTD.shape[1], self._features.labels.hot_MG
                planned = plan_batch(
                    read_slice.piece,
                    n_rows,
                    hot_MG,
                    epoch=epoch,
                    step=step,
                    micro=micro,
                    last_micro=micro == share.accumulation - 1,
                )
                yield add_features(read_slice, planned)

    def _stop_reading(self) -> None:
        """Do nothing: the generator itself reads, without threads."""

    def _collated(self, plan: WindowPlan, windows: list[_Window], step: int) -> ReadSlice:
        """Copy windows into a batch; padding windows have one zero row and weight 0."""
        size, n = self.batch_size, len(windows)
        numbers = np.array([window.number for window in windows], np.int64)
        features_BTD = np.zeros((size, self._window, self._features.dim), ROW_TYPE)
        for row_TD, window in zip(features_BTD, windows, strict=False):
            row_TD[: len(window.rows_ND)] = window.rows_ND

        def padded(column: IntArray, value: int) -> IntArray:
            return np.append(column[numbers], np.full(size - n, value, np.int64))

        per_step = size * self._share.accumulation  # windows of one rank
        piece = Slice(
            movie=padded(plan.movie, int(self._movies[0])),
            window_index=padded(plan.window_index, 0),
            start=padded(plan.start, 0),
            weight=(np.arange(size) < n).astype(np.float32),
            length=padded(plan.length, 1),
            global_weight=float(np.clip(self._counts - step * per_step, 0, per_step).sum()),
        )
        return ReadSlice(piece, features_BTD, features_BTD)

    def _windows(self, plan: WindowPlan, epoch: int) -> Iterator[_Window]:
        """Yield this rank's windows of an epoch in the order of webdataset."""
        index, ids = self._features.index, self._features.movie_ids
        numbers: dict[str, list[int]] = defaultdict(list)
        for number, movie in enumerate(plan.movie.tolist()):
            if index.shard[movie] % self._share.world_size == self._share.rank:
                numbers[ids[movie]].append(number)
        # A string seed is hashed by sha512, independent of the process's hash seed.
        generator = random.Random(f"{self._order.seed}/{epoch}/{self._share.rank}")
        shards = sorted({self._features.shard_file(plan.movie[n[0]]) for n in numbers.values()})
        generator.shuffle(shards)
        windows = self._read_shards(plan, shards, numbers)
        shuffled = webdataset.shuffle(MIXED_WINDOWS, initial=MIXED_WINDOWS, rng=generator)
        yield from shuffled(windows)
        if numbers:
            location = self._features.storage.location
            verify = hint(f"movienet-shard verify --features {shlex.quote(location)}")
            raise DataError(
                f"{location}: {len(numbers)} movies of the index are missing in their tars, e.g. "
                f"{min(numbers)}: the set has changed; run {verify}"
            )

    def _read_shards(
        self, plan: WindowPlan, shards: list[str], numbers: dict[str, list[int]]
    ) -> Iterator[_Window]:
        """Yield the windows of complete shards; remove the movies read from ``numbers``."""
        storage = self._features.storage
        suffix = f".{self._field}"
        files = webdataset.tariterators.tar_file_expander(
            _opened(storage, shards), select_files=lambda name: name.lower().endswith(suffix)
        )
        samples: Iterable[dict[str, Any]] = webdataset.tariterators.group_by_keys(
            # Its own split is at the first dot, which may belong to the movie.
            files,
            keys=lambda name: (name[: -len(suffix)], self._field),
        )
        for sample in samples:
            movie = self._movie_of(sample["__key__"])
            if movie not in numbers:
                continue
            rows_ND = _rows(sample[self._field], self._features.dim)
            self._stats.n_bytes += rows_ND.nbytes
            # Removed, so that movies missing in their tars remain at the end of the epoch.
            for number in numbers.pop(movie):
                window_index, start = int(plan.window_index[number]), int(plan.start[number])
                chosen = plan.spec.rows(int(plan.movie[number]), window_index, start, len(rows_ND))
                yield _Window(number, rows_ND[chosen])


def _opened(storage: Storage, names: list[str]) -> Iterator[dict[str, object]]:
    for name in names:
        with storage.open(name) as stream:
            yield {"url": name, "stream": stream}


def _check_config(config: StreamConfig) -> None:
    for name, is_supported in {
        "sampling": config.sampling != "full_movie",
        "unit": config.unit == "frame",
        "drop_last": not config.drop_last,
    }.items():
        if not is_supported:
            got = getattr(config, name)
            raise ConfigError(
                f"stream.{name}: got {got!r} with stream.reader webdataset, which does not support "
                "it; set stream.reader=index"
            )


def _field_of(features: FeatureSet) -> tuple[str, Any]:
    """Return the field with the features, and a function from a sample's key to its movie id."""
    provenance = features.manifest.provenance
    if "tars" not in provenance:
        return "features.npy", str
    return cast("dict[str, str]", provenance["import"])["field"], lambda key: movie_id(
        key.rpartition("/")[2]
    )


def _rows(data: bytes, dim: int) -> NDArray[np.float16]:
    with report_corrupt("features in a tar of the set", "run `movienet-shard verify`"):
        header = read_npy_header(io.BytesIO(data), len(data), "its header")
        rows_ND = np.frombuffer(data, header.dtype, offset=header.n_bytes).reshape(-1, dim)
        return rows_ND.astype(ROW_TYPE, copy=False)
