"""Whole movies, strides, random frames, means of shots: right rows, exact, in bounded memory."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from configs.errors import ConfigError, DataError
from configs.load import load_config
from configs.runtime.launch import World
from configs.schema import StreamConfig
from sharding.features import read_shots
from sharding.storage.base import Range
from sharding.storage.memory import MemoryStorage
from tests.training.conftest import shots_of
from training.stream.batch import Batch
from training.stream.epoch_plan import frame_order
from training.stream.loader import FeatureStream, score_batches
from training.stream.view import View

N_ROWS = [1 + (movie * 37) % 61 for movie in range(23)]  # 1 to 61 rows
FRAMES = 10
KINDS: dict[str, dict[str, Any]] = {
    "windows": {},
    "windows of every third frame": {"stride": 3},
    "spaced windows": {"sampling": "uniform_windows", "windows_per_movie": 3},
    "whole movies": {"sampling": "full_movie", "bucket_batches": 2},
    "whole movies, every fourth frame": {"sampling": "full_movie", "stride": 4},
    "random frames": {"sampling": "random_frames"},
    "windows of shots": {"unit": "shot"},
    "whole movies by shots": {"sampling": "full_movie", "unit": "shot"},
    "random shots": {"sampling": "random_frames", "unit": "shot"},
}
Key = tuple[int, int, int, bytes]


@pytest.fixture(scope="module")
def films(make_films: Callable[..., Any]) -> Any:
    return make_films(N_ROWS, shots=True)


def config_of(kind: str, **more: Any) -> StreamConfig:
    base = {"window": FRAMES, "global_batch": 7, "seed": 3, "threads": 2, "windows_per_movie": 2}
    return StreamConfig(**{**base, **KINDS[kind], **more})


def stream_of(films: Any, config: StreamConfig, **options: Any) -> FeatureStream:
    return FeatureStream(films.features, films.movies, config, **options)


def tape(films: Any, movie: int, config: StreamConfig) -> NDArray[np.float16]:
    """Return what a movie's windows are cut from: its rows, or the mean of each of its shots."""
    rows: NDArray[np.float16] = films.rows[movie]
    if config.unit == "frame":
        return rows
    shots = shots_of(len(rows))
    means = [rows[shots == shot].astype(np.float32).mean(axis=0) for shot in np.unique(shots)]
    return np.stack(means).astype(np.float16)


def windows(batch: Batch) -> list[tuple[int, int, int, NDArray[np.float16]]]:
    """Return movie, visit, start and real rows of each window of weight 1."""
    return [
        (int(m), int(k), int(s), rows[mask].numpy())
        for m, k, s, rows, mask, weight in zip(
            *(
                batch.movie,
                batch.window_index,
                batch.start,
                batch.features,
                batch.mask,
                batch.weight,
            ),
            strict=True,
        )
        if weight > 0
    ]


def take(films: Any, config: StreamConfig, world: int, state: Any = None) -> list[list[Key]]:
    """Return what remains of an epoch: each global batch as its windows, sorted."""
    found: dict[int, list[Key]] = {}
    for rank in range(world):
        with stream_of(films, config, rank=rank, world_size=world) as stream:
            if state is not None:
                stream.load_state_dict(state)
            for batch in stream:
                keys = [(m, k, s, rows.tobytes()) for m, k, s, rows in windows(batch)]
                found.setdefault(batch.step, []).extend(keys)
    return [sorted(found[step]) for step in sorted(found)]


