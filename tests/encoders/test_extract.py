from __future__ import annotations

import io
import json
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import open_clip
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from configs.errors import DataError
from configs.schema import Config
from encoders.extract import EncodeStats, Extractor
from encoders.input_pipeline import Batch
from encoders.registry import pick_device
from encoders.task import open_stage, run_task
from sharding.features import open_features
from sharding.frames import open_frames
from sharding.shard import read_sidecar
from sharding.storage.local import DiskStorage
from sharding.storage.open import open_storage
from tests.disks import small_disk
from tests.encoders.conftest import Build, Configure, digest, inodes

pytestmark = pytest.mark.slow


def read_rows(config: Config) -> dict[str, tuple[NDArray[np.float16], NDArray[np.int32]]]:
    """Rows and shots of each movie, read from the tars."""
    arrays: dict[str, NDArray[Any]] = {}
    for path in sorted(Path(config.features_dir).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".npy") and (file := tar.extractfile(member)):
                    arrays[member.name] = np.load(io.BytesIO(file.read()))
    ids = [name.removesuffix(".shots.npy") for name in arrays if name.endswith(".shots.npy")]
    return {movie: (arrays[f"{movie}.features.npy"], arrays[f"{movie}.shots.npy"]) for movie in ids}


def read_info(config: Config, movie: str) -> dict[str, Any]:
    """``MOVIE.json``, from the tar that contains it."""
    for path in Path(config.features_dir).glob("*.tar"):
        with tarfile.open(path) as tar:
            if f"{movie}.json" in tar.getnames() and (file := tar.extractfile(f"{movie}.json")):
                return dict(json.load(file))
    raise AssertionError(f"no tar contains {movie}.json")


def of_open_clip(config: Config, movie: str) -> torch.Tensor:
    """Features of a movie by OpenCLIP alone: PIL images, OpenCLIP's transform, one by one."""
    open_clip.add_model_config(config.encoder.model)
    torch.manual_seed(config.encoder.seed)
    model = open_clip.create_model(Path(config.encoder.model).stem).eval()
    transform = open_clip.image_transform(32, is_train=False)
    images = sorted((Path(str(config.data.dump)) / movie).glob("*.jpg"))
    with torch.inference_mode():
        return torch.cat([model.encode_image(transform(Image.open(i))[None]) for i in images])


def spoil(image: Path) -> None:
    """Overwrite a JPEG with zeros, apart from its first and last bytes."""
    data = image.read_bytes()
    image.write_bytes(data[:3] + bytes(len(data) - 5) + data[-2:])


