"""A new storage back end touches four files; every stage then works on it."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.runtime.logs import PACKAGES
from movienet_stream import load_config, open_features

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).resolve().parents[3]
BACK_END = Path(__file__).with_name("toy_back_end.py")
FILES = (
    "sharding/storage/sqlite.py",
    "sharding/storage/open.py",
    "setup.cfg",
    "sharding/README.md",
)


@pytest.fixture
def product(tmp_path: Path) -> Path:
    """A copy of the product."""
    copy = tmp_path / "product"
    ignored = shutil.ignore_patterns("__pycache__")
    for package in PACKAGES:
        if (CHECKOUT / package).is_dir():
            shutil.copytree(CHECKOUT / package, copy / package, ignore=ignored)
    shutil.copy(CHECKOUT / "setup.cfg", copy)
    return copy


def insert(file: Path, before: str, text: str) -> None:
    content = file.read_text()
    assert content.count(before) == 1, f"{file.name}: {before!r}"
    file.write_text(content.replace(before, text + before))


def add_back_end(product: Path) -> None:
    """Add the back end as a contributor would: module, selection, import layer, documentation."""
    new, selection, layers, readme = (product / file for file in FILES)
    shutil.copy(BACK_END, new)
    choice = """    if location.startswith("sqlite://"):
        from sharding.storage.sqlite import SqliteStorage

        return SqliteStorage(location)
"""
    insert(selection, "    if is_url(location):\n", choice)
    insert(layers, "    uploads | local\n", "    sqlite\n")
    readme.write_text(readme.read_text() + "\n`sqlite://FOLDER` keeps a dataset in a database.\n")


def write_inputs(folder: Path) -> None:
    """Write a dump of two movies, arrays of six, labels, a split and a configuration."""
    genres, split = {}, {"train": [], "val": [], "test": []}  # type: ignore[var-annotated]
    for number in range(6):
        movie = f"tt{number:07d}"
        genres[movie] = ["Drama", "War"][: 1 + number % 2]
        split["train" if number < 4 else "val"].append(movie)
        (folder / "arrays").mkdir(exist_ok=True)
        rows_ND = np.random.default_rng(number).normal(size=(9, 4)).astype(np.float32)
        np.save(folder / "arrays" / f"{movie}.npy", rows_ND)
    for movie in split["val"]:
        (folder / "dump" / movie).mkdir(parents=True)
        for image in range(9):
            file = folder / "dump" / movie / f"shot_{image // 3:04d}_img_{image % 3}.jpg"
            Image.new("RGB", (16, 16), (20 * image, 0, 0)).save(file)
    (folder / "genres.json").write_text(json.dumps(genres))
    (folder / "split.json").write_text(json.dumps(split))
    (folder / "my.yaml").write_text(
        "version: 1\n"
        "data: {root: 'sqlite://sets', runs: runs, dump: dump, feature_arrays: arrays,\n"
        "       metadata: genres.json, split: split.json, genres: [Drama, War]}\n"
        "encoder: {name: arrays}\n"
        "stream: {window: 4, global_batch: 4}\n"
        "model: {class: 'training.models.mean:MeanLinear'}\n"
        "training: {run_name: run, epochs: 1, holdout: 0, device: cpu}\n"
        "eval: {checkpoint: last, bootstrap: 10}\n"
        "tracking: {wandb: 'off'}\n"
    )


def run(product: Path, folder: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(product), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stderr}{done.stdout}"
    return done.stdout


def test_every_stage_runs_on_a_new_back_end_after_a_change_of_four_files(
    product: Path, tmp_path: Path
) -> None:
    add_back_end(product)
    write_inputs(tmp_path)
    config = ("--config", "my.yaml")
    run(product, tmp_path, "sharding", "build", *config)
    run(product, tmp_path, "sharding", "verify", *config)
    run(product, tmp_path, "sharding", "import-features", *config)
    run(
        product,
        tmp_path,
        "sharding",
        "verify",
        *config,
        "--features",
        "sqlite://sets/features/arrays",
    )
    run(product, tmp_path, "training", "run", *config)
    run(product, tmp_path, "eval", "report", *config)
    assert sorted(path.name for path in tmp_path.glob("sets/**/*")) == [
        "arrays.db",
        "features",
        "frames.db",
    ]
    changed = {
        str(path.relative_to(product))
        for path in product.rglob("*")
        if path.is_file()
        and path.suffix != ".pyc"
        and not (
            (CHECKOUT / path.relative_to(product)).is_file()
            and filecmp.cmp(path, CHECKOUT / path.relative_to(product), shallow=False)
        )
    }
    assert changed == set(FILES)


def test_the_import_contracts_hold_with_a_new_back_end(product: Path) -> None:
    add_back_end(product)
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=product,
        env=os.environ | {"PYTHONPATH": str(product)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_without_the_selection_the_location_is_refused_in_one_line(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    config = load_config(tmp_path / "my.yaml")
    with pytest.raises(Exception, match=r"^sqlite://sets/features/arrays: .*s3://") as error:
        open_features(config.features_url)
    assert "\n" not in str(error.value)
