"""The cache: never above its limit, never a corrupt shard, also with concurrent ranks."""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
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
from configs.runtime.hints import remember_arguments
from configs.schema import StorageConfig, StreamConfig
from sharding.__main__ import main as movienet_shard
from sharding.features import open_features
from tests.disks import small_disk
from tests.sharding.servers import nginx
from tests.training.ranks import TIMEOUT_S, Job, batches, errors, rank_server, stats
from training.stream import cache
from training.stream.cache import CacheFolder, Entry, cache_path, choose_victims, is_rolling
from training.stream.loader import FeatureStream, score_batches
from training.stream.view import View

pytestmark = pytest.mark.slow

N_ROWS = [200 + 31 * (movie % 7) for movie in range(42)]
WINDOW = 16


@pytest.fixture
def films(make_films: Callable[..., Any], tmp_path: Path) -> Any:
    """Six shards of 7 movies, about 50 kB each."""
    return make_films(N_ROWS, folder=tmp_path / "set")


def stream_of(films: Any, cache: Path | str, max_bytes: int | None = None, **more: Any) -> Any:
    options = {"window": WINDOW, "global_batch": 4, "threads": 2, "prefetch": 2} | more
    config = StreamConfig(cache_dir=str(cache), cache_bytes=max_bytes, **options)
    return FeatureStream(films.features, films.movies, config)


def read_epoch(stream: Any, films: Any, *, settle: bool = False) -> dict[str, float]:
    """Read the rest of the epoch, compare it with the published rows; return the new counts."""
    before = stream.stats()
    for batch in stream:
        places = zip(batch.movie.tolist(), batch.start.tolist(), strict=True)
        expected = np.stack([films.window(movie, start, WINDOW) for movie, start in places])
        np.testing.assert_array_equal(batch.features.numpy(), expected)
        if settle:
            settled(stream)
    settled(stream)
    return {name: value - before[name] for name, value in stream.stats().items()}


def settled(stream: Any) -> None:
    """Wait until no shard is being downloaded."""
    deadline = time.monotonic() + TIMEOUT_S
    while stream.source.admitting and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not stream.source.admitting


def cached(cache: Path, films: Any) -> list[str]:
    """Return the shards in the cache; the content of each must match its name."""
    names = {f"{shard.sha256}.tar": shard.name for shard in films.features.manifest.shards}
    for path in cache.iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem
    return sorted(names[path.name] for path in cache.iterdir())


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- eviction -------------------------------------------------------------------------------------

ENTRIES = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 5)), max_size=12).map(
    lambda rows: [Entry(f"e{k}", size, used) for k, (size, used) in enumerate(rows)]
)


@given(ENTRIES, st.integers(0, 80), st.integers(0, 200), st.sets(st.integers(0, 11)))
def test_eviction_frees_just_enough_least_recently_used_first(
    entries: list[Entry], need: int, limit: int, keep_numbers: set[int]
) -> None:
    keep = {f"e{k}" for k in keep_numbers}
    victims = choose_victims(entries, need=need, limit=limit, keep=keep)
    evictable = [entry for entry in entries if entry.name not in keep]
    total, most = (sum(e.n_bytes for e in some) for some in (entries, evictable))
    if victims is None:
        assert total - most + need > limit
        return
    freed = sum(victim.n_bytes for victim in victims)
    assert total - freed + need <= limit
    assert not victims or total - freed + victims[-1].n_bytes + need > limit
    assert victims == sorted(evictable, key=lambda e: (e.used_ns, e.name))[: len(victims)]


def test_shards_are_evicted_for_others_only_with_blocks_that_fit() -> None:
    sizes = [8192, 4096, 4096]
    assert not is_rolling(sizes, 0, 10**6)
    assert is_rolling(sizes, 2, 12_288)
    assert not is_rolling(sizes, 2, 12_287)


# --- one rank -------------------------------------------------------------------------------------


