"""Full movies, strides, random frames and means of shots: exact rows, in bounded memory."""

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
from configs.runtime.world import World
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
WINDOW = 10
KINDS: dict[str, dict[str, Any]] = {
    "windows": {},
    "windows of every third frame": {"stride": 3},
    "uniform windows": {"sampling": "uniform_windows", "windows_per_movie": 3},
    "full movies": {"sampling": "full_movie", "bucket_batches": 2},
    "full movies, every fourth frame": {"sampling": "full_movie", "stride": 4},
    "random frames": {"sampling": "random_frames"},
    "windows of shots": {"unit": "shot"},
    "full movies by shots": {"sampling": "full_movie", "unit": "shot"},
    "random shots": {"sampling": "random_frames", "unit": "shot"},
}
Key = tuple[int, int, int, bytes]


@pytest.fixture(scope="module")
def films(make_films: Callable[..., Any]) -> Any:
    return make_films(N_ROWS, shots=True)


def config_of(kind: str, **more: Any) -> StreamConfig:
    base = {"window": WINDOW, "global_batch": 7, "seed": 3, "threads": 2, "windows_per_movie": 2}
    return StreamConfig(**{**base, **KINDS[kind], **more})


def stream_of(films: Any, config: StreamConfig, **options: Any) -> FeatureStream:
    return FeatureStream(films.features, films.movies, config, **options)


def rows_of(films: Any, movie: int, config: StreamConfig) -> NDArray[np.float16]:
    """Return the rows that a movie's windows are cut from: its frames, or its means per shot."""
    rows: NDArray[np.float16] = films.rows[movie]
    if config.unit == "frame":
        return rows
    shots = shots_of(len(rows))
    means = [rows[shots == shot].astype(np.float32).mean(axis=0) for shot in np.unique(shots)]
    return np.stack(means).astype(np.float16)


def windows(batch: Batch) -> list[tuple[int, int, int, NDArray[np.float16]]]:
    """Return movie, window index, start and real rows of each window of weight 1."""
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
    """Return the rest of an epoch: the sorted windows of each global batch."""
    steps: dict[int, list[Key]] = {}
    for rank in range(world):
        with stream_of(films, config, rank=rank, world_size=world) as stream:
            if state is not None:
                stream.load_state_dict(state)
            for batch in stream:
                keys = [(m, k, s, rows.tobytes()) for m, k, s, rows in windows(batch)]
                steps.setdefault(batch.step, []).extend(keys)
    return [sorted(steps[step]) for step in sorted(steps)]


@pytest.mark.parametrize("kind", KINDS)
def test_each_window_has_the_rows_that_its_sampling_defines(films: Any, kind: str) -> None:
    config = config_of(kind)
    with stream_of(films, config) as stream:
        for batch in [*stream, *stream]:
            masked = batch.features[~batch.mask]
            assert not masked.any()
            for movie, _, start, rows in windows(batch):
                movie_rows = rows_of(films, movie, config)
                if config.sampling == "random_frames":
                    at = [int(np.flatnonzero((movie_rows == row).all(axis=1))[0]) for row in rows]
                    assert at == sorted(set(at))
                    assert len(at) == min(WINDOW, len(movie_rows))
                    continue
                expected = movie_rows[start :: config.stride]
                expected = expected if config.sampling == "full_movie" else expected[:WINDOW]
                np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_every_movie_is_read_and_as_often_as_configured(films: Any, kind: str) -> None:
    config = config_of(kind)
    with stream_of(films, config) as stream:
        counts = Counter(movie for batch in stream for movie, *_ in windows(batch))
    assert set(counts) == set(range(len(N_ROWS)))
    if config.sampling != "uniform_windows":
        assert set(counts.values()) == {2}


@pytest.mark.parametrize("kind", KINDS)
def test_global_batches_are_the_same_for_any_world_size_and_after_a_resume(
    films: Any, kind: str
) -> None:
    config = config_of(kind)
    uninterrupted = take(films, config, 1)
    assert take(films, config, 3) == uninterrupted
    with stream_of(films, config) as stream:
        for batch in stream:
            if batch.step == 1:
                break
        state = stream.state_dict()
    assert take(films, config, 2, state) == uninterrupted[2:]


