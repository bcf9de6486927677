"""The reads and the memory of an epoch, computed from the index without reading features.

If rows represent shots, the shots are read as when a stream is created: 4 bytes per frame, which
the figures do not include.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.units import format_bytes
from training.stream.base import order_of
from training.stream.cache import CHUNK_BYTES, cache_path, disk_bytes, is_rolling, limit_of
from training.stream.epoch_plan import IntArray, Slice, WindowPlan, plan_epoch, plan_partners
from training.stream.read_plan import ReadPlanner, Requests
from training.stream.shots import Shots

if TYPE_CHECKING:
    from pathlib import Path

    from configs.schema import StreamConfig
    from sharding.features import FeatureSet

N_FIRST = 4
"""Number of windows of the first global batch that are shown."""

_WIDTH, _LABEL = 80, 12
"""Columns of the text, and of its labels."""


class FirstWindow(NamedTuple):
    """One window of the first global batch."""

    movie: str
    start: int
    end: int
    """One past its last row."""


@dataclass(frozen=True)
class Traffic:
    """Requests of one node to the source in one epoch, over all its ranks."""

    requests: int
    n_bytes: int
    hit_rate: float
    """Share of ranges that the cache serves, 0 to 1."""


@dataclass(frozen=True)
class Preview:
    """Figures of an epoch that has not been read yet."""

    windows: int
    steps: int
    global_batch: int
    world_size: int
    accumulation: int
    batch_size: int
    """Windows per batch of a rank; of complete movies the maximum."""

    padding_share: float
    """Share of windows that are padding, 0 to 1."""

    real_share: float
    """Share of rows that are real frames, 0 to 1; the others are masked."""

    requests: int
    """Ranged reads of all ranks, including padding."""

    n_bytes: int
    """Bytes of these reads."""

    ranks_per_node: int
    cache: Path | None
    """Folder of the cache on each node."""

    cache_limit: int
    """Maximum size of the cache in bytes."""

    cached_bytes: int
    """Bytes of the shards that fit into the cache."""

    first: Traffic
    """Traffic of the first node in the first epoch. With a cache an upper bound, since a range is a
    miss until its shard has been downloaded."""

    later: Traffic
    """Traffic of the first node in a later epoch; a lower bound if the cache evicts shards."""

    buffer_bytes: int
    """Maximum memory of one rank's batch buffers, including one chunk of a shard being cached."""

    plan_bytes: int
    """Memory of the index, the shots and the plan of an epoch, per rank."""

    digest: str
    """Digest of the plan: runs with the same digest can be resumed from each other's state."""

    windows_first: tuple[FirstWindow, ...]
    """The first windows of epoch 0."""

    @property
    def text(self) -> str:
        """The preview as lines of at most 80 columns, each a label and its figures."""
        first = [f"{each.movie}[{each.start}:{each.end}]" for each in self.windows_first]
        first[:1] = [f"first {window}" for window in first[:1]]
        limit, used = format_bytes(self.cache_limit), format_bytes(self.cached_bytes)
        cache = [str(self.cache), f"limit {limit}, {used} used"] if self.cache else ["none"]
        micro = (
            f"{self.world_size} x {self.accumulation} micro-batches of {self.batch_size} windows"
        )
        return "\n".join(
            (
                _line(
                    "epoch",
                    f"{self.windows:,} windows",
                    f"{self.steps:,} steps of {self.global_batch}",
                    f"{self.requests:,} reads, {format_bytes(self.n_bytes)}",
                ),
                _line("rows", f"{self.real_share:.1%} real, {1 - self.real_share:.1%} masked"),
                _line("ranks", micro, f"{self.padding_share:.1%} padding"),
                _line("node", f"{self.ranks_per_node} ranks"),
                _line("first epoch", *self._figures(self.first)),
                _line("later", *self._figures(self.later)),
                _line("cache", *cache),
                _line(
                    "memory",
                    f"{format_bytes(self.buffer_bytes)} batches, "
                    f"{format_bytes(self.plan_bytes)} index and plan (per rank)",
                ),
                _line("order", self.digest[:12], *first),
            )
        )

    def _figures(self, traffic: Traffic) -> Iterator[str]:
        yield f"{traffic.requests:,} requests, {format_bytes(traffic.n_bytes)}"
        if self.cache:
            yield f"{traffic.hit_rate:.1%} cache hits"


def _line(label: str, *fields: str) -> str:
    """Return a label and its fields; fields that do not fit continue on the next line."""
    lines = [fields[0]]
    for field in fields[1:]:
        joined = f"{lines[-1]}   {field}"
        if _LABEL + len(joined) <= _WIDTH:
            lines[-1] = joined
        else:
            lines.append(field)
    return f"{label:<{_LABEL}}" + f"\n{'':<{_LABEL}}".join(lines)


