"""Write the files of a release that later releases must read: ``make.py FOLDER``.

    set.yaml             the configuration
    data/frames          frame shards of 20 movies, 3 small JPEGs each
    data/features/tiny   their features
    data/runs/tiny       a run of two epochs, and its report
    tiny.safetensors     its export
    logits.json          what the export computes

Run once per release, in an environment with the release (RELEASING.md). Existing folders are never
rewritten: they are what the users of that release have.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import chdir
from pathlib import Path

import numpy as np
import torch
import yaml
from simplejpeg import encode_jpeg

from encoders.__main__ import main as encode
from eval.__main__ import main as evaluate
from movienet_stream import load_exported, open_features
from sharding.__main__ import main as shard
from training.__main__ import main as train

MOVIES = [f"tt{number:07d}" for number in range(1, 21)]
GENRES = ("Comedy", "Drama", "Western")
IMAGES_PER_MOVIE = 3

CONFIG = {
    "version": 1,
    "data": {
        "dump": "dump/240P",
        "metadata": "dump/genres.json",
        "split": "dump/split.json",
        "root": "data",
        "genres": ["Comedy", "Drama", "Western"],
    },
    "sharding": {"shard_bytes": "32KiB"},
    "encoder": {
        "name": "tiny",
        "model": "tower.json",
        "pretrained": None,
        "precision": "fp32",
        "batch_size": 16,
        "threads": 1,
    },
    "stream": {"window": 4, "global_batch": 4},
    "model": {
        "class": "training.models.lstm:MaskedLSTM",
        "options": {"hidden": 4, "width": 4, "fold": 1},
    },
    "training": {
        "run_name": "tiny",
        "epochs": 2,
        "holdout": 0,
        "ema": 0.9,
        "device": "cpu",
        "threads": 1,
    },
    "eval": {"split": "val", "checkpoint": "last"},
    "tracking": {"wandb": "off"},
}
TOWER = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "patch_size": 16, "width": 8, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 8, "heads": 1, "layers": 1},
}
LEFT_OUT = ("*.html", "*.svg", "*.png", "plots", "wandb", ".lock", "cache", ".*")
"""Pages and pictures: nothing reads them."""


def main(out: Path) -> None:
    """Run all stages in a temporary folder, and copy what they wrote to ``out``."""
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        _write_inputs()
        config = ["--config", "set.yaml"]
        _run(shard, "build", *config)
        _run(encode, "run", *config)
        _run(train, "run", *config)
        _run(train, "export", "data/runs/tiny", "--out", "tiny.safetensors")
        _run(evaluate, "report", *config)
        _remove_machine(Path("data"))
        Path("logits.json").write_text(json.dumps(logits(Path()), indent=1) + "\n")
        shutil.copytree("data", out / "data", ignore=shutil.ignore_patterns(*LEFT_OUT))
        for name in ("set.yaml", "tower.json", "tiny.safetensors", "logits.json"):
            shutil.copy(name, out / name)


def logits(folder: Path) -> dict[str, list[float]]:
    """Return the logits of the export for each movie of the set, in the order of its genres."""
    trained = load_exported(folder / "tiny.safetensors")
    features = open_features(str(folder / "data/features/tiny"))
    results = {}
    for movie in features.movie_ids:
        rows_1ND = torch.from_numpy(features[movie].features_ND)[None].float()
        mask_1N = torch.ones(rows_1ND.shape[:2], dtype=torch.bool)
        with torch.inference_mode():
            results[movie] = trained.model(rows_1ND, mask_1N)[0].tolist()
    return results


def _write_inputs() -> None:
    values = np.random.default_rng(0)
    for movie in MOVIES:
        movie_dir = Path("dump/240P", movie)
        movie_dir.mkdir(parents=True)
        for shot in range(IMAGES_PER_MOVIE):
            color = np.full((16, 16, 3), values.integers(0, 256, 3), dtype=np.uint8)
            image = movie_dir / f"shot_{shot:04d}_img_0.jpg"
            image.write_bytes(encode_jpeg(color, quality=50))
    genres = {movie: [GENRES[k % 3], *GENRES[: k % 2]] for k, movie in enumerate(MOVIES)}
    split = {"train": MOVIES[:12], "val": MOVIES[12:], "test": []}
    Path("dump/genres.json").write_text(json.dumps(genres))
    Path("dump/split.json").write_text(json.dumps(split))
    Path("tower.json").write_text(json.dumps(TOWER, indent=1) + "\n")
    Path("set.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))


def _remove_machine(folder: Path) -> None:
    """Remove the names of this machine and of the temporary folder."""
    for path in [*folder.rglob("config.yaml"), *folder.rglob("state.json")]:
        path.write_text(path.read_text().replace(str(Path.cwd()), "/data"))
    for path in folder.rglob("attempt-*.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"host": "host", "pid": 1}, indent=1) + "\n")


def _run(program: Callable[[Sequence[str]], int], *arguments: str) -> None:
    if code := program(list(arguments)):
        sys.exit(f"{' '.join(arguments)}: exit {code}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
