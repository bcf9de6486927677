"""Speed of sharding, compared with webdataset's ShardWriter and a plain ``cat``.

    python tests/bench/bench_sharding.py [--quick] [--json FILE] [--scratch FOLDER]

All ways take turns in one run. The first turn is discarded, the median of the others counts. Each
turn is a separate process whose imports are not counted and whose output is deleted afterwards.
The product hashes every shard and syncs it to disk. ``cat`` only syncs, ShardWriter does neither.
"""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from turns import Measured, Row, Turn, Ways, cpu_ms, main, median, peak, skip_absent, take_turns

SHARD_BYTES = 80_000_000
PLANNED = 100_000


# --- the data -------------------------------------------------------------------------------------


def make_dump(folder: Path, *, movies: int, shots: int) -> int:
    """Write movies as tars and as folders, 3 JPEGs of 25 to 40 KB per shot; return the bytes."""
    pictures = [_picture(key) for key in range(24)]
    generator = random.Random(0)
    total = 0
    for movie in range(movies):
        name = f"tt{movie:07d}"
        (folder / "folders" / name).mkdir(parents=True)
        (folder / "tars").mkdir(exist_ok=True)
        with tarfile.open(folder / "tars" / f"{name}.tar", "w") as archive:
            for frame in range(3 * shots):
                comment = generator.randbytes(generator.randrange(8, 2000))
                data = _with_comment(generator.choice(pictures), comment)
                info = tarfile.TarInfo(f"shot_{frame // 3:04d}_img_{frame % 3}.jpg")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
                (folder / "folders" / name / info.name).write_bytes(data)
                total += len(data)
    return total


