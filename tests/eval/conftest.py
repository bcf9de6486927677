"""A fixed report, a small trained run, and a small set encoded by OpenCLIP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import encoders.__main__
import sharding.__main__
from configs.runtime.launch import start
from configs.runtime.signals import StopRequest
from configs.schema import Config
from eval.render import write_report
from eval.report import Report, read_report
from sharding.import_arrays import import_features
from tests.encoders.conftest import jpeg, write_dump
from training.baselines import fit_recorded
from training.checkpoint import load_trained
from training.export import export
from training.loop import train

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def report() -> Report:
    return read_report(GOLDEN / "report.json")


@pytest.fixture(scope="session")
def report_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files of the fixed report. All tests share them and only read them."""
    return write_report(tmp_path_factory.mktemp("report"), read_report(GOLDEN / "report.json"))


GENRES = ("Drama", "War", "Animation")
N_MOVIES, DIM = 70, 8


def write_movies(folder: Path) -> None:
    """Write 70 movies. The first value of their rows indicates Drama, the second War."""
    rng = np.random.default_rng(0)
    (folder / "arrays").mkdir(parents=True)
    genres: dict[str, list[str]] = {}
    for number in range(N_MOVIES):
        movie = f"tt{number:03d}"
        rows = rng.normal(size=(rng.integers(2, 12), DIM)) + 2
        own = [genre for genre in GENRES[:2] if rng.random() < 0.5] or ["Drama"]
        rows[:, 0] += 1.5 * ("Drama" in own)
        rows[:, 1] += 1.5 * ("War" in own)
        np.save(folder / "arrays" / f"{movie}.npy", rows.astype(np.float32))
        genres[movie] = own
    movies = sorted(genres)
    split = {"train": movies[:35], "val": movies[35:], "test": []}
    (folder / "genres.json").write_text(json.dumps(genres))
    (folder / "split.json").write_text(json.dumps(split))


def configuration(folder: Path, **sections: dict[str, Any]) -> Config:
    tree: dict[str, dict[str, Any]] = {
        "data": {
            "feature_arrays": str(folder / "arrays"),
            "metadata": str(folder / "genres.json"),
            "split": str(folder / "split.json"),
            "genres": GENRES,
            "root": str(folder / "root"),
        },
        "encoder": {"name": "arrays"},
        "stream": {"window": 6, "global_batch": 16},
        "model": {"class": "training.models.mean:MeanLinear"},
        "training": {"run_name": "mean", "epochs": 30, "lr": 0.05, "holdout": 0, "device": "cpu"},
        "eval": {"checkpoint": "last", "windows": 3, "bootstrap": 100},
        "tracking": {"wandb": "off"},
    }
    for name, section in sections.items():
        tree[name] = tree[name] | section
    return Config.model_validate({"version": 1, **tree})


def train_run(config: Config) -> None:
    """Train a run in this process."""
    distributed = start(
        device="cpu", precision="fp32", accumulation=1, expected_world_size=1, threads=1
    )
    try:
        with StopRequest() as stop:
            train(config, distributed, stop)
    finally:
        distributed.close()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the movies, of their feature set and of the run ``mean`` that was trained on it."""
    folder = tmp_path_factory.mktemp("movies")
    write_movies(folder)
    config = configuration(folder)
    import_features(config)
    train_run(config)
    return folder


@pytest.fixture(scope="session")
def exported(trained: Path) -> Path:
    """An export of the run, with its baselines."""
    config, out = configuration(trained), trained / "mean.safetensors"
    baselines = fit_recorded(load_trained(config.run_dir, "last"))
    export(config.run_dir, "last", out, baselines)
    return out


BAD = "shot_0002_img_1.jpg"
"""Image of tt0000002 that is complete at both ends but cannot be decoded."""


@pytest.fixture(scope="session")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``config.yaml`` with a dump of five movies, its frame set and its feature set.

    The encoder is an OpenCLIP model with both towers.
    """
    from tests.encoders.test_text import save_model  # imports OpenCLIP, which takes seconds

    folder = tmp_path_factory.mktemp("encoded")
    write_dump(folder)
    (folder / "dump" / "tt0000002" / BAD).write_bytes(jpeg(64, 48, 0)[:300] + b"\xff\xd9")
    save_model(folder / "model")
    tree = {
        "version": 1,
        "data": {
            "dump": str(folder / "dump"),
            "metadata": str(folder / "meta.json"),
            "split": str(folder / "split.json"),
            "root": str(folder / "root"),
        },
        "sharding": {"shard_bytes": 20_000},
        "encoder": {
            "name": "both",
            "model": str(folder / "model" / "open_clip_config.json"),
            "pretrained": str(folder / "model" / "weights.pt"),
            "precision": "fp32",
            "batch_size": 16,
            "threads": 1,
            "device": "cpu",
            "max_bad_fraction": 0.5,
        },
        "stream": {"window": 4, "global_batch": 4},
        "model": {"class": "training.models.mean:MeanLinear"},
        "training": {"run_name": "mean", "epochs": 1, "holdout": 0, "device": "cpu"},
        "eval": {"checkpoint": "last", "bootstrap": 20},
        "tracking": {"wandb": "off"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    arguments = ["--config", str(folder / "config.yaml")]
    assert sharding.__main__.main(["build", *arguments]) == 0
    assert encoders.__main__.main(["run", *arguments]) == 0
    return folder
