"""The same shards through the webdataset library: the reference of tests and benchmarks.

Whole samples are read in sequence, windows are cut out of them and mixed in a buffer. An epoch has
exactly the windows of the plan, with their labels; only their order is approximate, and depends
on the world size. A state is resumed by reading the finished part of its epoch again.

Axes: B = windows of a batch, T = rows of a window, D = feature size
"""

from __future__ import annotations

import io
import logging
import random
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import webdataset
from numpy.typing import NDArray

from configs.errors import ConfigError, DataError, StateError
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
"""Windows of the shuffle buffer, each in memory."""


class _Window(NamedTuple):
    number: int
    """In the plan."""

    rows_ND: Features


class WebDatasetStream(BatchStream):
    """Epochs of training windows for one rank, by webdataset.

    Shard n is read by rank n modulo their number. Ranks whose shards have fewer windows end with
    windows of weight 0, which are all zero, so that every rank yields the same number of batches.

    Args:
        features: A sealed feature set.
        movies: int64, distinct positions in the feature index.
        config: How to read; ``threads``, ``prefetch`` and the cache are not used.
        rank: 0 to ``world_size - 1``.
        world_size: Ranks that share the epoch.
        accumulation: Micro-batches of an optimiser step.
        shuffle_frames: Permute the rows of every movie, by (seed, movie), before cutting windows.
        partners: Not for this kind.

    Raises:
        ConfigError: this kind cannot do what the configuration asks for.
        DataError: there are no movies, or one of them has no rows.
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
                "training.mixup: got it with stream.reader webdataset, which knows none; want 0"
            )
        self._features, self._frames = features, config.window
        self._movies = checked_movies(features, movies)
        share = checked_share(rank, world_size, accumulation)
        self._order = order_of(config, shuffle_frames=shuffle_frames)
        self._counts = self._windows_per_rank(world_size)
        """``[ranks]`` windows of each rank, the same in every epoch."""
        self.batch_size = slice_size(int(self._counts.sum()), config.global_batch, share.parts)
        steps = int(-(-self._counts.max() // (self.batch_size * accumulation)))
        digests = Digests(
            data=features.digest,
            labels=features.labels.digest,
            # With the kind: neither kind of stream can continue at a position of the other.
            plan=f"webdataset-{self._order.digest(self._movies)}",
        )
        super().__init__(EpochCursor(steps, digests), share, features.storage)
        self._field, self._movie_of = _field_of(features)
        if rank == 0:
            logger.info(
                "stream: webdataset reads whole samples; the order is about random, another on "
                "another number of ranks; stream.reader=index is exact and faster"
            )
            self._log_epoch(len(self._movies))

    @property
    def padding_share(self) -> float:
        """Share of all windows that only fill batches up, 0 to 1."""
        places = self.steps_per_epoch * self.batch_size * self._share.parts
        return float(1 - self._counts.sum() / places)

    def state_dict(self) -> StreamState:
        """Return the position, valid for the same world size alone."""
        state = super().state_dict()
        state["plan"] = f"{state['plan']} on {self._share.world_size}"
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at ``state``: the finished part of its epoch is read again and discarded.

        Raises:
            StateError: it was saved with other data, or with another world size.
        """
        plan, _, ranks = str(state.get("plan")).partition(" on ")
        if ranks and ranks != str(self._share.world_size):
            raise StateError(
                f"stream state: got {ranks} ranks, want {self._share.world_size}: webdataset deals "
                "shards to ranks; use as many, or begin a new run with stream.reader=index"
            )
        super().load_state_dict({**state, "plan": plan})

    def _windows_per_rank(self, world_size: int) -> IntArray:
        """Return ``[ranks]`` windows of each rank: which shard a movie is in decides its rank."""
        owner = self._features.index.shard[self._plan(0).movie] % world_size
        return np.bincount(owner, minlength=world_size)

    def _plan(self, epoch: int) -> WindowPlan:
        index = self._features.index
        return plan_epoch(self._order, self._movies, index.rows, epoch=epoch, shard=index.shard)

    def _read_epoch(self, epoch: int, first_step: int) -> Generator[Batch, None, None]:
        from training.stream.batch import make_batch

        plan, share = self._plan(epoch), self._share
        windows = self._windows(plan, epoch)
        done = first_step * share.accumulation * self.batch_size
        for _ in islice(windows, done):
            pass
        for step in range(first_step, self.steps_per_epoch):
            for micro in range(share.accumulation):
                some = list(islice(windows, self.batch_size))
                self._stats.windows += len(some)
                yield make_batch(
                    self._fetched(plan, some, step),
                    self._features.labels.hot_MG,
                    epoch=epoch,
                    step=step,
                    micro=micro,
                    last_micro=micro == share.accumulation - 1,
                )

    def _stop_reading(self) -> None:
        """Do nothing: the generator itself reads, without threads."""

    def _fetched(self, plan: WindowPlan, windows: list[_Window], step: int) -> ReadSlice:
        """Copy windows into a batch; missing ones are windows of one zero row, of weight 0."""
        size, n = self.batch_size, len(windows)
        numbers = np.array([window.number for window in windows], np.int64)
        features_BTD = np.zeros((size, self._frames, self._features.dim), ROW_TYPE)
        for place, window in zip(features_BTD, windows, strict=False):
            place[: len(window.rows_ND)] = window.rows_ND

        def filled(column: IntArray, value: int) -> IntArray:
            return np.append(column[numbers], np.full(size - n, value, np.int64))

        a_step = size * self._share.accumulation
        piece = Slice(
            movie=filled(plan.movie, int(self._movies[0])),
            window_index=filled(plan.window_index, 0),
            start=filled(plan.start, 0),
            weight=(np.arange(size) < n).astype(np.float32),
            length=filled(plan.length, 1),
            global_weight=float(np.clip(self._counts - step * a_step, 0, a_step).sum()),
        )
        return ReadSlice(piece, features_BTD, features_BTD)

    def _windows(self, plan: WindowPlan, epoch: int) -> Iterator[_Window]:
        """Yield this rank's windows of an epoch as webdataset brings them."""
        index, ids = self._features.index, self._features.movie_ids
        numbers: dict[str, list[int]] = defaultdict(list)
        for number, movie in enumerate(plan.movie.tolist()):
            if index.shard[movie] % self._share.world_size == self._share.rank:
                numbers[ids[movie]].append(number)
        draw = random.Random(f"{self._order.seed}/{epoch}/{self._share.rank}")
        shards = sorted({self._features.shard_file(plan.movie[n[0]]) for n in numbers.values()})
        draw.shuffle(shards)
        cut = self._cut(plan, shards, numbers)
        yield from webdataset.shuffle(MIXED_WINDOWS, initial=MIXED_WINDOWS, rng=draw)(cut)
        if numbers:
            raise DataError(
                f"{self._features.storage.location}: {len(numbers)} movies are not in their tars, "
                f"e.g. {min(numbers)}; the set has changed, verify it"
            )

    def _cut(
        self, plan: WindowPlan, shards: list[str], numbers: dict[str, list[int]]
    ) -> Iterator[_Window]:
        """Read shards from end to end; take out of ``numbers`` what was found."""
        storage = self._features.storage
        suffix = f".{self._field}"
        files = webdataset.tariterators.tar_file_expander(
            _opened(storage, shards), select_files=lambda name: name.lower().endswith(suffix)
        )
        samples: Iterable[dict[str, Any]] = webdataset.tariterators.group_by_keys(files)
        for sample in samples:
            movie = self._movie_of(sample["__key__"])
            if movie not in numbers:
                continue
            rows_ND = _rows(sample[self._field])
            self._stats.n_bytes += rows_ND.nbytes
            for number in numbers.pop(movie):
                window_index, start = int(plan.window_index[number]), int(plan.start[number])
                chosen = plan.spec.rows(int(plan.movie[number]), window_index, start, len(rows_ND))
                yield _Window(number, rows_ND[chosen])


def _opened(storage: Storage, names: list[str]) -> Iterator[dict[str, object]]:
    for name in names:
        with storage.open(name) as stream:
            yield {"url": name, "stream": stream}


def _check_config(config: StreamConfig) -> None:
    for name, fits in {
        "sampling": config.sampling != "full_movie",
        "unit": config.unit == "frame",
        "drop_last": not config.drop_last,
    }.items():
        if not fits:
            got = getattr(config, name)
            raise ConfigError(
                f"stream.{name}: got {got!r} with stream.reader webdataset, which cannot do this; "
                "want stream.reader index"
            )


def _field_of(features: FeatureSet) -> tuple[str, Any]:
    """Return the field that holds the features, and what makes a movie's id of a sample's key."""
    provenance = features.manifest.provenance
    if "tars" not in provenance:
        return "features.npy", str
    return cast("dict[str, str]", provenance["import"])["field"], lambda key: movie_id(
        key.rpartition("/")[2]
    )


def _rows(data: bytes) -> NDArray[np.float16]:
    rows_ND: NDArray[np.float16] = np.load(io.BytesIO(data), allow_pickle=False)
    return rows_ND.astype(ROW_TYPE, copy=False)