def test_features_equal_those_of_open_clip_in_the_order_of_the_dump(config: Config) -> None:
    digest(run_task(config))
    for movie, (features, shots) in read_rows(config).items():
        want = of_open_clip(config, movie)
        got = torch.from_numpy(features.astype(np.float32))
        assert torch.cosine_similarity(got, want).min() > 0.9999
        assert shots.tolist() == sorted([*range(len(want) // 3)] * 3)


def test_the_batch_size_changes_only_the_last_bits_of_features(
    config: Config, configure: Configure
) -> None:
    other = configure("encoder.name=other", "encoder.batch_size=5")
    run_task(config)
    run_task(other)
    rows, other_rows = read_rows(config), read_rows(other)
    for movie in rows:
        difference = rows[movie][0].astype(np.float32) - other_rows[movie][0]
        assert np.abs(difference).max() < 1e-2


def test_normalised_rows_have_length_one(config: Config, configure: Configure) -> None:
    run_task(configure("encoder.normalize=true"))
    for features, _ in read_rows(config).values():
        lengths = np.linalg.norm(features.astype(np.float32), axis=1)
        assert np.abs(lengths - 1).max() < 1e-3


def test_an_undecodable_image_gets_no_row_and_is_listed(
    configure: Configure, dump: Path, build: Build
) -> None:
    spoil(dump / "tt0000002" / "shot_0004_img_1.jpg")
    config = configure("encoder.max_bad_fraction=0.5")
    build(config)
    outcome = run_task(config)
    assert outcome.encoded.rejected == 1
    features, shots = read_rows(config)["tt0000002"]
    assert len(features) == 26
    assert shots.tolist().count(4) == 2
    listed = [
        (rejected.movie, rejected.member, rejected.reason)
        for number in range(len(outcome.manifest.shards if outcome.manifest else ()))
        if (sidecar := read_sidecar(open_storage(config.features_dir), "features", number))
        for rejected in sidecar.rejected
    ]
    assert listed == [("tt0000002", "shot_0004_img_1.jpg", "not a picture")]
    assert read_info(config, "tt0000002")["rejected"] == ["shot_0004_img_1.jpg"]


def test_a_rejected_image_does_not_change_the_rows_of_others(
    config: Config, configure: Configure, dump: Path, build: Build
) -> None:
    run_task(config)
    rows = read_rows(config)["tt0000002"][0]
    spoil(dump / "tt0000002" / "shot_0004_img_1.jpg")
    other = configure("encoder.max_bad_fraction=0.5", f"data.root={dump.parent / 'other'}")
    build(other)
    run_task(other)
    assert np.array_equal(read_rows(other)["tt0000002"][0], np.delete(rows, 13, axis=0))


def test_too_many_bad_images_fail_their_shard_in_one_line(
    configure: Configure, dump: Path, build: Build
) -> None:
    spoil(dump / "tt0000001" / "shot_0000_img_0.jpg")
    config = configure()
    build(config)
    with pytest.raises(DataError, match=r"encoder\.max_bad_fraction 0\.01; first: tt0000001"):
        run_task(config)
    assert not (Path(config.features_dir) / "manifest.json").exists()
    names = [path.name for path in sorted(Path(config.features_dir).glob("*.tar"))]
    assert names == [f"features-0000{shard}.tar" for shard in range(1, 5)], "the others are done"


class SlowStorage(DiskStorage):
    """Storage that holds back the first tar until ``released`` is set."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.started, self.released = threading.Event(), threading.Event()

    @contextmanager
    def publishing(self, name: str, *, replace: bool = False) -> Iterator[BinaryIO]:
        with super().publishing(name, replace=replace) as file:
            yield file
            self.started.set()
            assert self.released.wait(30)


def test_the_tower_encodes_while_a_shard_is_being_published(config: Config) -> None:
    stage = open_stage(config, torch.device("cpu"))
    storage = SlowStorage(Path(config.features_dir))
    extractor = Extractor(
        *(config.encoder, stage.plan, stage.tower, stage.device),
        frames=open_frames(config.frames_dir),
        features=storage,
    )
    seen: list[Batch] = []

    def watch(batch: Batch) -> bool:
        seen.append(batch)
        if len(seen) == 3:  # the first shard has one batch, which is collected one batch later
            assert storage.started.wait(30)
            storage.released.set()
        return True

    extractor.run(range(extractor.n_shards), watch)
    assert extractor.done.shards == 5
    assert len(list(Path(config.features_dir).glob("*.tar"))) == 5


def test_the_summary_names_the_bottleneck_and_what_helps_in_80_columns() -> None:
    starved = EncodeStats(images=10, seconds=10, waited=4, in_tower=5).lines()
    assert starved[-2:] == (
        "waited for data 40%, in the tower 50% of the time",
        "bottleneck: data; add encoder.decode_threads and cores, or use faster storage",
    )
    busy = EncodeStats(
        shards=12_345, images=12_345_678, rejected=12_345, by_pillow=123_456, seconds=10, waited=1
    ).lines()
    assert busy[-1] == "bottleneck: tower; add devices, or raise encoder.batch_size in a new set"
    assert max(map(len, [*starved, *busy])) <= 80
    assert EncodeStats().lines() == ("encoded 0 shards, 0 images, 0 images/s",)


def test_a_dropped_shard_is_not_published(config: Config) -> None:
    stage = open_stage(config, pick_device("cpu"))
    extractor = Extractor(
        *(config.encoder, stage.plan, stage.tower, stage.device),
        frames=open_frames(config.frames_dir),
        features=stage.features,
    )
    extractor.run([1, 0], lambda _batch: False)
    assert not list(Path(config.features_dir).glob("*.tar"))


def test_of_two_concurrent_attempts_at_a_shard_the_first_published_is_kept(config: Config) -> None:
    stage = open_stage(config, pick_device("cpu"))
    extractor = Extractor(
        *(config.encoder, stage.plan, stage.tower, stage.device),
        frames=open_frames(config.frames_dir),
        features=stage.features,
    )
    published: dict[str, tuple[int, int]] = {}

    def other_is_faster(_batch: Batch) -> bool:
        if not published:
            run_task(config)
            published.update(inodes(config))
        return True

    extractor.run(range(stage.plan.n_shards), other_is_faster)
    assert extractor.done.shards == 0
    assert inodes(config) == published
    assert open_features(config.features_dir)


def test_a_full_disk_ends_the_task_and_leaves_no_partial_file(config: Config) -> None:
    folder = Path(config.features_dir)
    with small_disk(folder, "1m"):
        stage = open_stage(config, pick_device("cpu"))
        subprocess.run(["mount", "-o", "remount,size=20k", str(folder)], check=True)
        extractor = Extractor(
            *(config.encoder, stage.plan, stage.tower, stage.device),
            frames=open_frames(config.frames_dir),
            features=stage.features,
        )
        with pytest.raises(OSError, match=r"No space left on device.*features-0000"):
            extractor.run(range(stage.plan.n_shards))
        left = {path.name for path in folder.iterdir()} - {"plan.json"}
        assert all(name.startswith("features-0000") for name in left), "no temporary files"
        subprocess.run(["mount", "-o", "remount,size=1m", str(folder)], check=True)
        assert run_task(config).manifest
