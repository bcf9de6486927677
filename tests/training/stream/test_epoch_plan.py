"""The plan of an epoch: every window exactly once, the same global batches for any world size."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import ConfigError
from training.stream.epoch_plan import (
    SamplingOrder,
    Slice,
    WindowPlan,
    WindowSpec,
    frame_order,
    padding_share,
    plan_epoch,
    plan_scoring,
    slice_size,
    sort_order,
    uniform_below,
)

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "first_samples.json"

fields: dict[str, st.SearchStrategy[Any]] = {
    "seed": st.integers(0, 2**64 - 1),
    "window": st.integers(1, 40),
    "windows_per_movie": st.integers(1, 3),
    "global_batch": st.integers(1, 70),
    "drop_last": st.booleans(),
    "shuffle_block_shards": st.integers(0, 4),
}
windows = st.builds(SamplingOrder, **fields)
strided = st.builds(
    SamplingOrder,
    **fields,
    sampling=st.sampled_from(["random_window", "uniform_windows", "full_movie"]),
    stride=st.integers(1, 9),
    bucket_batches=st.integers(1, 3),
)
chosen = st.builds(SamplingOrder, **fields, sampling=st.just("random_frames"))
orders = st.one_of(windows, strided, chosen)
epochs = st.integers(0, 1000)
row_counts = st.lists(st.integers(1, 200), min_size=1, max_size=60)
worlds = st.integers(1, 64)
accumulations = st.integers(1, 5)


def plan_of(order: SamplingOrder, rows: list[int], epoch: int = 0) -> WindowPlan:
    """Plan over all movies of an index with ``rows``, seven movies per shard."""
    movies = np.arange(len(rows))
    return plan_epoch(
        order, movies, np.array(rows, np.uint32), epoch=epoch, shard=(movies // 7).astype(np.uint32)
    )


def windows_of(plan: WindowPlan) -> list[tuple[int, int, int]]:
    return list(
        zip(plan.movie.tolist(), plan.window_index.tolist(), plan.start.tolist(), strict=True)
    )


def real_windows(piece: Slice) -> list[tuple[int, int, int]]:
    real = piece.weight > 0
    return list(
        zip(
            piece.movie[real].tolist(),
            piece.window_index[real].tolist(),
            piece.start[real].tolist(),
            strict=True,
        )
    )


@given(orders, row_counts, epochs)
def test_every_movie_has_exactly_windows_per_movie_windows_per_epoch(
    order: SamplingOrder, rows: list[int], epoch: int
) -> None:
    plan = plan_of(replace(order, drop_last=False), rows, epoch)
    seen = Counter(zip(plan.movie.tolist(), plan.window_index.tolist(), strict=True))
    n_windows = np.full(len(rows), order.windows_per_movie)
    if order.sampling == "uniform_windows":  # fewer if they would coincide
        n_windows = np.minimum(n_windows, order.window_spec(epoch).max_start(np.array(rows)) + 1)
        assert Counter(plan.movie.tolist()) == dict(enumerate(n_windows.tolist()))
        assert len(set(windows_of(plan))) == len(windows_of(plan))
    assert order.n_windows(np.array(rows)) == n_windows.sum()
    expected = {(movie, k) for movie, n in enumerate(n_windows) for k in range(n)}
    if order.sampling == "uniform_windows":  # of coinciding windows, the first one remains
        expected = set(seen)
    assert seen == dict.fromkeys(expected, 1)


@given(orders, row_counts, epochs)
def test_drop_last_drops_less_than_one_global_batch_and_changes_no_earlier_batch(
    order: SamplingOrder, rows: list[int], epoch: int
) -> None:
    full = plan_of(replace(order, drop_last=False), rows, epoch)
    short = plan_of(replace(order, drop_last=True), rows, epoch)
    assert len(short.movie) == short.steps * order.global_batch
    assert 0 <= len(full.movie) - len(short.movie) < order.global_batch
    assert windows_of(full)[: len(short.movie)] == windows_of(short)


@given(orders, row_counts, epochs)
def test_every_window_is_inside_its_movie_and_has_as_many_rows_as_its_length(
    order: SamplingOrder, rows: list[int], epoch: int
) -> None:
    plan = plan_of(order, rows, epoch)
    for (movie, window_index, start), length in zip(
        windows_of(plan), plan.length.tolist(), strict=True
    ):
        chosen = plan.spec.rows(movie, window_index, start, rows[movie]).tolist()
        assert len(chosen) == length >= 1
        assert chosen[0] >= 0
        assert chosen[-1] < rows[movie]
        if order.sampling == "random_frames":
            assert chosen == sorted(set(chosen))
            assert length == min(order.window, rows[movie])
        else:
            assert chosen[0] == start
            assert set(np.diff(chosen)) <= {order.stride}
        if order.sampling == "full_movie":
            assert start < order.stride
            assert chosen[-1] + order.stride >= rows[movie]
        if (
            order.sampling in ("random_window", "uniform_windows")
            and rows[movie] > (order.window - 1) * order.stride
        ):
            assert length == order.window


@given(strided, row_counts)
def test_a_bucket_of_full_movies_is_sorted_by_length_and_keeps_its_windows(
    order: SamplingOrder, rows: list[int]
) -> None:
    order = replace(order, sampling="full_movie", stride=1, shuffle_block_shards=0)
    sorted_, plain = plan_of(order, rows), plan_of(replace(order, bucket_batches=1), rows)
    size = order.global_batch * order.bucket_batches
    n_full = len(sorted_.movie) // order.global_batch * order.global_batch
    for first in range(0, n_full, size):
        some = slice(first, min(first + size, n_full))
        assert sorted(windows_of(sorted_)[some]) == sorted(windows_of(plain)[some])
        batches = sorted(
            sorted_.length[some].reshape(-1, order.global_batch).tolist(),
            key=lambda b: (b[0], b[-1]),
        )
        lengths = [length for batch in batches for length in batch]
        assert lengths == sorted(lengths)
    assert windows_of(sorted_)[n_full:] == windows_of(plain)[n_full:]


def test_buckets_reduce_padding_without_ordering_the_batches_by_length() -> None:
    rows = (np.random.default_rng(0).integers(100, 6000, 960)).tolist()
    padding, correlation = {}, {}
    for batches in (1, 16):
        order = SamplingOrder(0, 1, 1, 8, sampling="full_movie", bucket_batches=batches)
        plan = plan_of(order, rows)
        longest = plan.length.reshape(-1, 8).max(axis=1)
        padding[batches] = 1 - plan.length.sum() / (8 * longest.sum())
        correlation[batches] = np.corrcoef(longest, np.arange(len(longest)))[0, 1]
    assert padding[1] > 0.35
    assert padding[16] < 0.08
    assert abs(correlation[16]) < 0.2


def test_a_random_choice_selects_every_row_equally_often() -> None:
    """5,000 choices of 5 of 20 rows: each row within 5 standard deviations of a quarter."""
    plan = plan_of(SamplingOrder(5, 5, 1, 32, sampling="random_frames"), [20] * 5_000)
    rows = [plan.spec.rows(*window, 20) for window in windows_of(plan)]
    counts = np.bincount(np.concatenate(rows), minlength=20)
    assert np.abs(counts - 1250).max() < 5 * np.sqrt(5_000 * 0.25 * 0.75)
    assert len({tuple(each) for each in rows}) > 4_000


def test_a_random_choice_depends_on_epoch_movie_and_window_index() -> None:
    order = SamplingOrder(5, 5, 2, 32, sampling="random_frames")
    chosen = {
        tuple(order.window_spec(epoch).rows(movie, window_index, 0, 50).tolist())
        for epoch in range(3)
        for movie in range(3)
        for window_index in range(2)
    }
    assert len(chosen) == 18


def test_a_stride_of_4_as_an_example() -> None:
    rows = np.array([3, 9, 10, 20])
    spec = WindowSpec(window=3, stride=4)
    assert spec.max_start(rows).tolist() == [2, 0, 1, 11]  # too short: any phase; else all that fit
    assert spec.length(rows, np.array([2, 0, 1, 11])).tolist() == [1, 3, 3, 3]
    assert spec.rows(0, 0, 1, 10).tolist() == [1, 5, 9]
    assert WindowSpec(window=None, stride=4).rows(0, 0, 3, 10).tolist() == [3, 7]


@given(row_counts, worlds, st.integers(1, 9), st.integers(1, 600))
def test_scoring_full_movies_plans_each_once_in_batches_of_limited_size(
    rows: list[int], world: int, batch_size: int, max_rows: int
) -> None:
    plan = plan_scoring(
        np.arange(len(rows)),
        np.array(rows),
        spec=WindowSpec(None),
        windows=1,
        global_batch=batch_size * world,
        n_slices=world,
        max_rows=max_rows,
    )
    pieces = [plan.slice(step, rank, world) for step in range(plan.steps) for rank in range(world)]
    seen = [window for piece in pieces for window in real_windows(piece)]
    assert sorted(seen) == [(movie, 0, 0) for movie in range(len(rows))]
    for piece in pieces:
        size = len(piece.movie)
        assert size <= batch_size
        assert size == 1 or size * piece.length.max() <= max_rows


@given(orders, row_counts, worlds, accumulations)
def test_the_global_batches_are_the_same_for_any_world_size(
    order: SamplingOrder, rows: list[int], world: int, accumulation: int
) -> None:
    plan = plan_of(order, rows)
    n_slices = world * accumulation
    batches = [
        [
            window
            for index in range(n_slices)
            for window in real_windows(plan.slice(step, index, n_slices))
        ]
        for step in range(plan.steps)
    ]
    alone = [real_windows(plan.slice(step, 0, 1)) for step in range(plan.steps)]
    assert batches == alone
    assert [window for batch in alone for window in batch] == windows_of(plan)


@given(orders, row_counts, worlds, accumulations)
def test_all_slices_have_the_same_size_and_their_weights_sum_to_the_global_weight(
    order: SamplingOrder, rows: list[int], world: int, accumulation: int
) -> None:
    plan = plan_of(order, rows)
    n_slices = world * accumulation
    for step in range(plan.steps):
        pieces = [plan.slice(step, index, n_slices) for index in range(n_slices)]
        assert {len(column) for piece in pieces for column in piece[:4]} == {
            slice_size(len(plan.movie), order.global_batch, n_slices)
        }
        assert {piece.global_weight for piece in pieces} == {
            float(sum(piece.weight.sum() for piece in pieces))
        }
        real = [int(piece.weight.sum()) for piece in pieces]
        assert max(real) - min(real) <= 1


@given(orders, row_counts, worlds)
def test_the_padding_share_counts_the_windows_of_weight_0(
    order: SamplingOrder, rows: list[int], world: int
) -> None:
    plan = plan_of(order, rows)
    weights = [
        plan.slice(step, index, world).weight
        for step in range(plan.steps)
        for index in range(world)
    ]
    padding = float(np.mean(np.concatenate(weights) == 0)) if weights else 0.0
    n_windows = order.n_windows(np.array(rows))
    share = padding_share(n_windows, order.global_batch, world, drop_last=order.drop_last)
    assert share == pytest.approx(padding)


def test_padding_repeats_a_real_window_so_that_every_sample_has_frames() -> None:
    plan = plan_of(SamplingOrder(0, 4, 1, 3), [9, 9, 9])
    piece = plan.slice(0, 1, 2)
    assert piece.weight.tolist() == [1.0, 1.0]
    short = plan.slice(0, 0, 2)
    assert short.weight.tolist() == [1.0, 0.0]
    assert short.movie[1] == plan.movie[0]


@given(st.one_of(windows, chosen), st.lists(st.integers(1, 200), min_size=30, max_size=60), epochs)
def test_two_epochs_differ_in_order_and_starts(
    order: SamplingOrder, rows: list[int], epoch: int
) -> None:
    order = replace(order, global_batch=5)
    assert windows_of(plan_of(order, rows, epoch)) != windows_of(plan_of(order, rows, epoch + 1))


@given(windows, st.lists(st.integers(100, 200), min_size=30, max_size=60))
def test_epoch_1_of_seed_0_differs_from_epoch_0_of_seed_1(
    order: SamplingOrder, rows: list[int]
) -> None:
    order = replace(order, global_batch=5, shuffle_block_shards=0)
    zero_one = plan_of(replace(order, seed=0), rows, epoch=1)
    one_zero = plan_of(replace(order, seed=1), rows, epoch=0)
    assert zero_one.movie.tolist() != one_zero.movie.tolist()
    assert sorted(windows_of(zero_one)) != sorted(windows_of(one_zero))


@given(orders, row_counts, epochs, st.data())
def test_leaving_out_a_movie_changes_neither_order_nor_starts_of_the_others(
    order: SamplingOrder, rows: list[int], epoch: int, data: st.DataObject
) -> None:
    order = replace(order, shuffle_block_shards=0, drop_last=False, bucket_batches=1)
    if order.sampling == "full_movie":  # complete batches are permuted, so a window may move
        order = replace(order, sampling="random_window")
    left_out = data.draw(st.integers(0, len(rows) - 1))
    movies = np.delete(np.arange(len(rows)), left_out)
    smaller = plan_epoch(order, movies, np.array(rows, np.uint32), epoch=epoch)
    rest = [window for window in windows_of(plan_of(order, rows, epoch)) if window[0] != left_out]
    assert windows_of(smaller) == rest


@given(orders, st.permutations(range(20)))
def test_the_order_of_the_given_movies_does_not_matter(
    order: SamplingOrder, movies: list[int]
) -> None:
    rows = np.arange(1, 21, dtype=np.uint32)
    shard = np.arange(20) // 3
    shuffled = plan_epoch(order, np.array(movies), rows, epoch=0, shard=shard)
    straight = plan_epoch(order, np.arange(20), rows, epoch=0, shard=shard)
    assert windows_of(shuffled) == windows_of(straight)
    assert order.digest(np.array(movies)) == order.digest(np.arange(20))


def test_window_starts_are_uniform() -> None:
    """100,000 draws over 11 starts: each share within 5 standard deviations of 1/11."""
    plan = plan_of(SamplingOrder(3, 10, 1, 32), [20] * 100_000)
    counts = np.bincount(plan.start, minlength=11)
    assert len(counts) == 11
    assert np.abs(counts - 100_000 / 11).max() < 5 * np.sqrt(100_000 * (1 / 11) * (10 / 11))


def test_every_position_in_the_order_is_equally_likely_for_a_movie() -> None:
    """Positions of movies 0 and 9 among 10, over 5,000 epochs: uniform and independent."""
    order = SamplingOrder(1, 4, 1, 10)
    places = np.array(
        [np.argsort(plan_of(order, [4] * 10, epoch).movie)[[0, 9]] for epoch in range(5_000)]
    )
    for column in places.T:
        counts = np.bincount(column, minlength=10)
        assert np.abs(counts - 500).max() < 5 * np.sqrt(500 * 0.9)
    assert abs(np.corrcoef(places.T)[0, 1] + 1 / 9) < 0.07


@given(windows.filter(lambda order: order.shuffle_block_shards > 0), st.integers(1, 60), epochs)
def test_with_blocks_a_group_of_shards_is_completed_before_the_next_starts(
    order: SamplingOrder, n_movies: int, epoch: int
) -> None:
    plan = plan_of(replace(order, drop_last=False), [9] * n_movies, epoch)
    shards = (plan.movie // 7).tolist()
    n_shards = -(-n_movies // 7)
    groups: list[set[int]] = []
    for shard in shards:
        if not groups or (
            shard not in groups[-1] and len(groups[-1]) == order.shuffle_block_shards
        ):
            groups.append(set())
        groups[-1].add(shard)
    assert sorted(shard for group in groups for shard in group) == list(range(n_shards))


def test_blocks_permute_shards_and_movies() -> None:
    plan = plan_of(SamplingOrder(0, 4, 1, 32, shuffle_block_shards=1), [9] * 70)
    shards = (plan.movie.reshape(10, 7) // 7)[:, 0].tolist()
    assert shards != sorted(shards)
    assert any((np.diff(group) < 0).any() for group in plan.movie.reshape(10, 7))


def test_blocks_without_shard_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="shuffle_block_shards"):
        plan_epoch(
            SamplingOrder(0, 4, 1, 8, shuffle_block_shards=2), np.arange(3), np.full(3, 9), epoch=0
        )


def test_duplicate_movies_are_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        plan_epoch(SamplingOrder(0, 4, 1, 8), np.array([1, 2, 1]), np.full(3, 9), epoch=0)


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"seed": -1}, "stream.seed"),
        ({"seed": 2**64}, "stream.seed"),
        ({"window": 0}, "stream.window"),
        ({"windows_per_movie": 0}, "stream.windows_per_movie"),
        ({"global_batch": 0}, "stream.global_batch"),
        ({"shuffle_block_shards": -1}, "stream.shuffle_block_shards"),
        ({"stride": 0}, "stream.stride"),
        ({"bucket_batches": 0}, "stream.bucket_batches"),
        ({"stride": 2, "sampling": "random_frames"}, "stream.stride"),
        ({"stride": 2, "unit": "shot"}, "stream.stride"),
    ],
)
def test_the_error_names_a_setting_out_of_range(fields: dict[str, Any], key: str) -> None:
    good: dict[str, Any] = {"seed": 0, "window": 4, "windows_per_movie": 1, "global_batch": 8}
    with pytest.raises(ConfigError, match=key):
        SamplingOrder(**(good | fields))


def test_the_digest_depends_on_each_setting_of_the_order_and_on_the_set_of_movies() -> None:
    order = SamplingOrder(0, 4, 1, 8)
    others = [
        replace(order, seed=1),
        replace(order, window=5),
        replace(order, windows_per_movie=2),
        replace(order, global_batch=9),
        replace(order, drop_last=True),
        replace(order, shuffle_block_shards=1),
        replace(order, shuffle_frames=True),
        replace(order, sampling="uniform_windows"),
        replace(order, stride=2),
        replace(order, unit="shot"),
        replace(order, bucket_batches=2),
    ]
    digests = [each.digest(np.arange(5)) for each in (order, *others)]
    assert len({*digests, order.digest(np.arange(4))}) == 13


@given(row_counts, st.integers(1, 40), st.integers(1, 9))
def test_scoring_windows_are_inside_their_movie_evenly_spaced_and_distinct(
    rows: list[int], window: int, windows: int
) -> None:
    plan = plan_scoring(
        np.arange(len(rows)),
        np.array(rows),
        spec=WindowSpec(window),
        windows=windows,
        global_batch=8,
    )
    for movie, n_rows in enumerate(rows):
        starts = plan.start[plan.movie == movie]
        max_start = max(n_rows - window, 0)
        assert len(starts) == min(windows, max_start + 1)
        assert starts[0] == (0 if windows > 1 else max_start // 2)
        if windows > 1:
            assert starts[-1] == max_start
        gaps = np.diff(starts)
        assert (gaps > 0).all()
        assert np.ptp(gaps) <= 1 if gaps.size else True


def test_scoring_windows_of_four_movies_as_an_example() -> None:
    plan = plan_scoring(
        np.array([0, 1, 2, 3]),
        np.array([5, 8, 9, 20]),
        spec=WindowSpec(8),
        windows=4,
        global_batch=4,
    )
    assert windows_of(plan) == [
        (0, 0, 0),  # shorter than a window: once, complete
        (1, 0, 0),  # exactly one window: once
        (2, 0, 0),  # only two distinct starts
        (2, 3, 1),
        (3, 0, 0),
        (3, 1, 4),
        (3, 2, 8),
        (3, 3, 12),
    ]


@given(row_counts, worlds)
def test_scoring_covers_every_window_once_with_the_same_number_of_batches_on_every_rank(
    rows: list[int], world: int
) -> None:
    plan = plan_scoring(
        np.arange(len(rows)), np.array(rows), spec=WindowSpec(16), windows=3, global_batch=4 * world
    )
    seen = [
        window
        for step in range(plan.steps)
        for rank in range(world)
        for window in real_windows(plan.slice(step, rank, world))
    ]
    assert seen == windows_of(plan)


@given(st.integers(0, 2**64 - 1), st.integers(0, 10**6), st.integers(0, 300))
def test_the_frame_order_is_a_permutation(seed: int, movie: int, n_rows: int) -> None:
    assert sorted(frame_order(seed, movie, n_rows).tolist()) == list(range(n_rows))


def test_the_frame_order_depends_on_seed_and_movie() -> None:
    orders = {tuple(frame_order(seed, movie, 50)) for seed in range(3) for movie in range(3)}
    assert len(orders) == 9


@given(st.lists(st.integers(0, 2**64 - 1), max_size=50))
def test_sort_order_is_the_stable_argsort_of_the_upper_bits(words: list[int]) -> None:
    array = np.array(words, np.uint64)
    upper = array >> np.uint64(len(words).bit_length())
    assert sort_order(array).tolist() == np.argsort(upper, kind="stable").tolist()


@given(st.integers(1, 2**32 - 1), st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20))
def test_starts_are_the_exact_multiply_shift_of_the_words(limit: int, words: list[int]) -> None:
    starts = uniform_below(np.array(words, np.uint64), np.full(len(words), limit))
    assert starts.tolist() == [word * limit >> 64 for word in words]


def golden_samples() -> dict[str, Any]:
    rows = [3 + (movie * 37) % 101 for movie in range(50)]
    cases = {
        "one permutation": SamplingOrder(0, 16, 2, 8),
        "blocks of 2 shards": SamplingOrder(0, 16, 2, 8, shuffle_block_shards=2),
    }
    samples: dict[str, Any] = {
        name: [list(window) for window in windows_of(plan_of(order, rows))[:20]]
        for name, order in cases.items()
    }
    samples["digest"] = cases["one permutation"].digest(np.arange(50))
    samples["frames of movie 7"] = frame_order(0, 7, 20).tolist()
    return samples


def test_the_first_twenty_samples_of_seed_0_are_golden() -> None:
    """[movie, window index, start]; changes are listed in the CHANGELOG."""
    if os.environ.get("MOVIENET_WRITE_GOLDEN"):
        lines = [
            f"{json.dumps(key)}: {json.dumps(value)}" for key, value in golden_samples().items()
        ]
        GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    assert golden_samples() == json.loads(GOLDEN.read_text())
