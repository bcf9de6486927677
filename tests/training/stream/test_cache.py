"""The cache: shards on the node's disk, never more than is allowed, never a wrong one."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import DataError
from configs.schema import StorageConfig, StreamConfig
from sharding.features import open_features
from tests.disks import small_disk
from tests.sharding.servers import nginx
from tests.training.ranks import TIMEOUT_S, Job, batches, rank_server, stats, told
from training.stream.cache import CacheFolder, Entry, cache_path, choose_victims, is_rolling
from training.stream.loader import FeatureStream, score_batches
from training.stream.view import View

N_ROWS = [200 + 31 * (movie % 7) for movie in range(42)]
FRAMES = 16


@pytest.fixture
def films(make_films: Callable[..., Any], tmp_path: Path) -> Any:
    """Six shards of 7 movies, about 50 kB each."""
    return make_films(N_ROWS, folder=tmp_path / "set")


def stream_of(films: Any, cache: Path | str, max_bytes: int | None = None, **more: Any) -> Any:
    options = {"window": FRAMES, "global_batch": 4, "threads": 2, "prefetch": 2} | more
    config = StreamConfig(cache_dir=str(cache), cache_bytes=max_bytes, **options)
    return FeatureStream(films.features, films.movies, config)


def read_epoch(stream: Any, films: Any, *, settle: bool = False) -> dict[str, float]:
    """Read what remains of the epoch, hold it against what was published; return the change."""
    before = stream.stats()
    for batch in stream:
        places = zip(batch.movie.tolist(), batch.start.tolist(), strict=True)
        expected = np.stack([films.window(movie, start, FRAMES) for movie, start in places])
        np.testing.assert_array_equal(batch.features.numpy(), expected)
        if settle:
            settled(stream)
    settled(stream)
    return {name: value - before[name] for name, value in stream.stats().items()}


def settled(stream: Any) -> None:
    """Wait until nothing is being admitted."""
    deadline = time.monotonic() + TIMEOUT_S
    while stream.source.admitting and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not stream.source.admitting


def whole(cache: Path, films: Any) -> list[str]:
    """Return the shards in the cache; each must be what its name says."""
    names = {f"{shard.sha256}.tar": shard.name for shard in films.features.manifest.shards}
    for path in cache.iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem
    return sorted(names[path.name] for path in cache.iterdir())


# --- what goes ------------------------------------------------------------------------------------

ENTRIES = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 5)), max_size=12).map(
    lambda rows: [Entry(f"e{k}", size, used) for k, (size, used) in enumerate(rows)]
)


@given(ENTRIES, st.integers(0, 80), st.integers(0, 200), st.sets(st.integers(0, 11)))
def test_what_goes_makes_just_enough_room_the_least_recently_used_first(
    entries: list[Entry], need: int, limit: int, kept: set[int]
) -> None:
    keep = {f"e{k}" for k in kept}
    victims = choose_victims(entries, need=need, limit=limit, keep=keep)
    free_to_go = [entry for entry in entries if entry.name not in keep]
    total, most = (sum(e.n_bytes for e in some) for some in (entries, free_to_go))
    if victims is None:
        assert total - most + need > limit
        return
    gone = sum(victim.n_bytes for victim in victims)
    assert total - gone + need <= limit
    assert not victims or total - gone + victims[-1].n_bytes + need > limit
    assert victims == sorted(free_to_go, key=lambda e: (e.used_ns, e.name))[: len(victims)]


def test_shards_are_evicted_for_others_only_in_blocks_that_fit() -> None:
    sizes = [8192, 4096, 4096]
    assert not is_rolling(sizes, 0, 10**6)
    assert is_rolling(sizes, 2, 12_288)
    assert not is_rolling(sizes, 2, 12_287)


# --- one rank -------------------------------------------------------------------------------------


def test_the_second_epoch_is_read_from_the_cache_alone(films: Any, tmp_path: Path) -> None:
    with stream_of(films, tmp_path / "cache") as stream:
        first, second = read_epoch(stream, films), read_epoch(stream, films)
    assert first["cache_hits"] + first["cache_misses"] == 44  # 42 and padding
    assert first["cache_admitted_bytes"] == films.features.manifest.n_bytes
    assert (second["cache_hits"], second["cache_misses"]) == (44, 0)
    assert second["cache_admitted_bytes"] == 0
    assert len(whole(tmp_path / "cache", films)) == 6


def test_another_run_finds_what_the_first_has_left(films: Any, tmp_path: Path) -> None:
    with stream_of(films, tmp_path / "cache") as stream:
        read_epoch(stream, films)
    with stream_of(films, tmp_path / "cache", seed=5) as stream:
        assert read_epoch(stream, films)["cache_misses"] == 0
        scored = score_batches(
            films.features,
            films.movies,
            View(frames=8, windows=2),
            batch_size=6,
            source=stream.source,
        )
        assert sum(len(batch.movie) for batch in scored) == 84
        assert stream.stats()["cache_misses"] == 0


def test_what_does_not_fit_is_read_by_ranges_and_nothing_is_evicted_for_it(
    films: Any, tmp_path: Path
) -> None:
    largest = max(shard.n_bytes for shard in films.features.manifest.shards)
    with stream_of(films, tmp_path / "cache", 2 * (largest + 4096)) as stream:
        read_epoch(stream, films)
        kept = whole(tmp_path / "cache", films)
        assert len(kept) == 2
        second = read_epoch(stream, films)
    index = films.features.index
    inside = sum(films.features.shard_file(movie) in kept for movie in range(len(index)))
    assert second["cache_hits"] >= inside
    assert second["cache_misses"] >= 42 - inside
    assert second["cache_admitted_bytes"] == 0
    assert whole(tmp_path / "cache", films) == kept


def test_in_blocks_the_least_recently_used_shards_go(films: Any, tmp_path: Path) -> None:
    largest = max(shard.n_bytes for shard in films.features.manifest.shards)
    limit = 2 * (largest + 4096)
    with stream_of(
        films, tmp_path / "cache", limit, shuffle_block_shards=1, windows_per_movie=4
    ) as stream:
        epoch = read_epoch(stream, films, settle=True)
    assert epoch["cache_admitted_bytes"] == films.features.manifest.n_bytes
    assert epoch["cache_misses"] <= 6 * 3 * 4  # the batches that were under way with its first
    assert len(whole(tmp_path / "cache", films)) == 2


def test_a_lowered_limit_is_kept_from_the_start(films: Any, tmp_path: Path) -> None:
    with stream_of(films, tmp_path / "cache") as stream:
        read_epoch(stream, films)
    CacheFolder(tmp_path / "cache", 120_000)
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 120_000


def test_a_shard_that_is_evicted_while_it_is_open_is_read_by_ranges(
    films: Any, tmp_path: Path
) -> None:
    with stream_of(films, tmp_path / "cache") as stream:
        read_epoch(stream, films)
        CacheFolder(tmp_path / "cache", 1)  # another process with a lower limit
        epoch = read_epoch(stream, films)
        assert epoch["cache_misses"] > 0
        assert epoch["cache_hits"] + epoch["cache_misses"] == 44
        assert len(whole(tmp_path / "cache", films)) == 6  # admitted again


def test_what_a_killed_download_left_is_removed(films: Any, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    entry = f"{films.features.manifest.shards[0].sha256}.tar"
    (cache / f".tmp-{entry}").write_bytes(b"half of a shard")
    with stream_of(films, cache) as stream:
        read_epoch(stream, films)
    assert len(whole(cache, films)) == 6


def test_a_download_of_another_rank_is_left_alone(films: Any, tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path / "cache", None)
    shard = films.features.manifest.shards[0]
    admission = folder.begin(
        f"{shard.sha256}.tar", shard.n_bytes, keep=(), closing=threading.Event()
    )
    assert admission is not None
    with stream_of(films, folder.path) as stream:
        epoch = read_epoch(stream, films)
    assert epoch["cache_admitted_bytes"] == films.features.manifest.n_bytes - shard.n_bytes
    admission.close()
    assert len(whole(folder.path, films)) == 5


# --- faults ---------------------------------------------------------------------------------------


def test_a_shard_that_is_not_the_manifests_ends_in_one_line(films: Any, tmp_path: Path) -> None:
    shard = tmp_path / "set" / "features-00002.tar"
    data = bytearray(shard.read_bytes())
    data[-20_000] ^= 1  # behind the last member: no window shows it
    shard.write_bytes(data)
    with stream_of(films, tmp_path / "cache") as stream:
        said = ""
        for _ in range(2):
            try:
                for _ in stream:
                    settled(stream)
            except DataError as error:
                said = str(error)
    assert "features-00002.tar: got sha256 " in said
    assert said.endswith("run `movienet-shard verify`")
    assert "features-00002.tar" not in whole(tmp_path / "cache", films)


def test_on_a_full_disk_reading_goes_on_with_one_warning(
    films: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "cache", "160k"):
        with (
            caplog.at_level(logging.WARNING),
            stream_of(films, tmp_path / "cache", 10**9) as stream,
        ):
            read_epoch(stream, films)
            read_epoch(stream, films)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "No space left on device; going on without it" in caplog.text
        assert 1 <= len(whole(tmp_path / "cache", films)) <= 3


def test_a_reserve_of_the_disk_stays_free(films: Any, tmp_path: Path) -> None:
    with small_disk(tmp_path / "cache", "200k"):
        with stream_of(films, tmp_path / "cache") as stream:
            read_epoch(stream, films)
        disk = os.statvfs(tmp_path / "cache")
        assert disk.f_bavail >= 0.1 * disk.f_blocks
        assert len(whole(tmp_path / "cache", films)) >= 1


def test_a_folder_that_cannot_be_made_costs_a_warning(
    films: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with stream_of(films, tmp_path / "file" / "cache") as stream:
        assert stream.source is films.features.storage
        assert sum(1 for _ in stream) == 11
    assert "going on without it" in caplog.text


# --- which source serves --------------------------------------------------------------------------


def test_auto_caches_urls_on_the_nodes_disk_and_says_so(
    films: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path))
    config = StreamConfig(window=FRAMES, global_batch=4)
    assert cache_path(films.features, config) is None
    with nginx(tmp_path / "nginx", tmp_path / "set") as url, caplog.at_level(logging.INFO):
        remote = open_features(url, StorageConfig(timeout=20))
        with FeatureStream(remote, films.movies, config) as stream:
            read_epoch(stream, films)
            assert read_epoch(stream, films)["cache_misses"] == 0
    cache = tmp_path / f"movienet-stream-{os.geteuid()}"
    assert len(whole(cache, films)) == 6
    assert cache.stat().st_mode & 0o777 == 0o700
    first = caplog.records[0].getMessage()
    assert first.startswith(f"stream: reads {url} by ranges, and keeps whole shards in {cache}: ")


def test_off_is_off(films: Any) -> None:
    with stream_of(films, "off") as stream:
        assert stream.source is films.features.storage


# --- several ranks --------------------------------------------------------------------------------


def room(folder: Path) -> int | None:
    """Return what the folder takes; None if it changed meanwhile, so that nothing is certain."""

    def files() -> dict[str, tuple[int, int, int]]:
        found = {}
        for path in list(folder.iterdir()):
            status = path.stat()
            found[path.name] = (status.st_ino, status.st_size, 512 * status.st_blocks)
        return found

    try:
        before, after = files(), files()
    except FileNotFoundError:
        return None
    if {name: seen[0] for name, seen in before.items()} != {n: s[0] for n, s in after.items()}:
        return None
    return max(sum(seen[k] for seen in before.values()) for k in (1, 2))


@pytest.mark.parametrize("blocks", [0, 2])
def test_ranks_of_a_node_never_exceed_the_limit_together(
    films: Any, tmp_path: Path, blocks: int
) -> None:
    """Another process, this one, watches the folder all the time."""
    cache, limit, seen = tmp_path / "cache", 180_000, []
    (tmp_path / "run").mkdir()
    cache.mkdir()
    options = {
        "window": FRAMES,
        "global_batch": 6,
        "windows_per_movie": 3,
        "shuffle_block_shards": blocks,
    }
    stream = options | {"cache_dir": str(cache), "cache_bytes": limit}
    job = Job(str(tmp_path / "run"), str(tmp_path / "set"), stream, world=3, epochs=4)

    def watch() -> None:
        seen.append(room(cache))

    with rank_server() as ranks:
        assert ranks.run(job, watch) == [0, 0, 0], told(job)
    certain = [size for size in seen if size is not None]
    assert max(certain) <= limit
    assert max(certain) > limit / 2
    assert sum(rank["cache_hits"] for rank in stats(job)) > 0
    assert len(batches(tmp_path / "run")) == 4 * 21
    assert whole(cache, films)


def test_ranks_of_a_node_download_no_shard_twice(films: Any, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (tmp_path / "run").mkdir()
    stream = {"window": FRAMES, "global_batch": 6, "cache_dir": str(cache)}
    with nginx(tmp_path / "nginx", tmp_path / "set") as url, rank_server() as ranks:
        job = Job(str(tmp_path / "run"), url, stream, world=4, epochs=6)
        assert ranks.run(job) == [0, 0, 0, 0], told(job)
    told_bytes = sum(rank["cache_admitted_bytes"] for rank in stats(job))
    kept = whole(cache, films)
    sizes = {shard.name: shard.n_bytes for shard in films.features.manifest.shards}
    assert told_bytes == sum(sizes[name] for name in kept)
    assert len(kept) == 6
