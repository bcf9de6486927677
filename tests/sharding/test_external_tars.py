"""External feature tars are checked when they are opened and read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from configs.errors import DataError
from sharding.features import open_features
from tests.sharding.external_films import config_of, indexed, make_rows, rows_of, write
from tests.sharding.servers import faulty_server, nginx, rule

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("change", ["size", "time", "missing"])
def test_a_changed_tar_is_reported_in_one_line(tmp_path: Path, change: str) -> None:
    write(tmp_path / "tars", make_rows())
    config = config_of(tmp_path, str(tmp_path / "tars"))
    indexed(config)
    tar = tmp_path / "tars" / "clip-001.tar"
    if change == "size":
        tar.write_bytes(tar.read_bytes() + bytes(10_240))
    elif change == "time":
        os.utime(tar, ns=(0, tar.stat().st_mtime_ns + 1))
    else:
        tar.unlink()
    with pytest.raises(DataError) as caught:
        open_features(config.features_dir)
    line = {
        "size": "bytes, want",
        "time": "same size, but another modification time or ETag",
        "missing": "no file clip-001.tar",
    }[change]
    assert line in str(caught.value)
    assert "clip-001.tar" in str(caught.value)
    if change != "missing":
        assert "run `movienet-shard index-tars --config" in str(caught.value)
        indexed(config)  # replaces the old index


def test_a_changed_object_is_detected_by_its_etag(tmp_path: Path) -> None:
    write(tmp_path / "tars", make_rows())
    with nginx(tmp_path / "nginx", tmp_path / "tars") as upstream, faulty_server(upstream) as url:
        config = config_of(tmp_path, f"{url}/clip-{{000..002}}.tar")
        indexed(config)
        rule(url, {"do": "other version"})
        with pytest.raises(DataError, match=r"changed since it was indexed: same size"):
            open_features(config.features_dir, config.storage)


@pytest.mark.parametrize("dtype", ["<f2", "<f4"])
def test_a_movie_of_external_tars_has_float16_rows_and_unknown_shots(
    tmp_path: Path, dtype: str
) -> None:
    rows = make_rows(dtype=dtype)
    write(tmp_path / "tars", rows)
    features = indexed(config_of(tmp_path, str(tmp_path / "tars")))
    movie = features["tt0000003"]
    np.testing.assert_array_equal(movie.features_ND, rows["tt0000003"].astype(np.float16))
    assert movie.shots_N.tolist() == [-1] * len(rows["tt0000003"])
    assert repr(features).startswith("<FeatureSet 'foreign': 11 movies, ")


def test_numbers_beyond_float16_are_reported_with_tar_and_byte(tmp_path: Path) -> None:
    write(tmp_path / "tars", {"tt0000001": np.full((4, 3), 7.0)})
    features = indexed(config_of(tmp_path, str(tmp_path / "tars")))
    tar = tmp_path / "tars" / "clip-000.tar"
    with tar.open("r+b") as file:  # the modification time was compared when the set was opened
        file.seek(int(features.index.offset[0]) * 4)
        file.write(np.full(12, 70_000.0).tobytes())
    with pytest.raises(DataError, match=r"clip-000.tar: got numbers above 65,504 at byte \d+,"):
        rows_of(features)
