from __future__ import annotations

import logging
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import DataError
from sharding.__main__ import main
from sharding.dump import archives
from sharding.dump.archives import open_source
from sharding.dump.scan import find_sources, read_movies
from sharding.storage.memory import MemoryStorage
from tests.sharding.conftest import Run
from tests.sharding.dump.deliveries import (
    MOVIES,
    below,
    expect_one_line,
    one_tar,
    put,
    tar_bytes,
    zip_bytes,
    zip_of_images,
    zip_of_tars,
)
from tests.sharding.films import film, write_folder, write_tar

MOVIE = "tt0032138"
Write = Callable[..., None]


@pytest.mark.parametrize("write", [write_folder, write_tar])
def test_a_planned_source_that_no_longer_exists_is_named(tmp_path: Path, write: Write) -> None:
    write(tmp_path, MOVIE, film(MOVIE))
    (movie,) = read_movies(tmp_path)
    (tmp_path / movie.source).rename(tmp_path / ".hidden")
    with (
        pytest.raises(
            DataError, match=rf"{movie.source}: planned, but no longer exists; restore it"
        ),
        open_source(tmp_path, movie.source),
    ):
        pass


def test_the_hint_of_a_missing_source_works_when_it_is_pasted(tmp_path: Path, run: Run) -> None:
    assert run("plan")[0] == 0
    (tmp_path / "dump" / "tt0000001.tar").unlink()
    code, _, err = run("build")
    assert code == 1
    hint = re.search(
        r"tt0000001\.tar: planned, but no longer exists; restore it, or run `(.*)`", err
    )
    assert hint is not None
    program, *arguments = shlex.split(hint[1])
    assert program == "movienet-shard"
    assert main(arguments) == 0
    assert run("build")[0] == 0


def test_a_truncated_tar_is_reported_with_its_size(tmp_path: Path) -> None:
    path = one_tar(tmp_path, MOVIES)
    path.write_bytes(path.read_bytes()[:5000])
    expect_one_line(path, r"movies\.tar: got 5000 bytes, want at least \d+; the tar is truncated")


def test_a_truncated_tar_in_a_zip_is_reported_with_the_names_of_both(tmp_path: Path) -> None:
    truncated = tar_bytes(MOVIES["tt1"])[:1400]
    path = put(tmp_path / "movies.zip", zip_bytes({"tt1.tar": truncated}))
    expect_one_line(
        path, r"movies\.zip::tt1\.tar: got 1400 bytes, want at least \d+; the tar is truncated"
    )


def test_a_zip_that_changes_has_another_fingerprint(tmp_path: Path) -> None:
    path = zip_of_images(tmp_path, MOVIES)
    (movie, *_) = read_movies(path)
    os.utime(path, ns=(10**18, 10**18 + 1))
    with open_source(path, movie.source) as source:
        assert source.fingerprint != movie.fingerprint


def test_a_planned_source_that_is_no_longer_in_its_archive_is_named(tmp_path: Path) -> None:
    path = zip_of_tars(tmp_path, MOVIES)
    with (
        pytest.raises(
            DataError, match=r"movies\.zip: 240P/tt9 was planned, but is no longer in it"
        ),
        open_source(path, "::240P/tt9"),
    ):
        pass
    path.unlink()
    with (
        pytest.raises(DataError, match=r"movies\.zip: planned, but no longer exists"),
        open_source(path, "::240P/tt1.tar"),
    ):
        pass


def test_the_listing_of_a_large_archive_is_cached_with_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {f"shot_{k:04d}_img_0.jpg": b"" for k in range(10_000)}
    path = put(tmp_path / "movies.zip", zip_bytes(below("", {"tt1": film("tt1"), "tt2": small})))
    cache = MemoryStorage()
    sources = find_sources(path, cache)
    (name,) = cache.names()
    assert name.startswith("listing-")
    assert cache.size(name) < 5000  # type: ignore[operator]

    archives._listings.clear()
    monkeypatch.setattr(archives, "_list_zip", None)
    assert find_sources(path, cache) == sources
    with open_source(path, "::tt1", cache) as source:
        assert len(source.images) == 6


@pytest.mark.parametrize("damaged", [b"", b"PK", b"half"])
def test_a_damaged_cache_of_a_listing_is_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: bytes
) -> None:
    small = {f"shot_{k:04d}_img_0.jpg": b"" for k in range(10_000)}
    path = put(tmp_path / "movies.zip", zip_bytes(below("", {"tt1": small})))
    cache = MemoryStorage()
    sources = find_sources(path, cache)
    (name,) = cache.names()
    intact = cache.read(name)
    cache.files[name] = intact[: len(intact) // 2] if damaged == b"half" else damaged

    archives._listings.clear()
    assert find_sources(path, cache) == sources
    assert cache.read(name) == intact
    assert "the archive is listed again" in caplog.text


@pytest.mark.parametrize(
    ("archive", "line"),
    [
        (zip_of_images, r"listing the \d+ members of .*movies\.zip"),
        (one_tar, r"listing the members of .*movies\.tar: all their headers are read"),
    ],
)
def test_a_long_listing_is_announced(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    archive: Callable[..., Path],
    line: str,
) -> None:
    monkeypatch.setattr(archives, "_SLOW_MEMBERS", 1)
    monkeypatch.setattr(archives, "_SLOW_BYTES", 1)
    with caplog.at_level(logging.INFO):
        find_sources(archive(tmp_path, MOVIES))
    assert re.search(line, caplog.text)


def test_the_listing_of_a_small_archive_is_not_cached(tmp_path: Path) -> None:
    cache = MemoryStorage()
    read_movies(zip_of_images(tmp_path, MOVIES), cache=cache)
    assert cache.names() == []
