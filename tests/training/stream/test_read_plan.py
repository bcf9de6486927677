"""The read plan: the ranges of a slice, their grouping into calls, and the resulting requests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sharding.format.index import FeatureIndex
from training.stream.epoch_plan import Slice, WindowSpec
from training.stream.read_plan import ReadPlanner, neighbours

ROW = 16
N_ROWS = [10, 20, 30]
INDEX = FeatureIndex(
    movie_id=np.array([b"a", b"b", b"c"]),
    shard=np.array([1, 0, 1], np.uint32),
    offset=np.array([512, 512, 2048], np.uint64),
    rows=np.array(N_ROWS, np.uint32),
)


def planner(**changes: Any) -> ReadPlanner:
    arguments: dict[str, Any] = {
        "index": INDEX,
        "spec": WindowSpec(4),
        "shots": None,
        "row_bytes": ROW,
        "near_bytes": 0,
        "ranges_per_call": 2,
        "joins_neighbours": False,
    }
    return ReadPlanner(**(arguments | changes))


def piece(*windows: tuple[int, int], length: int = 4) -> Slice:
    """Return a slice of (movie, start) pairs."""
    movie, start = (np.array(column, np.int64) for column in zip(*windows, strict=True))
    ones = np.ones(len(windows))
    return Slice(
        movie=movie,
        window_index=np.zeros(len(windows), np.int64),
        start=start,
        weight=ones.astype(np.float32),
        length=(ones * length).astype(np.int64),
        global_weight=float(len(windows)),
    )


def test_from_disk_windows_are_read_in_order_a_few_per_call() -> None:
    reads = planner().windows(piece((0, 3), (1, 0), (2, 7)))
    assert reads.window_B.tolist() == [0, 1, 2]
    assert reads.shard_B.tolist() == [1, 0, 1]
    assert reads.offset_B.tolist() == [512 + 3 * ROW, 512, 2048 + 7 * ROW]
    assert reads.n_bytes_B.tolist() == [4 * ROW] * 3
    assert reads.calls == [slice(0, 2), slice(2, 3)]


def test_from_an_object_store_nearby_windows_are_read_in_one_request() -> None:
    store = planner(joins_neighbours=True, near_bytes=10 * ROW)
    windows = piece((2, 20), (0, 3), (1, 0), (2, 14))  # rows 14 to 24 of one movie are 10 rows
    reads = store.windows(windows)
    assert reads.window_B.tolist() == [2, 1, 3, 0]
    assert reads.calls == [slice(0, 1), slice(1, 2), slice(2, 4)]
    requests = store.requests(windows)
    assert requests.shard_Q.tolist() == [0, 1, 1]
    assert requests.n_bytes_Q.tolist() == [4 * ROW, 4 * ROW, 10 * ROW]
    assert requests.ranges_Q.tolist() == [1, 1, 2]


@pytest.mark.parametrize(
    ("near_rows", "begins", "ends"),
    [(0, [1, 4, 7, 10], [2, 5, 8, 11]), (1, [1, 4, 7, 10], [2, 5, 8, 11]), (2, [1], [11])],
)
def test_strided_rows_are_covered_by_one_range_if_their_gaps_are_cheaper_to_read(
    near_rows: int, begins: list[int], ends: list[int]
) -> None:
    strided = planner(spec=WindowSpec(4, stride=3), near_bytes=near_rows * ROW)
    read = strided.gathered(piece((2, 1)), 0)
    assert (read.shard, read.offset) == (1, 2048)
    assert (read.begin_R.tolist(), read.end_R.tolist()) == (begins, ends)
    covered = np.concatenate([np.arange(*edge) for edge in zip(begins, ends, strict=True)])
    assert covered[read.place_N].tolist() == read.row_N.tolist() == [1, 4, 7, 10]
    assert not read.is_one_run
    requests = strided.requests(piece((2, 1)))
    assert requests.n_bytes_Q.tolist() == [
        (end - begin) * ROW for begin, end in zip(begins, ends, strict=True)
    ]


def test_permuted_rows_are_selected_in_the_order_of_the_window() -> None:
    shuffled = planner(spec=WindowSpec(6, shuffle_seed=3), near_bytes=2 * ROW)
    read = shuffled.gathered(piece((2, 5)), 0)
    covered = np.concatenate(
        [np.arange(*edge) for edge in zip(read.begin_R, read.end_R, strict=True)]
    )
    assert covered[read.place_N].tolist() == read.row_N.tolist()
    assert read.row_N.tolist() != sorted(read.row_N.tolist())


def test_a_group_spans_neither_two_shards_nor_more_bytes_than_the_limit() -> None:
    shard = np.array([0, 0, 0, 1, 1])
    offset = np.array([0, 50, 90, 95, 500])
    assert neighbours(shard, offset, np.full(5, 10), near_bytes=60) == [
        slice(0, 2),
        slice(2, 3),
        slice(3, 4),
        slice(4, 5),
    ]
    assert neighbours(shard[:1], offset[:1], np.array([900]), near_bytes=60) == [slice(0, 1)]
