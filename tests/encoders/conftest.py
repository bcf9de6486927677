"""Fixtures: a small tower, images, and a sealed frame set made by the real builder."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image, ImageFilter

from configs.load import load_config
from configs.schema import Config
from encoders.task import Outcome
from sharding.build import build_shards, plan_for_build
from sharding.seal import seal_frames
from sharding.storage.local import DiskStorage
from sharding.storage.open import open_storage
from tests.sharding.servers import request

TOWER = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 4, "vocab_size": 9, "width": 8, "heads": 1, "layers": 1},
}

MOVIES = {"tt0000001": 5, "tt0000002": 9, "tt0000003": 1, "tt0000004": 12, "tt0000005": 4}
"""Shots of each movie; three images per shot."""


@cache
def jpeg(width: int, height: int, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (height // 6 + 2, width // 6 + 2, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.filter(ImageFilter.GaussianBlur(0.7)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_dump(folder: Path) -> None:
    for number, (movie, shots) in enumerate(MOVIES.items()):
        (folder / "dump" / movie).mkdir(parents=True)
        for shot in range(shots):
            for image in range(3):
                data = jpeg(64 + 8 * number, 48, 1000 * number + 10 * shot + image)
                (folder / "dump" / movie / f"shot_{shot:04d}_img_{image}.jpg").write_bytes(data)
    genres = {movie: ["Drama"] if k % 2 else ["Comedy"] for k, movie in enumerate(MOVIES)}
    (folder / "meta.json").write_text(json.dumps(genres))
    movies = list(MOVIES)
    split = {"train": movies[:3], "val": movies[3:], "test": []}
    (folder / "split.json").write_text(json.dumps(split))


@pytest.fixture(scope="session")
def tower_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tower") / "tiny.json"
    path.write_text(json.dumps(TOWER))
    return path


Configure = Callable[..., Config]


@pytest.fixture
def configure(tmp_path: Path, tower_file: Path) -> Configure:
    """Write a config file into ``tmp_path`` and load it, with overrides."""
    encoder: dict[str, Any] = {
        "name": "tiny",
        "model": str(tower_file),
        "pretrained": None,
        "precision": "fp32",
        "batch_size": 16,
        "threads": 1,
        "device": "cpu",
    }
    tree = {
        "version": 1,
        "data": {
            "dump": str(tmp_path / "dump"),
            "metadata": str(tmp_path / "meta.json"),
            "split": str(tmp_path / "split.json"),
            "root": str(tmp_path / "root"),
        },
        "sharding": {"shard_bytes": 20_000},
        "encoder": encoder,
        "training": {"run_name": "none"},
        "tracking": {"wandb": "off"},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))

    def load(*overrides: str) -> Config:
        return load_config(path, overrides)

    return load


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    """A folder of key frames, with metadata and split next to it."""
    write_dump(tmp_path)
    return tmp_path / "dump"


@pytest.fixture
def build() -> Callable[[Config], None]:
    """Build and seal the frames of a config."""
    return build_frames


@pytest.fixture
def config(configure: Configure, dump: Path) -> Config:
    """A config whose frames are built and sealed."""
    made = configure(f"data.dump={dump}")
    build_frames(made)
    return made


def build_frames(config: Config) -> None:
    storage = open_storage(config.frames_dir)
    plan = plan_for_build(storage, config)
    numbers = range(len(plan.shards))
    build_shards(storage, Path(str(config.data.dump)), plan, numbers, max_bad_fraction=0.5)
    seal_frames(storage, max_bad_fraction=0.5)


Build = Callable[[Config], None]


def digest(outcome: Outcome) -> str:
    assert outcome.manifest is not None
    return outcome.manifest.digest


def files(config: Config) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(config.features_dir).glob("*.*")}


def inodes(config: Config) -> dict[str, tuple[int, int]]:
    stats = {path.name: path.stat() for path in Path(config.features_dir).iterdir()}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def upload(frames_dir: str, url: str) -> str:
    """Copy a frame set to a server, and return its URL."""
    frames = DiskStorage(Path(frames_dir))
    for name in frames.names():
        request(f"{url}/bucket/frames/{name}", "PUT", frames.read(name))
    return f"{url}/bucket/frames"