def preview(
    features: FeatureSet,
    movies: IntArray,
    config: StreamConfig,
    *,
    world_size: int = 1,
    ranks_per_node: int | None = None,
    accumulation: int = 1,
    shuffle_frames: bool = False,
    partners: bool = False,
) -> Preview:
    """Return the figures of the first epoch of a ``FeatureStream`` with the same arguments.

    Args:
        features: A sealed feature set. Only its index is used, and its shots if rows represent
            shots.
        movies: int64 ``[N]``, distinct positions in the feature index.
        config: Settings of the stream.
        world_size: Number of ranks.
        ranks_per_node: Ranks per node, which share a cache; default: all ranks.
        accumulation: Micro-batches per optimizer step.
        shuffle_frames: Permute the rows of every movie.
        partners: Also read a window of another movie for each window. Requests, bytes and memory
            include the partners, windows and steps do not.

    Raises:
        ConfigError: a setting of the order is out of range.
        DataError: rows represent shots, and the set does not contain the shots of a movie.
    """
    order, index = order_of(config, shuffle_frames=shuffle_frames), features.index
    shots = None if config.unit == "frame" else Shots.of(features, movies, features.storage)
    rows = index.rows if shots is None else shots.count_M
    plan = plan_epoch(order, movies, rows, epoch=0, shard=index.shard)
    others = [plan_partners(plan, order, movies, rows, epoch=0)] if partners else []
    epoch = _Epoch(
        features=features,
        config=config,
        digest=order.digest(movies),
        plans=(plan, *others),
        planner=ReadPlanner.of(features, features.storage, plan.spec, shots),
        world_size=world_size,
        ranks_per_node=min(ranks_per_node or world_size, world_size),
        accumulation=accumulation,
    )
    return epoch.preview()


@dataclass(frozen=True, eq=False)
class _Epoch:
    """Epoch 0, over all ranks."""

    features: FeatureSet
    config: StreamConfig
    digest: str
    plans: tuple[WindowPlan, ...]
    """The plan of the windows, and the plan of their partners if there are any."""

    planner: ReadPlanner
    world_size: int
    ranks_per_node: int
    accumulation: int

    def preview(self) -> Preview:
        # Every slice is enumerated, padding included, as the ranks will read it: no estimates.
        plan, pieces = self.plans[0], self.slices(self.plans[0], self.world_size)
        places = sum(len(piece.movie) for piece in pieces)
        place_rows = sum(len(piece.movie) * _n_rows(piece, plan.spec.window) for piece in pieces)
        requests = [each for one in self.plans for each in self.requests(one, self.world_size)]
        total = _sum_of(requests, self.request_bytes)
        path = cache_path(self.features, self.config)
        limit = 0 if path is None else limit_of(path, self.config.cache_bytes)
        cached_bytes, first, later = self.node_traffic(limit)
        return Preview(
            windows=len(plan.movie),
            steps=plan.steps,
            global_batch=self.config.global_batch,
            world_size=self.world_size,
            accumulation=self.accumulation,
            batch_size=max((len(piece.movie) for piece in pieces), default=0),
            padding_share=1 - len(plan.movie) / max(1, places),
            real_share=sum(int(piece.length.sum()) for piece in pieces) / max(1, place_rows),
            requests=total.requests,
            n_bytes=total.n_bytes,
            ranks_per_node=self.ranks_per_node,
            cache=path,
            cache_limit=limit,
            cached_bytes=cached_bytes,
            first=first,
            later=later,
            buffer_bytes=self.buffer_bytes() + (CHUNK_BYTES if path else 0),
            plan_bytes=self.plan_bytes(),
            digest=self.digest,
            windows_first=self.first_windows(),
        )

    def slices(self, plan: WindowPlan, ranks: int) -> list[Slice]:
        """Return the slices of the first ``ranks`` ranks in reading order."""
        n_slices = self.world_size * self.accumulation
        return [
            plan.slice(step, micro * self.world_size + rank, n_slices)
            for step in range(plan.steps)
            for micro in range(self.accumulation)
            for rank in range(ranks)
        ]

    def requests(self, plan: WindowPlan, ranks: int) -> list[Requests]:
        """Return the requests of the first ``ranks`` ranks to the source, per slice."""
        return [self.planner.requests(piece) for piece in self.slices(plan, ranks)]

    @property
    def request_bytes(self) -> int | None:
        """Maximum bytes per request, above which the source splits it; None: no limit."""
        return self.features.storage.request_bytes

    def node_traffic(self, limit: int) -> tuple[int, Traffic, Traffic]:
        """Return the cached bytes, and the traffic of a node in the first and in later epochs."""
        # Windows and partners are interleaved, as they are read: a shard is admitted at first use.
        by_plan = [self.requests(plan, self.ranks_per_node) for plan in self.plans]
        node = [each for pair in zip(*by_plan, strict=True) for each in pair]
        every = _sum_of(node, self.request_bytes)
        sizes = np.array([shard.n_bytes for shard in self.features.manifest.shards], np.int64)
        order = _first_uses(node)
        is_kept = _admitted(sizes, order, limit)
        if not is_kept.all() and is_rolling(
            sizes.tolist(), self.config.shuffle_block_shards, limit
        ):
            # Every shard passes through the cache once per epoch. At best only the first range of
            # each shard is a miss, at worst the download never catches up with the reads.
            downloaded = sizes[order]
            most = _traffic(every, every, downloaded, self.request_bytes)
            fewest = _Sum(len(order), len(order), 0)
            least = _traffic(every, fewest, downloaded, self.request_bytes)
            return min(limit, int(downloaded.sum())), most, least
        missed = _sum_of(node, self.request_bytes, shards=~is_kept)
        first = _traffic(every, every, sizes[is_kept], self.request_bytes)
        later = _traffic(every, missed, sizes[:0], self.request_bytes)
        return int(sizes[is_kept].sum()), first, later

    def buffer_bytes(self) -> int:
        """Return the memory of the batches being read, and of the previous one, still in use."""
        total = 0
        for plan in self.plans:
            rows = (
                len(piece.movie) * _n_rows(piece, plan.spec.window)
                for piece in self.slices(plan, self.world_size)
            )
            largest = max(rows, default=0) * self.planner.row_bytes
            # ``prefetch_bytes`` limits the batches being read, but one is always allowed.
            limit = max(self.config.prefetch_bytes, largest)
            total += min((self.config.prefetch + 1) * largest, limit) + largest
        return total

    def plan_bytes(self) -> int:
        """Return the memory of the index, the shots and the plans."""
        index, shots = self.features.index, self.planner.shots
        columns: list[NDArray[Any]] = [index.shard, index.offset, index.rows]
        columns += [
            column for each in self.plans for column in (each.movie, each.window_index, each.start)
        ]
        return sum(column.nbytes for column in columns) + (shots.n_bytes if shots else 0)

    def first_windows(self) -> tuple[FirstWindow, ...]:
        """Return the first windows of the first global batch."""
        plan = self.plans[0]
        columns = (column[:N_FIRST].tolist() for column in (plan.movie, plan.start, plan.length))
        return tuple(
            FirstWindow(self.features.movie_ids[movie], start, start + length)
            for movie, start, length in zip(*columns, strict=True)
        )