def _picture(key: int) -> bytes:
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(key)
    coarse = generator.integers(0, 255, (60, 106, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((426, 240))
    noise = generator.normal(0, 12 + key / 4, (240, 426, 1))
    pixels = np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=60)
    return buffer.getvalue()


def _with_comment(jpeg: bytes, comment: bytes) -> bytes:
    """Return a JPEG with an added comment, so that its bytes are unique."""
    return jpeg[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + jpeg[2:]


# --- the ways -------------------------------------------------------------------------------------


def _config(dump: Path, out: Path) -> Any:
    from configs.schema import Config

    return Config.model_validate(
        {
            "version": 1,
            "data": {"dump": str(dump), "root": str(out)},
            "sharding": {"shard_bytes": SHARD_BYTES},
            "encoder": {"name": "none"},
            "training": {"run_name": "none"},
            "tracking": {"wandb": "off"},
        }
    )


def build(
    dump: Path, out: Path, task: tuple[int, int] = (0, 1), *, planned: bool = True
) -> Callable[[], None]:
    """The product: build and seal a planned set; with a task of several, only its build."""
    from sharding.build import build_shards, choose_shards, plan_for_build
    from sharding.seal import seal_frames
    from sharding.storage.open import open_storage

    config = _config(dump, out)
    storage = open_storage(config.frames_dir)
    if planned:
        plan_for_build(storage, config)

    def run() -> None:
        plan = plan_for_build(storage, config)
        numbers = choose_shards(plan, task=task)
        build_shards(storage, dump, plan, numbers, max_bad_fraction=0)
        if task == (0, 1):
            seal_frames(storage, max_bad_fraction=0)

    return run


def shardwriter(tars: Path, out: Path) -> Callable[[], None]:
    """tarfile and webdataset's ShardWriter."""
    sink = _sink(out)

    def run() -> None:
        with sink:
            for path in sorted(tars.iterdir()):
                with tarfile.open(path) as archive:
                    for member in archive:
                        stem, _, field = member.name.partition(".")
                        file = archive.extractfile(member)
                        sink.write({"__key__": f"{path.stem}/{stem}", field: file and file.read()})

    return run


def shardwriter_folders(folders: Path, out: Path) -> Callable[[], None]:
    """Files and webdataset's ShardWriter."""
    sink = _sink(out)

    def run() -> None:
        with sink:
            for movie in sorted(folders.iterdir()):
                for path in sorted(movie.iterdir()):
                    key = f"{movie.name}/{path.stem}"
                    sink.write({"__key__": key, path.suffix[1:]: path.read_bytes()})

    return run


def _sink(out: Path) -> Any:
    import webdataset

    pattern = str(out / "shard-%06d.tar")
    return webdataset.ShardWriter(pattern, maxsize=SHARD_BYTES, maxcount=10**9, verbose=0)


def cat(tars: Path, out: Path) -> Callable[[], None]:
    """Copy the same bytes into one file, and sync it."""
    paths = sorted(tars.iterdir())

    def run() -> None:
        with (out / "all").open("wb") as file:
            subprocess.run(["cat", *paths], stdout=file, check=True)
            os.fsync(file.fileno())

    return run


def plan_many(out: Path) -> Callable[[], None]:
    """Plan from a listing of one row per movie, publish the plan, read it back."""
    from sharding.build import publish_plan
    from sharding.frames import read_plan
    from sharding.plan import Movie, make_plan
    from sharding.storage.open import open_storage

    rows = "".join(
        f'["tt{key:07d}","tt{key:07d}.tar","146800640:{10**18 + key}",4400,{140_000_000 + key}]\n'
        for key in range(PLANNED)
    )
    (out / "listing.jsonl").write_text(rows)

    def run() -> None:
        with (out / "listing.jsonl").open() as listing:
            movies = [
                Movie(name, name, source, fingerprint, images, n_bytes)
                for name, source, fingerprint, images, n_bytes in map(json.loads, listing)
            ]
        storage = open_storage(str(out / "frames"))
        publish_plan(storage, make_plan(movies, shard_bytes=512 * 1024**2))
        if len((read_plan(storage) or make_plan([], shard_bytes=1)).movies) != PLANNED:
            raise SystemExit("the published plan differs from the planned movies")

    return run


WAYS: Ways = {
    "tars": lambda data, out: build(data / "tars", out),
    "folders": lambda data, out: build(data / "folders", out),
    "tars, plan too": lambda data, out: build(data / "tars", out, planned=False),
    "half-0": lambda data, out: build(data / "tars", out, (0, 2)),
    "half-1": lambda data, out: build(data / "tars", out, (1, 2)),
    "tars -> ShardWriter": lambda data, out: shardwriter(data / "tars", out),
    "folders -> ShardWriter": lambda data, out: shardwriter_folders(data / "folders", out),
    "cat + fsync": lambda data, out: cat(data / "tars", out),
    "plan 100,000": lambda _, out: plan_many(out),
}
NEEDS = {"tars -> ShardWriter": "webdataset", "folders -> ShardWriter": "webdataset"}


# --- measuring ------------------------------------------------------------------------------------


def measure(quick: bool, scratch: Path) -> Measured:
    """Run all ways in turn."""
    movies, shots, repeats = (12, 110, 3) if quick else (24, 110, 5)
    data = scratch / "data"
    n_bytes = make_dump(data, movies=movies, shots=shots)
    n_images = movies * shots * 3
    alone = [name for name in WAYS if not name.startswith("half-")]
    ways: dict[str, tuple[str, ...]] = {name: (name,) for name in skip_absent(alone, NEEDS)}
    ways["two processes"] = ("half-0", "half-1")
    turns = take_turns(ways, data=data, scratch=scratch, repeats=repeats, fresh=True)
    return Measured(
        rows=_rows(turns, n_bytes, n_images),
        turns=turns,
        title=f"{n_images:,} images, {n_bytes / 1e6:.0f} MB, {repeats} turns",
        method=f"{n_images} JPEGs, {n_bytes} bytes, shards of {SHARD_BYTES} bytes; ways in "
        f"turn, one turn discarded, median of {repeats}; separate processes, imports not "
        "counted, page cache warm; ours from an existing plan, with sha256 and fsync of each "
        "shard, index, sidecar and seal; two processes build half of the shards each",
    )


def _rows(turns: Mapping[str, Sequence[Turn]], n_bytes: int, n_images: int) -> list[Row]:
    def against(ratio: str, ours: str, peer: str, goal: float) -> list[Row]:
        if peer not in turns:
            return []
        rate = f"{n_bytes / median(turns[ours]) / 1e6:,.0f} MB/s"
        value = median(turns[peer]) / median(turns[ours])
        return [Row.at_least(ratio, value, goal, rate, cpu_ms(turns[ours], n_images))]

    rss = max(peak(turns[name]) for name in ("tars", "folders", "two processes"))
    plans = turns["plan 100,000"]
    return [
        *against("tars_vs_shardwriter", "tars", "tars -> ShardWriter", 2.7),
        *against("tars_and_plan_vs_shardwriter", "tars, plan too", "tars -> ShardWriter", 2.0),
        *against("tars_vs_cat", "tars", "cat + fsync", 0.6),
        *against("folders_vs_shardwriter", "folders", "folders -> ShardWriter", 2.0),
        *against("two_vs_one_process", "two processes", "tars", 1.6),
        Row.at_most("worker_rss_mb", rss, 150),
        Row.at_most("plan_100k_s", median(plans), 10, f"{PLANNED / median(plans):,.0f} /s"),
        Row.at_most("plan_100k_mb", peak(plans), 500),
    ]


if __name__ == "__main__":
    main(__doc__, WAYS, measure, versions=("numpy", "webdataset", "pydantic"))
