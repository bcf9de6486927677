"""Every figure of a preview, held against a real epoch."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from configs.errors import DataError
from configs.schema import StorageConfig, StreamConfig
from sharding.features import FeatureSet, open_features
from tests.sharding.servers import faulty_server, log, nginx, rule
from training.stream.loader import FeatureStream
from training.stream.preview import Preview, preview
from training.stream.reader import BorrowedBuffer

N_ROWS = [40 + 31 * (movie % 7) for movie in range(42)]
TIMEOUT_S = 300.0


@pytest.fixture
def films(make_films: Callable[..., Any], tmp_path: Path) -> Any:
    """Six shards of 7 movies, whose shots are known."""
    return make_films(N_ROWS, folder=tmp_path / "set", shots=True)


@contextmanager
def counted(tmp_path: Path) -> Iterator[tuple[str, FeatureSet]]:
    """Serve the set by nginx behind a server that counts."""
    with nginx(tmp_path / "nginx", tmp_path / "set") as upstream, faulty_server(upstream) as url:
        yield url, open_features(url, StorageConfig(timeout=60, max_in_flight=1))


def served(url: str) -> tuple[int, int]:
    """Return requests and bytes of shards since the last rule."""
    ranges = [
        re.fullmatch(r"bytes=(\d+)-(\d+)", each["range"])
        for each in log(url)
        if each["path"].endswith(".tar")
    ]
    return len(ranges), sum(int(found[2]) + 1 - int(found[1]) for found in ranges if found)


def read_epoch(url: str, stream: Any) -> tuple[int, int]:
    """Read an epoch, whatever is admitted at rest between batches; return requests and bytes."""
    rule(url)
    for _ in stream:
        deadline = time.monotonic() + TIMEOUT_S
        while getattr(stream.source, "admitting", False) and time.monotonic() < deadline:
            time.sleep(0.001)
    return served(url)


def config_of(**options: Any) -> StreamConfig:
    settled = {"window": 16, "global_batch": 4, "threads": 1, "prefetch": 1}
    return StreamConfig(**(settled | options))


def told_of(features: FeatureSet, films: Any, config: StreamConfig, **options: Any) -> Preview:
    return preview(features, films.movies, config, **options)


def test_requests_and_bytes_are_those_that_the_server_gets(films: Any, tmp_path: Path) -> None:
    config = config_of(cache_dir="off", windows_per_movie=2)
    with counted(tmp_path) as (url, features):
        told = told_of(features, films, config, world_size=2)
        rule(url)
        for rank in (0, 1):
            with FeatureStream(features, films.movies, config, rank=rank, world_size=2) as stream:
                assert stream.steps_per_epoch == told.steps
                assert {len(batch.movie) for batch in stream} == {told.batch_size}
                assert stream.padding_share == pytest.approx(told.padding_share)
        assert served(url) == (told.requests, told.n_bytes)
    assert told.first == told.later
    assert (told.first.requests, told.first.n_bytes) == (told.requests, told.n_bytes)
    assert told.first.hit_rate == 0


@pytest.mark.parametrize("sample", ["random_window", "full_movie"])
def test_windows_to_mix_in_are_counted_in_what_is_read_and_held(
    films: Any, tmp_path: Path, sample: str
) -> None:
    config = config_of(cache_dir="off", sampling=sample)
    with counted(tmp_path) as (url, features):
        told = told_of(features, films, config, partners=True)
        with FeatureStream(features, films.movies, config, partners=True) as stream:
            rule(url)
            held = watch(stream._buffers)
            assert sum(1 for _ in stream) == told.steps
        assert served(url) == (told.requests, told.n_bytes)
    assert 0.9 * told.buffer_bytes <= max(held) <= told.buffer_bytes


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
def test_reads_bytes_and_memory_are_those_of_a_real_epoch(
    films: Any, options: dict[str, Any]
) -> None:
    shuffle = {"shuffle_frames": options.pop("shuffle_frames", False)}
    config = config_of(**options)
    told = told_of(films.features, films, config, accumulation=2, **shuffle)
    with FeatureStream(films.features, films.movies, config, accumulation=2, **shuffle) as stream:
        largest = windows = real = places = 0
        for batch in stream:
            largest = max(largest, batch.features.numel() * batch.features.element_size())
            windows += int((batch.weight > 0).sum())
            real, places = real + int(batch.mask.sum()), places + batch.mask.numel()
        stats = stream.stats()
        assert vars(stream._buffers)["_held_bytes"] <= told.buffer_bytes
    assert (stats["requests"], stats["bytes"]) == (told.requests, told.n_bytes)
    assert windows == told.windows
    assert real / places == pytest.approx(told.real_share)
    assert told.buffer_bytes == (config.prefetch + 2) * largest


def test_nodes_are_previewed_by_their_first(films: Any) -> None:
    config = config_of()
    told = told_of(films.features, films, config, world_size=4, ranks_per_node=2)
    streams = [
        FeatureStream(films.features, films.movies, config, rank=rank, world_size=4)
        for rank in (0, 1)
    ]
    assert sum(1 for stream in streams for _ in stream) == 2 * told.steps
    stats = [stream.stats() for stream in streams]
    assert told.first.requests == sum(each["requests"] for each in stats)
    assert told.first.n_bytes == sum(each["bytes"] for each in stats)


def test_a_cache_that_takes_the_whole_set(films: Any, tmp_path: Path) -> None:
    config = config_of(cache_dir=str(tmp_path / "cache"), cache_bytes=10**9)
    with counted(tmp_path) as (url, features):
        told = told_of(features, films, config)
        with FeatureStream(features, films.movies, config) as stream:
            first, later = read_epoch(url, stream), read_epoch(url, stream)
    whole = films.features.manifest.n_bytes
    assert told.cached_bytes == whole
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) == whole
    assert whole < first[1] <= told.first.n_bytes
    assert first[0] <= told.first.requests
    assert later == (told.later.requests, told.later.n_bytes) == (0, 0)
    assert told.later.hit_rate == 1


def test_a_cache_that_takes_a_part(films: Any, tmp_path: Path) -> None:
    largest = max(shard.n_bytes for shard in films.features.manifest.shards)
    config = config_of(cache_dir=str(tmp_path / "cache"), cache_bytes=3 * (largest + 4096))
    with counted(tmp_path) as (url, features):
        told = told_of(features, films, config)
        with FeatureStream(features, films.movies, config) as stream:
            first = read_epoch(url, stream)
            before = stream.stats()
            later = read_epoch(url, stream)
            after = stream.stats()
    kept = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
    assert told.cached_bytes == pytest.approx(kept, rel=0.05)
    assert first[0] <= told.first.requests
    hits = after["cache_hits"] - before["cache_hits"]
    misses = after["cache_misses"] - before["cache_misses"]
    # Padding differs from epoch to epoch: by which windows, not by how many.
    assert hits / (hits + misses) == pytest.approx(told.later.hit_rate, abs=0.1)
    assert later[0] == pytest.approx(told.later.requests, rel=0.2)


def test_a_cache_that_shards_pass_through(films: Any, tmp_path: Path) -> None:
    largest = max(shard.n_bytes for shard in films.features.manifest.shards)
    config = config_of(
        cache_dir=str(tmp_path / "cache"),
        cache_bytes=2 * (largest + 4096),
        shuffle_block_shards=1,
        windows_per_movie=3,
    )
    with counted(tmp_path) as (url, features):
        told = told_of(features, films, config)
        with FeatureStream(features, films.movies, config) as stream:
            requests, n_bytes = read_epoch(url, stream)
            stats = stream.stats()
    assert told.later.requests <= requests <= told.first.requests
    assert told.later.n_bytes <= n_bytes <= told.first.n_bytes
    rate = stats["cache_hits"] / (stats["cache_hits"] + stats["cache_misses"])
    assert told.first.hit_rate <= rate <= told.later.hit_rate


def watch(ring: Any) -> list[int]:
    """Return a list that grows by the bytes of all buffers each time one is taken."""
    held, take = list[int](), ring.take

    def watched(shape: tuple[int, int, int]) -> BorrowedBuffer:
        lent: BorrowedBuffer = take(shape)
        held.append(vars(ring)["_held_bytes"])
        return lent

    ring.take = watched
    return held


@pytest.mark.parametrize("ahead", [1, 3, 6, 20])
@pytest.mark.parametrize("pool", [1, 4])
def test_memory_of_whole_movies_is_what_is_read_ahead_and_the_batch_in_use(
    make_films: Callable[..., Any], ahead: int, pool: int
) -> None:
    films = make_films([20 + 37 * (movie % 11) for movie in range(66)])
    largest = 2 * 390 * 8 * 2
    config = config_of(
        sampling="full_movie",
        global_batch=2,
        windows_per_movie=3,
        bucket_batches=pool,
        prefetch=4,
        prefetch_bytes=ahead * largest,
    )
    told = told_of(films.features, films, config)
    with FeatureStream(films.features, films.movies, config) as stream:
        held = watch(stream._buffers)
        for _ in stream:
            pass
    assert told.buffer_bytes == (min(ahead, 5) + 1) * largest
    assert 0.9 * told.buffer_bytes <= max(held) <= told.buffer_bytes


def test_shots_that_nobody_knows_are_told_by_movie(make_films: Callable[..., Any]) -> None:
    films = make_films([9, 9])
    with pytest.raises(DataError, match=r"tt0000000: got rows of unknown shots"):
        told_of(films.features, films, config_of(unit="shot"))


def test_the_text_names_the_cache_and_each_nodes_traffic(films: Any, tmp_path: Path) -> None:
    config = config_of(cache_dir=str(tmp_path / "cache"), cache_bytes=10**9)
    text = told_of(films.features, films, config, world_size=2).text
    assert re.search(
        r"^node +2 ranks   first epoch \d+ requests, \d+.* 0.0% hits   later ", text, re.M
    )
    assert "later 0 requests, 0 B, 100.0% hits" in text
    assert f"cache       {tmp_path}/cache   room 1 GB, takes " in text
    assert not (tmp_path / "cache").exists()