class _Sum(NamedTuple):
    ranges: int
    requests: int
    n_bytes: int


def _sum_of(
    reads: Sequence[Requests],
    request_bytes: int | None,
    *,
    shards: NDArray[np.bool_] | None = None,
) -> _Sum:
    """Sum up requests, with ``shards`` (bool, by shard number) only those to selected shards."""
    total = np.zeros(3, np.int64)
    for shard_Q, n_bytes_Q, ranges_Q in reads:
        if shards is not None:
            inside_Q = shards[shard_Q]
            n_bytes_Q, ranges_Q = n_bytes_Q[inside_Q], ranges_Q[inside_Q]
        split_Q = 1 if request_bytes is None else -(-n_bytes_Q // request_bytes)
        requests = int(np.broadcast_to(split_Q, n_bytes_Q.shape).sum())
        total += (int(ranges_Q.sum()), requests, int(n_bytes_Q.sum()))
    return _Sum(*total.tolist())


def _first_uses(reads: Sequence[Requests]) -> list[int]:
    """Return the shards in order of their first read; by number within a slice."""
    used = [np.unique(each.shard_Q) for each in reads]
    return list(dict.fromkeys(np.concatenate(used).tolist())) if used else []


def _admitted(sizes: IntArray, order: Sequence[int], limit: int) -> NDArray[np.bool_]:
    """Return whether each shard fits into a cache of ``limit`` bytes that evicts none."""
    is_kept, free = np.zeros(len(sizes), bool), limit
    for shard in order:
        needed = disk_bytes(int(sizes[shard]))
        if needed <= free:
            is_kept[shard] = True
            free -= needed
    return is_kept


def _traffic(every: _Sum, missed: _Sum, downloaded: IntArray, request_bytes: int | None) -> Traffic:
    """Return the traffic of a node: the cache misses among its reads, and the downloads."""
    # The cache downloads a shard chunk by chunk, each in one or more requests.
    request_bytes = min(request_bytes or CHUNK_BYTES, CHUNK_BYTES)
    return Traffic(
        missed.requests + int((-(-downloaded // request_bytes)).sum()),
        missed.n_bytes + int(downloaded.sum()),
        1 - missed.ranges / max(1, every.ranges),
    )


def _n_rows(piece: Slice, window: int | None) -> int:
    """Return T, the padded rows of each window of a slice."""
    return int(piece.length.max()) if window is None else window
