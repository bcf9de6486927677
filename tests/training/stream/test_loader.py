"""The stream: it resumes at any step on any number of ranks, and refuses mismatched states."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError, DataError, StateError
from configs.runtime.world import World
from configs.schema import StreamConfig
from training.stream.batch import Batch
from training.stream.cursor import StreamState
from training.stream.epoch_plan import frame_order
from training.stream.loader import FeatureStream, score_batches
from training.stream.preview import preview
from training.stream.view import View

N_ROWS = [3 + (movie * 37) % 41 for movie in range(23)]
CONFIG = StreamConfig(window=10, windows_per_movie=2, global_batch=7, seed=3, threads=2)
"""23 movies x 2 windows in batches of 7: seven steps, the last with a short batch."""

Window = tuple[int, int, int]


@pytest.fixture(scope="module")
def films(make_films: Callable[..., Any]) -> Any:
    return make_films(N_ROWS)


@pytest.fixture(autouse=True)
def no_thread_remains() -> Iterator[None]:
    yield
    gc.collect()
    assert [each for each in threading.enumerate() if each.name.startswith("stream-read")] == []


def stream_of(films: Any, config: StreamConfig = CONFIG, **world: Any) -> FeatureStream:
    return FeatureStream(films.features, films.movies, config, **world)


def windows_of(batch: Batch) -> list[Window]:
    real = batch.weight > 0
    columns = (batch.movie[real], batch.window_index[real], batch.start[real])
    return list(zip(*(column.tolist() for column in columns), strict=True))


def take(
    films: Any, world: int, n_steps: int, state: StreamState | None = None, accumulation: int = 1
) -> tuple[list[list[Window]], StreamState]:
    """Return ``n_steps`` global batches as sorted windows, and the state after them."""
    streams = [
        stream_of(films, rank=rank, world_size=world, accumulation=accumulation)
        for rank in range(world)
    ]
    if state is not None:
        for stream in streams:
            stream.load_state_dict(state)
    batches: list[list[Window]] = [[] for _ in range(n_steps)]
    for stream in streams:
        done = 0
        while done < n_steps:
            for batch in stream:
                batches[done] += windows_of(batch)
                done += batch.last_micro
                if done == n_steps:
                    break
    states = [stream.state_dict() for stream in streams]
    assert all(each == states[0] for each in states)
    return [sorted(windows) for windows in batches], states[0]


def test_rows_mask_labels_and_positions_of_a_batch_are_consistent(films: Any) -> None:
    hot_MG = films.features.labels.hot_MG
    with stream_of(films) as stream:
        for batch in stream:
            assert batch.features.dtype == torch.float16
            assert batch.features.shape == (7, 10, 8)
            assert batch.labels.dtype == batch.weight.dtype == torch.float32
            for row in range(7):
                movie, start = int(batch.movie[row]), int(batch.start[row])
                assert np.array_equal(batch.features[row].numpy(), films.window(movie, start, 10))
                length = min(10, N_ROWS[movie] - start)
                assert batch.mask[row].tolist() == [True] * length + [False] * (10 - length)
                assert batch.labels[row].tolist() == hot_MG[movie].tolist()


def test_each_iteration_is_one_epoch(films: Any) -> None:
    with stream_of(films) as stream:
        first = [batch for batch in stream]  # noqa: C416  # as a user would write it
        assert (stream.epoch, stream.step) == (1, 0)
        second = list(stream)
        assert (stream.epoch, stream.step) == (2, 0)
    assert [batch.step for batch in first] == list(range(7))
    assert {batch.epoch for batch in second} == {1}
    assert [windows_of(batch) for batch in first] != [windows_of(batch) for batch in second]
    assert Counter(window[:2] for batch in first for window in windows_of(batch)) == Counter(
        (movie, window_index) for movie in range(23) for window_index in range(2)
    )


def test_batches_in_a_list_remain_unchanged(films: Any) -> None:
    with stream_of(films) as stream:
        batches = list(stream) + list(stream)
    for batch in batches:
        places = zip(batch.movie.tolist(), batch.start.tolist(), strict=True)
        expected = np.stack([films.window(movie, start, 10) for movie, start in places])
        assert np.array_equal(batch.features.numpy(), expected)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_after_any_step_the_remaining_batches_are_the_same(
    films: Any, accumulation: int
) -> None:
    uninterrupted, _ = take(films, 1, 14, accumulation=accumulation)
    for stop in range(14):
        head, state = take(films, 1, stop, accumulation=accumulation)
        tail, _ = take(films, 1, 14 - stop, state, accumulation=accumulation)
        assert head + tail == uninterrupted


def test_a_state_is_json_of_the_same_size_at_every_step(films: Any) -> None:
    with FeatureStream(films.features, films.movies, CONFIG) as stream:
        texts = [json.dumps(stream.state_dict()) for _ in range(3) for _batch in stream]
        assert len({len(text) for text in texts}) == 1
        stream.load_state_dict(json.loads(texts[0]))
        assert json.dumps(stream.state_dict()) == texts[0]


@pytest.mark.parametrize("prefetch", [1, 3, 50])
def test_the_state_counts_yielded_batches_not_those_read_ahead(films: Any, prefetch: int) -> None:
    config = CONFIG.model_copy(update={"prefetch": prefetch})
    with stream_of(films, config) as stream:
        assert (stream.state_dict()["epoch"], stream.state_dict()["step"]) == (0, 0)
        positions = [(stream.state_dict()["epoch"], stream.state_dict()["step"]) for _ in stream]
    assert positions == [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (0, 6), (1, 0)]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_length_is_the_number_of_batches_of_a_complete_epoch(
    films: Any, accumulation: int
) -> None:
    with stream_of(films, accumulation=accumulation) as stream:
        assert {len(stream) for batch in stream} == {7 * accumulation}
        state = stream.state_dict() | {"epoch": 0, "step": 5}
    with stream_of(films, accumulation=accumulation) as resumed:
        resumed.load_state_dict(state)
        assert len(resumed) == 7 * accumulation
        assert len(list(resumed)) == 2 * accumulation
        assert len(list(resumed)) == 7 * accumulation


def test_a_step_counts_when_its_last_micro_batch_is_yielded(films: Any) -> None:
    with stream_of(films, accumulation=3) as stream:
        steps = [(batch.step, batch.micro, stream.step) for batch in stream][:6]
    assert steps == [(0, 0, 0), (0, 1, 0), (0, 2, 1), (1, 0, 1), (1, 1, 1), (1, 2, 2)]


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2), (4, 1), (1, 4), (3, 5), (1, 64)])
def test_a_run_resumed_with_another_world_size_has_the_same_global_batches(
    films: Any, before: int, after: int
) -> None:
    head, state = take(films, before, 3)
    tail, _ = take(films, after, 6, state)
    assert head + tail == take(films, 1, 9)[0]


@pytest.mark.slow
@settings(max_examples=25)
@given(st.integers(1, 12), st.integers(1, 3), st.integers(0, 7), st.integers(1, 12))
def test_any_world_size_has_the_same_global_batches_and_resumes_from_any_other(
    make_films: Callable[..., Any], before: int, accumulation: int, stop: int, after: int
) -> None:
    films = make_films(N_ROWS)
    head, state = take(films, before, stop, accumulation=accumulation)
    tail, _ = take(films, after, 8 - stop, state)
    assert head + tail == take(films, 1, 8)[0]


def test_every_rank_has_the_same_number_of_batches_of_one_shape_whose_weights_sum_to_w(
    films: Any,
) -> None:
    epochs = []
    for rank in range(5):
        with stream_of(films, rank=rank, world_size=5, accumulation=2) as stream:
            epochs.append(list(stream))
            assert stream.padding_share == pytest.approx(1 - 46 / 70)
    assert {len(epoch) for epoch in epochs} == {14}
    assert {tuple(batch.features.shape) for epoch in epochs for batch in epoch} == {(1, 10, 8)}
    for step in range(7):
        batches = [batch for epoch in epochs for batch in epoch if batch.step == step]
        assert {batch.global_weight for batch in batches} == {7.0 if step < 6 else 4.0}
        assert sum(float(batch.weight.sum()) for batch in batches) == batches[0].global_weight


def test_drop_last_drops_the_short_batch(films: Any) -> None:
    config = CONFIG.model_copy(update={"drop_last": True})
    with stream_of(films, config) as stream:
        assert [batch.global_weight for batch in stream] == [7.0] * 6


def test_an_interrupted_iteration_continues_after_the_last_complete_step(films: Any) -> None:
    with stream_of(films, accumulation=2) as stream:
        for batch in stream:
            if (batch.step, batch.micro) == (2, 0):
                break
        assert (batch.step, batch.micro) == (2, 0)
        repeated = next(iter(stream))
        assert (repeated.step, repeated.micro) == (2, 0)
        assert windows_of(repeated) == windows_of(batch)


def test_only_the_latest_iteration_is_valid(films: Any) -> None:
    with stream_of(films) as stream:
        old = iter(stream)
        next(old)
        new = iter(stream)
        assert next(new).step == 1
        with pytest.raises(RuntimeError, match="this iteration is over"):
            next(old)
        stream.load_state_dict(stream.state_dict())
        with pytest.raises(RuntimeError, match="this iteration is over"):
            next(new)


def test_a_closed_stream_has_no_threads_and_refuses_to_continue(films: Any) -> None:
    stream = stream_of(films)
    batches = iter(stream)
    batch = next(batches)
    stream.close()
    assert not [each for each in threading.enumerate() if each.name.startswith("stream-read")]
    with pytest.raises(RuntimeError, match=r"used after close\(\)"):
        next(batches)
    with pytest.raises(RuntimeError, match=r"used after close\(\)"):
        iter(stream)
    expected = films.window(int(batch.movie[0]), int(batch.start[0]), 10)
    assert np.array_equal(batch.features[0].numpy(), expected)


FEW_FILES = """
import resource, sys

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from configs.schema import StreamConfig
from movienet_stream import FeatureStream, open_features