def test_the_second_epoch_is_read_from_the_cache_only(films: Any, tmp_path: Path) -> None:
    with stream_of(films, tmp_path / "cache") as stream:
        first, second = read_epoch(stream, films), read_epoch(stream, films)
    assert first["cache_hits"] + first["cache_misses"] == 44  # 42 windows and padding
    assert first["cache_admitted_bytes"] == films.features.manifest.n_bytes
    assert (second["cache_hits"], second["cache_misses"]) == (44, 0)
    assert second["cache_admitted_bytes"] == 0
    assert len(cached(tmp_path / "cache", films)) == 6


def test_a_later_run_reuses_the_cache_of_the_first(films: Any, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("fault", ["truncated", "grown", "a link"])
def test_an_entry_that_is_not_the_stored_file_is_replaced_before_its_first_use(
    films: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    folder = tmp_path / "cache"
    with stream_of(films, folder) as stream:
        read_epoch(stream, films)
    entry = sorted(folder.iterdir())[0]
    if fault == "a link":
        entry.unlink()
        entry.symlink_to("/dev/zero")
    else:
        os.truncate(entry, entry.stat().st_size + (1 if fault == "grown" else -1))
    with caplog.at_level(logging.WARNING), stream_of(films, folder) as stream:
        read_epoch(stream, films)
        assert read_epoch(stream, films)["cache_misses"] == 0
    assert f"cache {entry}: not the file that was stored; removed" in caplog.text
    assert Path("/dev/zero").is_char_device()


def test_a_damaged_entry_of_the_right_size_is_found_on_schedule_and_replaced(
    films: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cache, "_CHECK_DAYS", 1)
    folder = tmp_path / "cache"
    with stream_of(films, folder) as stream:
        read_epoch(stream, films)
    entry = sorted(folder.iterdir())[0]
    data = bytearray(entry.read_bytes())
    data[-1] ^= 1  # in the padding: no row of the epoch below is wrong
    entry.write_bytes(data)
    with caplog.at_level(logging.WARNING), stream_of(films, folder) as stream:
        read_epoch(stream, films)
        wait_until(lambda: f"cache {entry}: damaged, and removed" in caplog.text)
        read_epoch(stream, films)
    assert hashlib.sha256(entry.read_bytes()).hexdigest() == entry.stem


@given(number=st.integers(0, 10**6), day=st.integers(0, 10**5))
def test_each_entry_is_due_on_one_of_eight_days(number: int, day: int) -> None:
    assert sum(cache.is_due(number, 86_400.0 * (day + later)) for later in range(8)) == 1


def test_shards_that_do_not_fit_are_read_by_ranges_without_evicting_others(
    films: Any, tmp_path: Path
) -> None:
    largest = max(shard.n_bytes for shard in films.features.manifest.shards)
    with stream_of(films, tmp_path / "cache", 2 * (largest + 4096)) as stream:
        read_epoch(stream, films)
        shards = cached(tmp_path / "cache", films)
        assert len(shards) == 2
        second = read_epoch(stream, films)
    index = films.features.index
    n_cached = sum(films.features.shard_file(movie) in shards for movie in range(len(index)))
    assert second["cache_hits"] >= n_cached
    assert second["cache_misses"] >= 42 - n_cached
    assert second["cache_admitted_bytes"] == 0
    assert cached(tmp_path / "cache", films) == shards


def test_with_blocks_the_least_recently_used_shards_are_evicted(films: Any, tmp_path: Path) -> None:
    largest = max(shard.n_bytes for shard in films.features.manifest.shards)
    limit = 2 * (largest + 4096)
    with stream_of(
        films, tmp_path / "cache", limit, shuffle_block_shards=1, windows_per_movie=4
    ) as stream:
        epoch = read_epoch(stream, films, settle=True)
    assert epoch["cache_admitted_bytes"] == films.features.manifest.n_bytes
    assert epoch["cache_misses"] <= 6 * 3 * 4  # per shard, the batches read with its first one
    assert len(cached(tmp_path / "cache", films)) == 2


def test_a_lowered_limit_is_enforced_when_the_folder_is_opened(films: Any, tmp_path: Path) -> None:
    with stream_of(films, tmp_path / "cache") as stream:
        read_epoch(stream, films)
    CacheFolder(tmp_path / "cache", 120_000)
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 120_000


def test_a_shard_evicted_while_it_is_open_is_read_by_ranges(films: Any, tmp_path: Path) -> None:
    with stream_of(films, tmp_path / "cache") as stream:
        read_epoch(stream, films)
        CacheFolder(tmp_path / "cache", 1)  # another process with a lower limit
        epoch = read_epoch(stream, films)
        assert epoch["cache_misses"] > 0
        assert epoch["cache_hits"] + epoch["cache_misses"] == 44
        assert len(cached(tmp_path / "cache", films)) == 6  # admitted again


def test_the_partial_file_of_a_killed_download_is_removed(films: Any, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    entry = f"{films.features.manifest.shards[0].sha256}.tar"
    (cache / f".tmp-{entry}").write_bytes(b"half of a shard")
    with stream_of(films, cache) as stream:
        read_epoch(stream, films)
    assert len(cached(cache, films)) == 6


def test_files_of_the_user_in_the_folder_are_neither_counted_nor_evicted(
    films: Any, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    mine = {".tmp-notes", "thesis.tar", "thesis.txt"}
    for name in mine:
        (cache / name).write_bytes(bytes(100_000))
    limit = 2 * (max(shard.n_bytes for shard in films.features.manifest.shards) + 4096)
    with stream_of(films, cache, limit) as stream:
        read_epoch(stream, films)
    CacheFolder(cache, 1)
    assert {path.name for path in cache.iterdir()} == mine


def test_a_download_of_another_rank_is_not_touched(films: Any, tmp_path: Path) -> None:
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
    assert len(cached(folder.path, films)) == 5


# --- faults ---------------------------------------------------------------------------------------


def corrupt_shard_error(films: Any, tmp_path: Path) -> str:
    """Corrupt a byte that no window reads; return the message of the cache."""
    shard = tmp_path / "set" / "features-00002.tar"
    data = bytearray(shard.read_bytes())
    data[-20_000] ^= 1  # after the last member
    shard.write_bytes(data)
    message = ""
    with stream_of(films, tmp_path / "cache") as stream:
        for _ in range(2):
            try:
                for _ in stream:
                    settled(stream)
            except DataError as error:
                message = str(error)
    return message


def test_a_shard_that_differs_from_the_manifest_is_reported_in_one_line(
    films: Any, tmp_path: Path
) -> None:
    message = corrupt_shard_error(films, tmp_path)
    assert "features-00002.tar: got sha256 " in message
    assert "\n" not in message
    assert "features-00002.tar" not in cached(tmp_path / "cache", films)


def test_the_command_in_the_message_of_a_corrupt_shard_runs_as_printed(
    films: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "my.yaml"
    config.write_text(Path("configs/demo.yaml").read_text())
    remember_arguments(str(config), ["storage.timeout=5"])
    try:
        message = corrupt_shard_error(films, tmp_path)
        command = shlex.split(message.partition("run `")[2].removesuffix("`"))
        assert command[0] == "movienet-shard"
        assert command[-1] == "storage.timeout=5"
        assert movienet_shard(command[1:]) == 1
    finally:
        remember_arguments(None, [])
    assert "features-00002.tar" in capsys.readouterr().out


def test_on_a_full_disk_training_continues_with_one_warning(
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
        assert "No space left on device; continuing without a cache" in caplog.text
        assert 1 <= len(cached(tmp_path / "cache", films)) <= 3


def test_without_a_limit_a_tenth_of_the_disk_remains_free(films: Any, tmp_path: Path) -> None:
    with small_disk(tmp_path / "cache", "200k"):
        with stream_of(films, tmp_path / "cache") as stream:
            read_epoch(stream, films)
        disk = os.statvfs(tmp_path / "cache")
        assert disk.f_bavail >= 0.1 * disk.f_blocks
        assert len(cached(tmp_path / "cache", films)) >= 1


def test_without_a_cache_folder_training_continues_with_a_warning(
    films: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with stream_of(films, tmp_path / "file" / "cache") as stream:
        assert stream.source is films.features.storage
        assert sum(1 for _ in stream) == 11
    assert "continuing without a cache" in caplog.text


# --- opening a cache ------------------------------------------------------------------------------


def test_auto_caches_urls_on_the_disk_of_the_node_and_logs_it(
    films: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path))
    config = StreamConfig(window=WINDOW, global_batch=4)
    assert cache_path(films.features, config) is None
    with nginx(tmp_path / "nginx", tmp_path / "set") as url, caplog.at_level(logging.INFO):
        remote = open_features(url, StorageConfig(timeout=20))
        with FeatureStream(remote, films.movies, config) as stream:
            read_epoch(stream, films)
            assert read_epoch(stream, films)["cache_misses"] == 0
    cache = tmp_path / f"movienet-stream-{os.geteuid()}"
    assert len(cached(cache, films)) == 6
    assert cache.stat().st_mode & 0o777 == 0o700
    first = caplog.records[0].getMessage()
    assert first.startswith(f"stream: reading {url} by ranged requests, caching shards in {cache} ")


def test_off_disables_the_cache(films: Any) -> None:
    with stream_of(films, "off") as stream:
        assert stream.source is films.features.storage


# --- several ranks --------------------------------------------------------------------------------


def used_bytes(folder: Path) -> int | None:
    """Return the size of the folder; None if it changed while it was measured."""

    def files() -> dict[str, tuple[int, int, int]]:
        sizes = {}
        for path in list(folder.iterdir()):
            status = path.stat()
            sizes[path.name] = (status.st_ino, status.st_size, 512 * status.st_blocks)
        return sizes

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
    """This process measures the folder continuously."""
    cache, limit, sizes = tmp_path / "cache", 180_000, []
    (tmp_path / "run").mkdir()
    cache.mkdir()
    options = {
        "window": WINDOW,
        "global_batch": 6,
        "windows_per_movie": 3,
        "shuffle_block_shards": blocks,
    }
    stream = options | {"cache_dir": str(cache), "cache_bytes": limit}
    job = Job(str(tmp_path / "run"), str(tmp_path / "set"), stream, world=3, epochs=4)

    def watch() -> None:
        sizes.append(used_bytes(cache))

    with rank_server() as ranks:
        assert ranks.run(job, watch) == [0, 0, 0], errors(job)
    reliable = [size for size in sizes if size is not None]
    assert max(reliable) <= limit
    assert max(reliable) > limit / 2
    assert sum(rank["cache_hits"] for rank in stats(job)) > 0
    assert len(batches(tmp_path / "run")) == 4 * 21
    assert cached(cache, films)


def test_ranks_of_a_node_download_no_shard_twice(films: Any, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (tmp_path / "run").mkdir()
    stream = {"window": WINDOW, "global_batch": 6, "cache_dir": str(cache)}
    with nginx(tmp_path / "nginx", tmp_path / "set") as url, rank_server() as ranks:
        job = Job(str(tmp_path / "run"), url, stream, world=4, epochs=6)
        assert ranks.run(job) == [0, 0, 0, 0], errors(job)
    downloaded = sum(rank["cache_admitted_bytes"] for rank in stats(job))
    shards = cached(cache, films)
    sizes = {shard.name: shard.n_bytes for shard in films.features.manifest.shards}
    assert downloaded == sum(sizes[name] for name in shards)
    assert len(shards) == 6
