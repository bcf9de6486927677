"""Published shards are readable by common tools: webdataset, numpy and GNU tar."""

from __future__ import annotations

import json
import subprocess
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from tests.end_to_end.pipeline import Pipeline

pytestmark = [
    pytest.mark.slow,
    # webdataset relies on the garbage collector to close its files.
    pytest.mark.filterwarnings("ignore:.*:pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
]


def samples(shard: Path) -> list[dict[str, Any]]:
    """Return every sample of a shard as the webdataset library reads it, with fields as bytes."""
    dataset = webdataset.WebDataset(str(shard), shardshuffle=False)
    return [dict(sample) for sample in dataset]


def images_of_the_dump(dump: Path) -> dict[str, bytes]:
    """Return the image bytes of each expected sample, by key."""
    images: dict[str, bytes] = {}
    for source in sorted(dump.iterdir()):
        if source.is_dir():
            files = {file.name: file.read_bytes() for file in source.iterdir()}
        else:
            with tarfile.open(source) as tar:
                members = [member for member in tar if member.isfile()]
                files = {Path(m.name).name: tar.extractfile(m).read() for m in members}  # type: ignore[union-attr]
        images |= {f"{source.stem}/{Path(name).stem}": data for name, data in files.items()}
    return images


def test_webdataset_reads_every_frame_sample_with_the_bytes_of_the_dump(demo_data: Path) -> None:
    read = {
        sample["__key__"]: sample
        for shard in sorted((demo_data / "frames").glob("*.tar"))
        for sample in samples(shard)
    }
    expected = images_of_the_dump(demo_data / "dump" / "240P")
    assert {key: sample["jpg"] for key, sample in read.items()} == expected
    fields = {field for sample in read.values() for field in sample if not field.startswith("__")}
    assert fields == {"jpg"}


def test_webdataset_reads_every_field_of_every_feature_sample(demo_data: Path) -> None:
    split = json.loads((demo_data / "dump" / "split.json").read_text())
    images = images_of_the_dump(demo_data / "dump" / "240P")
    seen = []
    for shard in sorted((demo_data / "features" / "demo").glob("*.tar")):
        for sample in samples(shard):
            movie = sample["__key__"]
            features = np.load(BytesIO(sample["features.npy"]))
            shots = np.load(BytesIO(sample["shots.npy"]))
            info = json.loads(sample["json"])
            keys = sorted(key for key in images if key.startswith(f"{movie}/"))
            assert features.dtype == np.float16
            assert features.shape == (len(keys), 64)
            assert np.isfinite(features).all()
            assert shots.tolist() == [int(key.split("_")[1]) for key in keys]
            assert info["images"] == len(keys)
            seen.append(movie)
    assert sorted(seen) == sorted(movie for movies in split.values() for movie in movies)


def test_gnu_tar_lists_every_shard(demo_data: Path) -> None:
    shards = sorted(demo_data.glob("f*/**/*.tar"))
    assert {shard.parent.name for shard in shards} == {"frames", "demo"}
    for shard in shards:
        listed = subprocess.run(
            ["tar", "--list", "--file", str(shard)], capture_output=True, text=True, check=True
        )
        assert listed.stderr == ""
        with tarfile.open(shard) as tar:
            assert listed.stdout.split() == tar.getnames()


def test_two_ranks_encode_to_the_same_bytes_as_one(demo: Pipeline) -> None:
    demo.run("encoders", "run", "encoder.name=pair", ranks=2)
    demo_data = demo.folder / "demo-data"
    one, two = demo_data / "features" / "demo", demo_data / "features" / "pair"
    shards = sorted(path.name for path in one.glob("*.tar"))
    assert shards == sorted(path.name for path in two.glob("*.tar"))
    for name in shards:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    manifests = [(folder / "manifest.json").read_bytes() for folder in (one, two)]
    assert manifests[0] == manifests[1]
