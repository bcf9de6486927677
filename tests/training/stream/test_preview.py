"""Every figure of a preview equals that of a real epoch."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.errors import DataError
from configs.schema import StorageConfig, StreamConfig
from sharding.features import FeatureSet, open_features
from tests.sharding.servers import faulty_server, log, nginx, rule
from training.stream.loader import FeatureStream
from training.stream.preview import FirstWindow, Preview, Traffic, preview
from training.stream.reader import BorrowedBuffer

pytestmark = pytest.mark.slow

N_ROWS = [40 + 31 * (movie % 7) for movie in range(42)]
TIMEOUT_S = 300.0


@pytest.fixture
def films(make_films: Callable[..., Any], tmp_path: Path) -> Any:
    """Six shards of 7 movies, with shots."""
    return make_films(N_ROWS, folder=tmp_path / "set", shots=True)


@contextmanager
def counted(tmp_path: Path) -> Iterator[tuple[str, FeatureSet]]:
    """Serve the set by nginx behind a server that logs the requests."""
    with nginx(tmp_path / "nginx", tmp_path / "set") as upstream, faulty_server(upstream) as url:
        yield url, open_features(url, StorageConfig(timeout=60, max_in_flight=1))


def served(url: str) -> tuple[int, int]:
    """Return requests and bytes of shards since the last rule."""
    ranges = [
        re.fullmatch(r"bytes=(\d+)-(\d+)", each["range"])
        for each in log(url)
        if each["path"].endswith(".tar")
    ]
    return len(ranges), sum(int(match[2]) + 1 - int(match[1]) for match in ranges if match)


def read_epoch(url: str, stream: Any) -> tuple[int, int]:
    """Read an epoch, waiting for downloads after each batch; return requests and bytes."""
    rule(url)
    for _ in stream:
        deadline = time.monotonic() + TIMEOUT_S
        while getattr(stream.source, "admitting", False) and time.monotonic() < deadline:
            time.sleep(0.001)
    return served(url)


def config_of(**options: Any) -> StreamConfig:
    defaults = {"window": 16, "global_batch": 4, "threads": 1, "prefetch": 1}
    return StreamConfig(**(defaults | options))


def preview_of(features: FeatureSet, films: Any, config: StreamConfig, **options: Any) -> Preview:
    return preview(features, films.movies, config, **options)


def test_requests_and_bytes_are_those_that_the_server_receives(films: Any, tmp_path: Path) -> None:
    config = config_of(cache_dir="off", windows_per_movie=2)
    with counted(tmp_path) as (url, features):
        planned = preview_of(features, films, config, world_size=2)
        rule(url)
        for rank in (0, 1):
            with FeatureStream(features, films.movies, config, rank=rank, world_size=2) as stream:
                assert stream.steps_per_epoch == planned.steps
                assert {len(batch.movie) for batch in stream} == {planned.batch_size}
                assert stream.padding_share == pytest.approx(planned.padding_share)
        assert served(url) == (planned.requests, planned.n_bytes)
    assert planned.first == planned.later
    assert (planned.first.requests, planned.first.n_bytes) == (planned.requests, planned.n_bytes)
    assert planned.first.hit_rate == 0


@pytest.mark.parametrize("sampling", ["random_window", "full_movie"])
def test_requests_bytes_and_memory_include_partners(
    films: Any, tmp_path: Path, sampling: str
) -> None:
    config = config_of(cache_dir="off", sampling=sampling)
    with counted(tmp_path) as (url, features):
        planned = preview_of(features, films, config, partners=True)
        with FeatureStream(features, films.movies, config, partners=True) as stream:
            rule(url)
            held = watch(stream._buffers)
            assert sum(1 for _ in stream) == planned.steps
        assert served(url) == (planned.requests, planned.n_bytes)
    assert 0.9 * planned.buffer_bytes <= max(held) <= planned.buffer_bytes


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 3},
        {"sampling": "random_frames"},
        {"sampling": "uniform_windows"},
        {"sampling": "full_movie"},
        {"shuffle_frames": True},
        {"unit": "shot"},
        {"unit": "shot", "sampling": "full_movie"},
        {"unit": "shot", "sampling": "random_frames"},
    ],
)
def test_requests_bytes_and_memory_are_those_of_a_real_epoch(
    films: Any, options: dict[str, Any]
) -> None:
    shuffle = {"shuffle_frames": options.pop("shuffle_frames", False)}
    config = config_of(**options)
    planned = preview_of(films.features, films, config, accumulation=2, **shuffle)
    with FeatureStream(films.features, films.movies, config, accumulation=2, **shuffle) as stream:
        largest = windows = real = places = 0
        for batch in stream:
            largest = max(largest, batch.features.numel() * batch.features.element_size())
            windows += int((batch.weight > 0).sum())
            real, places = real + int(batch.mask.sum()), places + batch.mask.numel()
        stats = stream.stats()
        assert vars(stream._buffers)["_held_bytes"] <= planned.buffer_bytes
    assert (stats["requests"], stats["bytes"]) == (planned.requests, planned.n_bytes)
    assert windows == planned.windows
    assert real / places == pytest.approx(planned.real_share)
    assert planned.buffer_bytes == (config.prefetch + 2) * largest


def test_the_traffic_of_a_node_is_that_of_the_first_node(films: Any) -> None:
    config = config_of()
    planned = preview_of(films.features, films, config, world_size=4, ranks_per_node=2)
    streams = [
        FeatureStream(films.features, films.movies, config, rank=rank, world_size=4)
        for rank in (0, 1)
    ]
    assert sum(1 for stream in streams for _ in stream) == 2 * planned.steps
    stats = [stream.stats() for stream in streams]
    assert planned.first.requests == sum(each["requests"] for each in stats)
    assert planned.first.n_bytes == sum(each["bytes"] for each in stats)


def test_a_cache_that_fits_the_complete_set(films: Any, tmp_path: Path) -> None:
    config = config_of(cache_dir=str(tmp_path / "cache"), cache_bytes=10**9)
    with counted(tmp_path) as (url, features):
        planned = preview_of(features, films, config)
        with FeatureStream(features, films.movies, config) as stream:
            first, later = read_epoch(url, stream), read_epoch(url, stream)
    set_bytes = films.features.manifest.n_bytes
    assert planned.cached_bytes == set_bytes
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) == set_bytes
    assert set_bytes < first[1] <= planned.first.n_bytes
    assert first[0] <= planned.first.requests
    assert later == (planned.later.requests, planned.later.n_bytes) == (0, 0)
    assert planned.later.hit_rate == 1


def test_a_cache_that_fits_some_of_the_shards(films: Any, tmp_path: Path) -> None:
    largest = max(shard.n_bytes for shard in films.features.manifest.shards)
    config = config_of(cache_dir=str(tmp_path / "cache"), cache_bytes=3 * (largest + 4096))
    with counted(tmp_path) as (url, features):
        planned = preview_of(features, films, config)
        with FeatureStream(features, films.movies, config) as stream:
            first = read_epoch(url, stream)
            before = stream.stats()
            later = read_epoch(url, stream)
            after = stream.stats()
    cached_bytes = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
    assert planned.cached_bytes == pytest.approx(cached_bytes, rel=0.05)
    assert first[0] <= planned.first.requests
    hits = after["cache_hits"] - before["cache_hits"]
    misses = after["cache_misses"] - before["cache_misses"]
    # The number of padding windows is the same in every epoch, but the windows differ.
    assert hits / (hits + misses) == pytest.approx(planned.later.hit_rate, abs=0.1)
    assert later[0] == pytest.approx(planned.later.requests, rel=0.2)


def test_a_cache_that_evicts_shards(films: Any, tmp_path: Path) -> None:
    largest = max(shard.n_bytes for shard in films.features.manifest.shards)
    config = config_of(
        cache_dir=str(tmp_path / "cache"),
        cache_bytes=2 * (largest + 4096),
        shuffle_block_shards=1,
        windows_per_movie=3,
    )
    with counted(tmp_path) as (url, features):
        planned = preview_of(features, films, config)
        with FeatureStream(features, films.movies, config) as stream:
            requests, n_bytes = read_epoch(url, stream)
            stats = stream.stats()
    assert planned.later.requests <= requests <= planned.first.requests
    assert planned.later.n_bytes <= n_bytes <= planned.first.n_bytes
    rate = stats["cache_hits"] / (stats["cache_hits"] + stats["cache_misses"])
    assert planned.first.hit_rate <= rate <= planned.later.hit_rate


def watch(pool: Any) -> list[int]:
    """Return a list to which each ``take`` appends the bytes of all buffers."""
    held, take = list[int](), pool.take

    def watched(shape: tuple[int, int, int]) -> BorrowedBuffer:
        buffer: BorrowedBuffer = take(shape)
        held.append(vars(pool)["_held_bytes"])
        return buffer

    pool.take = watched
    return held


@pytest.mark.parametrize("ahead", [1, 3, 6, 20])
@pytest.mark.parametrize("bucket_batches", [1, 4])
def test_memory_of_full_movies_is_that_of_the_prefetched_batches_and_the_one_in_use(
    make_films: Callable[..., Any], ahead: int, bucket_batches: int
) -> None:
    films = make_films([20 + 37 * (movie % 11) for movie in range(66)])
    largest = 2 * 390 * 8 * 2
    config = config_of(
        sampling="full_movie",
        global_batch=2,
        windows_per_movie=3,
        bucket_batches=bucket_batches,
        prefetch=4,
        prefetch_bytes=ahead * largest,
    )
    planned = preview_of(films.features, films, config)
    with FeatureStream(films.features, films.movies, config) as stream:
        held = watch(stream._buffers)
        for _ in stream:
            pass
    assert planned.buffer_bytes == (min(ahead, 5) + 1) * largest
    assert 0.9 * planned.buffer_bytes <= max(held) <= planned.buffer_bytes


def test_a_set_without_shots_is_refused_by_movie(make_films: Callable[..., Any]) -> None:
    films = make_films([9, 9])
    with pytest.raises(DataError, match=r"tt0000000: got rows without shots"):
        preview_of(films.features, films, config_of(unit="shot"))


def test_the_text_has_the_cache_and_the_traffic_of_a_node(films: Any, tmp_path: Path) -> None:
    config = config_of(cache_dir=str(tmp_path / "cache"), cache_bytes=10**9)
    text = preview_of(films.features, films, config, world_size=2).text
    lines = {line[:12].strip(): line[12:] for line in text.splitlines() if line[0] != " "}
    assert lines["node"] == "2 ranks"
    assert re.fullmatch(r"\d+ requests, [\d.]+ kB   0\.0% cache hits", lines["first epoch"])
    assert lines["later"] == "0 requests, 0 B   100.0% cache hits"
    assert lines["cache"].startswith(f"{tmp_path}/cache")
    assert re.search(r"limit 1 GB, [\d.]+ kB used$", text, re.MULTILINE)
    assert not (tmp_path / "cache").exists()


def test_the_text_fits_80_columns_at_the_size_of_a_real_run(films: Any) -> None:
    config = config_of(cache_dir="/scratch/job-1234567/movienet-stream", cache_bytes=10**13)
    planned = preview_of(films.features, films, config, world_size=64, ranks_per_node=8)
    window = FirstWindow("tt0032138", 11_903, 12_159)
    large = replace(
        planned,
        windows=2_469_134,
        steps=38_581,
        global_batch=4096,
        requests=2_469_184,
        n_bytes=987 * 10**9,
        cached_bytes=999 * 10**9,
        buffer_bytes=10**9,
        plan_bytes=10**9,
        first=Traffic(2_469_184, 987 * 10**9, 0.123),
        windows_first=(window,) * 4,
    )
    for each in (planned, large):
        assert max(map(len, each.text.splitlines())) <= 80
    assert large.text.count("tt0032138[11903:12159]") == 4