@pytest.mark.parametrize("kind", ["full movies", "windows of every third frame"])
def test_windows_of_permuted_rows_are_cut_in_the_same_way(films: Any, kind: str) -> None:
    config = config_of(kind)
    with stream_of(films, config, shuffle_frames=True) as stream:
        for batch in stream:
            for movie, _, start, rows in windows(batch):
                permuted = films.rows[movie][frame_order(3, movie, N_ROWS[movie])]
                expected = permuted[start :: config.stride]
                expected = expected if config.sampling == "full_movie" else expected[:WINDOW]
                np.testing.assert_array_equal(rows, expected)


def test_a_batch_of_full_movies_is_padded_to_its_longest_movie(films: Any) -> None:
    config = config_of("full movies", windows_per_movie=1, global_batch=4, bucket_batches=100)
    with stream_of(films, config) as stream:
        shapes = [(batch.features.shape, int(batch.mask.sum(1).max())) for batch in stream]
    assert all(shape == (4, longest, 8) for shape, longest in shapes)
    full = sorted(longest for _, longest in shapes[:-1])
    assert full[0] < 20 < full[-1]


@pytest.mark.parametrize("world", [1, 2, 5])
@pytest.mark.parametrize(("unit", "stride"), [("frame", 1), ("frame", 4), ("shot", 1)])
def test_scoring_full_movies_reads_each_once(
    films: Any, world: int, unit: Any, stride: int
) -> None:
    seen: list[int] = []
    for rank in range(world):
        for batch in score_batches(
            films.features,
            films.movies,
            View(frames=None, row=unit, stride=stride),
            batch_size=4,
            world=World(rank, world),
        ):
            for movie, _, start, rows in windows(batch):
                seen.append(movie)
                movie_rows = rows_of(films, movie, StreamConfig(unit=unit))
                np.testing.assert_array_equal(rows, movie_rows[start::stride])
    assert sorted(seen) == list(range(len(N_ROWS)))


class Recording(MemoryStorage):
    """A storage that records the sizes of its reads."""

    near_bytes = 4 * 16  # four rows

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__()
        self.files = files
        self.sizes: list[int] = []

    def read_into(self, ranges: Sequence[Range], buffers: Sequence[memoryview]) -> None:
        self.sizes += [len(buffer) for buffer in buffers]
        super().read_into(ranges, buffers)


@pytest.mark.parametrize(("stride", "ranges", "rows"), [(4, 1, 37), (6, 10, 10)])
def test_strided_rows_are_read_as_one_range_only_if_their_gaps_are_small(
    make_films: Callable[..., Any], stride: int, ranges: int, rows: int
) -> None:
    films = make_films([100])
    source = Recording(films.features.storage.files)
    config = StreamConfig(window=10, stride=stride, global_batch=1)
    with FeatureStream(films.features, films.movies, config, source=source) as stream:
        (batch,) = stream
        stats = stream.stats()
    start = int(batch.start[0])
    np.testing.assert_array_equal(batch.features[0].numpy(), films.rows[0][start::stride][:10])
    assert len(source.sizes) == ranges == stats["requests"]
    assert sum(source.sizes) == rows * 16 == stats["bytes"]


def test_memory_is_bounded_with_a_movie_of_twelve_thousand_frames(
    make_films: Callable[..., Any],
) -> None:
    """``prefetch_bytes`` limits the batches read ahead, whatever ``prefetch`` is."""
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


def test_a_set_without_shots_is_refused_by_movie(make_films: Callable[..., Any]) -> None:
    films = make_films(N_ROWS)
    with pytest.raises(DataError, match=r"tt0000000: got rows without shots.*unit: frame"):
        stream_of(films, config_of("windows of shots"))


def test_shots_at_an_unexpected_offset_are_refused(make_films: Callable[..., Any]) -> None:
    films = make_films([9, 9], shots=True)
    files = films.features.storage.files
    name = films.features.shard_file(0)
    files[name] = files[name].replace(b"tt0000001.shots.npy", b"tt0000001.shots.bak")
    with pytest.raises(DataError, match=r"tt0000001\.shots\.npy does not follow the rows"):
        list(read_shots(films.features, [0, 1]))


@pytest.mark.parametrize("other", ["stream.sampling=random_frames", "stream.unit=shot"])
def test_a_stride_is_refused_with_random_frames_and_with_shots(other: str) -> None:
    with pytest.raises(ConfigError, match="stride: got 2 with"):
        load_config(Path("configs/demo.yaml"), [other, "stream.stride=2"])
