from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import DataError
from sharding.dump import archives as dump_module
from sharding.dump.archives import open_source
from sharding.dump.scan import find_sources, read_movies
from sharding.storage.memory import MemoryStorage
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
def test_a_source_that_is_gone_is_told(tmp_path: Path, write: Write) -> None:
    write(tmp_path, MOVIE, film(MOVIE))
    (movie,) = read_movies(tmp_path)
    (tmp_path / movie.source).rename(tmp_path / ".gone")
    with (
        pytest.raises(DataError, match="gone since it was planned; run plan --replace"),
        open_source(tmp_path, movie.source),
    ):
        pass


def test_a_cut_tar_is_told_with_its_bytes(tmp_path: Path) -> None:
    path = one_tar(tmp_path, MOVIES)
    path.write_bytes(path.read_bytes()[:5000])
    expect_one_line(path, r"movies\.tar: got 5000 bytes, want at least \d+; the tar is truncated")


def test_a_tar_that_is_cut_inside_a_zip_names_both(tmp_path: Path) -> None:
    cut = tar_bytes(MOVIES["tt1"])[:1400]
    path = put(tmp_path / "movies.zip", zip_bytes({"tt1.tar": cut}))
    expect_one_line(
        path, r"movies\.zip::tt1\.tar: got 1400 bytes, want at least \d+; the tar is truncated"
    )


def test_a_zip_that_changes_after_the_plan_is_refused(tmp_path: Path) -> None:
    path = zip_of_images(tmp_path, MOVIES)
    (movie, *_) = read_movies(path)
    os.utime(path, ns=(10**18, 10**18 + 1))
    with open_source(path, movie.source) as source:
        assert source.fingerprint != movie.fingerprint


def test_a_source_that_is_gone_from_a_dump_is_told(tmp_path: Path) -> None:
    path = zip_of_tars(tmp_path, MOVIES)
    with (
        pytest.raises(DataError, match="no 240P/tt9 in it any more; run plan --replace"),
        open_source(path, "::240P/tt9"),
    ):
        pass
    path.unlink()
    with (
        pytest.raises(DataError, match="gone since it was planned; run plan --replace"),
        open_source(path, "::240P/tt1.tar"),
    ):
        pass


def test_the_listing_of_a_large_archive_is_kept_beside_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {f"shot_{k:04d}_img_0.jpg": b"" for k in range(10_000)}
    path = put(tmp_path / "movies.zip", zip_bytes(below("", {"tt1": film("tt1"), "tt2": small})))
    cache = MemoryStorage()
    found = find_sources(path, cache)
    (name,) = cache.names()
    assert name.startswith("listing-")
    assert cache.size(name) < 5000  # type: ignore[operator]

    dump_module._listings.clear()
    monkeypatch.setattr(dump_module, "_list_zip", None)
    assert find_sources(path, cache) == found
    with open_source(path, "::tt1", cache) as source:
        assert len(source.images) == 6


def test_a_small_archive_leaves_no_listing_behind(tmp_path: Path) -> None:
    cache = MemoryStorage()
    read_movies(zip_of_images(tmp_path, MOVIES), cache=cache)
    assert cache.names() == []
