"""webdataset and GNU tar read published sets."""

from __future__ import annotations

import importlib
import io
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sharding.storage.local import DiskStorage
from tests.sharding.feature_sets import make_features, movie_features
from tests.sharding.films import build_all, film, write_folder, write_tar

pytestmark = pytest.mark.slow

# webdataset leaves closing its files to the garbage collector.
UNCLOSED = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def photo(key: int) -> bytes:
    pixels = np.random.default_rng(key).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@UNCLOSED
def test_webdataset_reads_every_sample_and_field_of_frame_shards(tmp_path: Path) -> None:
    webdataset: Any = importlib.import_module("webdataset")
    films: dict[str, dict[str, bytes]] = {}
    writers: list[Callable[..., None]] = [write_folder, write_tar, write_tar]
    for k, write in enumerate(writers):
        movie = f"tt{k:07d}"
        names = film(movie, shots=3)
        films[movie] = {name: photo(100 * k + j) for j, name in enumerate(names)}
        write(tmp_path / "dump", movie, films[movie])
    build_all(DiskStorage(tmp_path / "set"), tmp_path / "dump", shard_bytes=10_000)
    shards = sorted(str(path) for path in (tmp_path / "set").glob("*.tar"))
    assert len(shards) > 1
    samples: dict[str, Any] = {
        sample["__key__"]: sample for sample in webdataset.WebDataset(shards, shardshuffle=False)
    }
    expected = {
        f"{movie}/{name.removesuffix('.jpg')}": data
        for movie, images in films.items()
        for name, data in images.items()
    }
    assert {key: sample["jpg"] for key, sample in samples.items()} == expected
    assert list(samples) == sorted(expected)
    for sample in webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8"):
        assert sample["jpg"].shape == (6, 8, 3)


@UNCLOSED
def test_webdataset_reads_every_sample_and_field_of_feature_shards(tmp_path: Path) -> None:
    webdataset: Any = importlib.import_module("webdataset")
    make_features(DiskStorage(tmp_path))
    shards = sorted(str(path) for path in tmp_path.glob("*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    assert len(samples) == 7
    for k, sample in enumerate(samples):
        movie = movie_features(k)
        fields = {name for name in sample if not name.startswith("__")}
        assert (sample["__key__"], fields) == (movie.movie, {"features.npy", "shots.npy", "json"})
        np.testing.assert_array_equal(sample["features.npy"], movie.features_ND, strict=True)
        np.testing.assert_array_equal(sample["shots.npy"], movie.shots_N, strict=True)
        rejected = ["shot_0009_img_0.jpg"]
        assert sample["json"] == {"id": movie.movie, "images": movie.images, "rejected": rejected}


def test_gnu_tar_lists_frame_shards_and_extracts_the_bytes_of_the_dump(tmp_path: Path) -> None:
    write_tar(tmp_path / "dump", "tt0032138", film("tt0032138"))
    build_all(DiskStorage(tmp_path), tmp_path / "dump")
    shard = tmp_path / "frames-00000.tar"
    listing = subprocess.run(
        ["tar", "-tvf", shard],
        env=os.environ | {"TZ": "UTC", "LC_ALL": "C"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert listing.stderr == ""
    lines = [line.split() for line in listing.stdout.splitlines()]
    assert [line[5] for line in lines] == [f"tt0032138/{name}" for name in film("tt0032138")]
    assert {tuple(line[:2] + line[3:5]) for line in lines} == {
        ("-rw-r--r--", "0/0", "1970-01-01", "00:00")
    }
    subprocess.run(["tar", "-C", tmp_path, "-xf", shard], check=True)
    for name, data in film("tt0032138").items():
        assert (tmp_path / "tt0032138" / name).read_bytes() == data