features = open_features(sys.argv[1])
config = StreamConfig(window=2, global_batch=50, threads=16)
with FeatureStream(features, features.labels.movies("train"), config) as stream:
    windows = sum(int(batch.weight.sum()) for _ in range(2) for batch in stream)
print(len(features.manifest.shards), windows)
"""


@pytest.mark.slow
def test_100_shards_are_read_by_a_process_that_may_open_64_files(
    make_films: Callable[..., Any], tmp_path: Path
) -> None:
    make_films([3] * 700, folder=tmp_path)
    command = [sys.executable, "-c", FEW_FILES, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.stdout, done.stderr) == ("100 1400\n", "")


def test_a_loop_left_by_break_leaves_no_thread(films: Any) -> None:
    stream = stream_of(films)
    for _ in stream:
        break
    assert not [each for each in threading.enumerate() if each.name.startswith("stream-read")]


def other_films(make_films: Callable[..., Any]) -> Any:
    return make_films([*N_ROWS[:-1], 9])


def relabelled(films: Any) -> Any:
    labels = films.features.labels
    return replace(
        films, features=replace(films.features, labels=replace(labels, hot_MG=1 - labels.hot_MG))
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data", "data digest.*stream.features_url"),
        ("labels", "labels digest.*genres or splits"),
        ("seed", "plan digest.*stream.seed"),
        ("movies", "plan digest.*train movies"),
        ("shuffle", "plan digest.*shuffle_frames"),
    ],
)
def test_a_state_with_different_data_labels_or_plan_is_refused_with_a_remedy_in_one_line(
    films: Any, make_films: Callable[..., Any], change: str, words: str
) -> None:
    state = stream_of(films).state_dict()
    others = {
        "data": lambda: stream_of(other_films(make_films)),
        "labels": lambda: stream_of(relabelled(films)),
        "seed": lambda: stream_of(films, CONFIG.model_copy(update={"seed": 4})),
        "movies": lambda: FeatureStream(films.features, films.movies[1:], CONFIG),
        "shuffle": lambda: stream_of(films, shuffle_frames=True),
    }
    with pytest.raises(StateError, match=words) as caught:
        others[change]().load_state_dict(state)
    assert "or start a new run" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "damage",
    [
        {"version": 2},
        {"epoch": -1},
        {"epoch": None},
        {"step": 7},
        {"step": True},
        {"step": 1.0},
        {"data": None},
    ],
)
def test_a_corrupt_state_is_refused(films: Any, damage: dict[str, Any]) -> None:
    stream = stream_of(films)
    with pytest.raises(StateError, match="stream state"):
        stream.load_state_dict({**stream.state_dict(), **damage})
    with pytest.raises(StateError, match="stream state"):
        stream.load_state_dict({})


def test_prefetch_and_threads_are_not_part_of_the_state(films: Any) -> None:
    config = CONFIG.model_copy(update={"prefetch": 9, "threads": 1})
    assert stream_of(films, config).state_dict() == stream_of(films).state_dict()


def test_an_epoch_without_a_step_is_refused(films: Any) -> None:
    config = CONFIG.model_copy(update={"global_batch": 47, "drop_last": True})
    with pytest.raises(ConfigError, match="want at most 46"):
        stream_of(films, config)


def test_an_empty_split_and_a_movie_without_rows_are_refused_by_name(
    films: Any, make_films: Callable[..., Any]
) -> None:
    with pytest.raises(DataError, match="no movies"):
        FeatureStream(films.features, np.array([], np.int64), CONFIG)
    empty = make_films([5, 0, 5])
    with pytest.raises(DataError, match="tt0000001 has no rows"):
        stream_of(empty)


@pytest.mark.parametrize("world", [{"rank": 2, "world_size": 2}, {"rank": -1}, {"accumulation": 0}])
def test_a_rank_outside_the_world_size_is_refused(films: Any, world: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="want a rank"):
        stream_of(films, **world)


def test_the_permutation_of_a_movie_is_the_same_in_every_epoch(films: Any) -> None:
    with stream_of(films, shuffle_frames=True) as stream:
        for batch in [*stream, *stream]:
            for row, (movie, start) in enumerate(
                zip(batch.movie.tolist(), batch.start.tolist(), strict=True)
            ):
                permuted = films.rows[movie][frame_order(3, movie, N_ROWS[movie])]
                expected = permuted[start : start + 10]
                assert np.array_equal(batch.features[row, : len(expected)].numpy(), expected)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_scoring_reads_every_window_once_over_all_ranks(films: Any, world: int) -> None:
    ranks = [
        list(
            score_batches(
                films.features,
                films.movies,
                View(frames=10, windows=3),
                batch_size=4,
                world=World(rank, world),
            )
        )
        for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    seen = [window for batches in ranks for batch in batches for window in windows_of(batch)]
    assert len(seen) == len(set(seen))
    starts = {movie: {s for m, _, s in seen if m == movie} for movie in range(23)}
    for movie, n_rows in enumerate(N_ROWS):
        max_start = max(n_rows - 10, 0)
        assert starts[movie] == {0, max_start // 2, max_start}
    for batches in ranks:
        for batch in batches:
            for row in range(len(batch.movie)):
                expected = films.window(int(batch.movie[row]), int(batch.start[row]), 10)
                assert np.array_equal(batch.features[row].numpy(), expected)


def test_scoring_no_movies_yields_no_batch(films: Any) -> None:
    none = np.array([], np.int64)
    assert list(score_batches(films.features, none, View(frames=4, windows=2), batch_size=4)) == []


def test_the_stats_count_windows_bytes_and_waiting(films: Any) -> None:
    with stream_of(films) as stream:
        read = sum(int(batch.mask.sum()) for batch in stream)  # padding is read as well
        stats = stream.stats()
    assert stats["windows"] == 46
    assert stats["bytes"] == read * 8 * 2
    assert 0 <= stats["waited_share"] <= 1
    assert stats["waited_s"] <= stats["seconds"]


def test_moving_a_batch_moves_all_its_tensors(films: Any) -> None:
    with stream_of(films) as stream:
        batch = next(iter(stream))
    moved = batch.to("meta")
    assert moved.features.device.type == moved.window_index.device.type == "meta"
    assert (moved.step, moved.global_weight) == (batch.step, batch.global_weight)


def test_the_preview_equals_what_an_epoch_reads(films: Any) -> None:
    planned = preview(films.features, films.movies, CONFIG)
    with stream_of(films) as stream:
        batches = list(stream)
        assert planned.steps == stream.steps_per_epoch == len(batches)
        assert planned.padding_share == stream.padding_share
        assert planned.digest == stream.state_dict()["plan"]
    assert planned.requests == sum(len(batch.movie) for batch in batches) == 49
    real = sum(int(batch.mask.sum()) for batch in batches)
    assert planned.n_bytes == real * 8 * 2
    assert planned.real_share == pytest.approx(real / 490)
    movie, _, start = windows_of(batches[0])[0]
    assert planned.windows_first[0][:2] == (films.features.movie_ids[movie], start)
    first_line = planned.text.splitlines()[0]
    assert first_line.startswith("epoch       46 windows   7 steps of 7   49 reads")


def test_the_preview_of_permuted_movies_counts_the_ranges_that_cover_a_window(films: Any) -> None:
    config = CONFIG.model_copy(update={"global_batch": 2})  # no padding
    planned = preview(films.features, films.movies, config, shuffle_frames=True)
    with stream_of(films, config, shuffle_frames=True) as stream:
        list(stream)
        assert planned.n_bytes == stream.stats()["bytes"]


@pytest.mark.slow
def test_importing_the_stream_imports_no_heavy_library() -> None:
    heavy = {"torch", "accelerate", "wandb", "sklearn", "scipy", "torchvision", "pandas"}
    program = (
        "import sys, training.stream.loader, training.stream.preview;"
        f"print([name for name in {sorted(heavy)} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("sampling", ["random_window", "random_frames", "full_movie"])
def test_a_partner_is_at_the_position_of_its_window_for_any_world_size(
    make_films: Callable[..., Any], sampling: str
) -> None:
    films = make_films([3, 9, 5, 14, 2, 8, 6, 11, 4])

    def pairs(world: int) -> dict[tuple[int, int, int], tuple[int, int, bytes]]:
        partners = {}
        for rank in range(world):
            config = StreamConfig(window=4, global_batch=4, windows_per_movie=2, sampling=sampling)
            with FeatureStream(
                films.features, films.movies, config, rank=rank, world_size=world, partners=True
            ) as stream:
                for batch in [*stream, *stream]:  # two epochs
                    assert batch.partner is not None
                    for row in range(len(batch.movie)):
                        key = (batch.epoch, int(batch.movie[row]), int(batch.window_index[row]))
                        rows = batch.partner.features[row][batch.partner.mask[row]]
                        place = int(batch.partner.movie[row]), int(batch.partner.start[row])
                        partners[key] = (*place, rows.numpy().tobytes())
                        assert batch.partner.mask[row].any()
        return partners

    one = pairs(1)
    assert len(one) == 2 * 2 * 9
    assert pairs(3) == one
    assert len({movie for movie, _, _ in one.values()}) > 5
    by_epoch = [[one[epoch, movie, 0][0] for movie in range(9)] for epoch in range(2)]
    assert by_epoch[0] != by_epoch[1]