@pytest.mark.parametrize("kind", KINDS)
def test_each_window_has_the_rows_of_its_movie_that_its_kind_tells(films: Any, kind: str) -> None:
    config = config_of(kind)
    with stream_of(films, config) as stream:
        for batch in [*stream, *stream]:
            hidden = batch.features[~batch.mask]
            assert not hidden.any()
            for movie, _, start, rows in windows(batch):
                whole = tape(films, movie, config)
                if config.sampling == "random_frames":
                    at = [int(np.flatnonzero((whole == row).all(axis=1))[0]) for row in rows]
                    assert at == sorted(set(at))
                    assert len(at) == min(FRAMES, len(whole))
                    continue
                wanted = whole[start :: config.stride]
                wanted = wanted if config.sampling == "full_movie" else wanted[:FRAMES]
                np.testing.assert_array_equal(rows, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_each_movie_is_visited_as_often_as_it_should_and_none_is_left_out(
    films: Any, kind: str
) -> None:
    config = config_of(kind)
    with stream_of(films, config) as stream:
        window_indices = Counter(movie for batch in stream for movie, *_ in windows(batch))
    assert set(window_indices) == set(range(len(N_ROWS)))
    if config.sampling != "uniform_windows":
        assert set(window_indices.values()) == {2}


@pytest.mark.parametrize("kind", KINDS)
def test_global_batches_are_the_same_for_any_world_and_after_a_resume(
    films: Any, kind: str
) -> None:
    config = config_of(kind)
    whole = take(films, config, 1)
    assert take(films, config, 3) == whole
    with stream_of(films, config) as stream:
        for batch in stream:
            if batch.step == 1:
                break
        state = stream.state_dict()
    assert take(films, config, 2, state) == whole[2:]


@pytest.mark.parametrize("kind", ["whole movies", "windows of every third frame"])
def test_permuted_rows_are_cut_like_others(films: Any, kind: str) -> None:
    config = config_of(kind)
    with stream_of(films, config, shuffle_frames=True) as stream:
        for batch in stream:
            for movie, _, start, rows in windows(batch):
                permuted = films.rows[movie][frame_order(3, movie, N_ROWS[movie])]
                wanted = permuted[start :: config.stride]
                wanted = wanted if config.sampling == "full_movie" else wanted[:FRAMES]
                np.testing.assert_array_equal(rows, wanted)


def test_a_batch_of_whole_movies_is_as_long_as_its_longest(films: Any) -> None:
    config = config_of("whole movies", windows_per_movie=1, global_batch=4, bucket_batches=100)
    with stream_of(films, config) as stream:
        shapes = [(batch.features.shape, int(batch.mask.sum(1).max())) for batch in stream]
    assert all(shape == (4, longest, 8) for shape, longest in shapes)
    full = sorted(longest for _, longest in shapes[:-1])
    assert full[0] < 20 < full[-1]


@pytest.mark.parametrize("world", [1, 2, 5])
@pytest.mark.parametrize(("row", "stride"), [("frame", 1), ("frame", 4), ("shot", 1)])
def test_scoring_whole_movies_reads_each_once(
    films: Any, world: int, row: Any, stride: int
) -> None:
    seen: list[int] = []
    for rank in range(world):
        for batch in score_batches(
            films.features,
            films.movies,
            View(frames=None, row=row, stride=stride),
            batch_size=4,
            world=World(rank, world),
        ):
            for movie, _, start, rows in windows(batch):
                seen.append(movie)
                whole = tape(films, movie, StreamConfig(unit=row))
                np.testing.assert_array_equal(rows, whole[start::stride])
    assert sorted(seen) == list(range(len(N_ROWS)))


class Watched(MemoryStorage):
    """Remembers what it was asked."""

    near_bytes = 4 * 16  # four rows

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__()
        self.files = files
        self.asked: list[int] = []

    def read_into(self, ranges: Sequence[Range], buffers: Sequence[memoryview]) -> None:
        self.asked += [len(buffer) for buffer in buffers]
        super().read_into(ranges, buffers)


@pytest.mark.parametrize(("stride", "ranges", "rows"), [(4, 1, 37), (6, 10, 10)])
def test_rows_further_apart_than_a_range_is_worth_are_read_alone(
    make_films: Callable[..., Any], stride: int, ranges: int, rows: int
) -> None:
    films = make_films([100])
    source = Watched(films.features.storage.files)
    config = StreamConfig(window=10, stride=stride, global_batch=1)
    with FeatureStream(films.features, films.movies, config, source=source) as stream:
        (batch,) = stream
        stats = stream.stats()
    start = int(batch.start[0])
    np.testing.assert_array_equal(batch.features[0].numpy(), films.rows[0][start::stride][:10])
    assert len(source.asked) == ranges == stats["requests"]
    assert sum(source.asked) == rows * 16 == stats["bytes"]


def test_memory_stays_bounded_with_a_film_of_twelve_thousand_frames(
    make_films: Callable[..., Any],
) -> None:
    """However many batches are to be read ahead: no more than are allowed, and the one held."""
    films = make_films([12_000, 12_000, 12_000, *range(50, 90)], dim=64)
    longest = 4 * 12_000 * 64 * 2
    config = StreamConfig(
        sampling="full_movie",
        global_batch=4,
        prefetch=20,
        prefetch_bytes=2 * longest,
        bucket_batches=1,
    )
    with stream_of(films, config) as stream:
        tracemalloc.start()
        try:
            for _ in range(3):
                for batch in stream:
                    del batch
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 4 * longest
    for batch in score_batches(films.features, films.movies, View(frames=None), batch_size=64):
        assert batch.mask.numel() <= max(2**16, 12_000)


def test_unknown_shots_are_refused_by_movie(make_films: Callable[..., Any]) -> None:
    films = make_films(N_ROWS)
    with pytest.raises(DataError, match=r"tt0000000: got rows of unknown shots.*unit: frame"):
        stream_of(films, config_of("windows of shots"))


def test_shots_that_stand_elsewhere_are_told(make_films: Callable[..., Any]) -> None:
    films = make_films([9, 9], shots=True)
    files = films.features.storage.files
    name = films.features.shard_file(0)
    files[name] = files[name].replace(b"tt0000001.shots.npy", b"tt0000001.shots.bak")
    with pytest.raises(DataError, match=r"tt0000001\.shots\.npy is not where our writer puts it"):
        list(read_shots(films.features, [0, 1]))


@pytest.mark.parametrize("other", ["stream.sampling=random_frames", "stream.unit=shot"])
def test_a_stride_with_what_has_none_is_refused(other: str) -> None:
    with pytest.raises(ConfigError, match="stride: got 2 with"):
        load_config(Path("configs/demo.yaml"), [other, "stream.stride=2"])
