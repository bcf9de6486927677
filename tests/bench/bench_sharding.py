"""How fast key frames become shards, beside webdataset's ShardWriter and a plain ``cat``.

    python tests/bench/bench_sharding.py [--quick] [--json FILE] [--scratch FOLDER]

All ways take turns in one run; one turn is thrown away, the median of the others counts. A turn
is a process of its own, whose imports are not counted, and its output is deleted after it. The
product hashes every shard and syncs it to disk, and so does ``cat``; ShardWriter does neither.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT))

SHARD_BYTES = 80_000_000
PLANNED = 100_000


# --- the data -------------------------------------------------------------------------------------


def make_dump(folder: Path, *, movies: int, shots: int) -> int:
    """Write movies as tars and as folders, three JPEGs a shot of 25 to 40 KB; return the bytes."""
    models = [_picture(key) for key in range(24)]
    draw = random.Random(0)
    total = 0
    for movie in range(movies):
        name = f"tt{movie:07d}"
        (folder / "folders" / name).mkdir(parents=True)
        (folder / "tars").mkdir(exist_ok=True)
        with tarfile.open(folder / "tars" / f"{name}.tar", "w") as archive:
            for frame in range(3 * shots):
                data = _stamped(draw.choice(models), draw.randbytes(draw.randrange(8, 2000)))
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


def _stamped(jpeg: bytes, comment: bytes) -> bytes:
    """Make a JPEG another one by a comment."""
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
            "training": {"run": "none"},
            "tracking": {"wandb": "off"},
        }
    )


def build(
    dump: Path, out: Path, share: tuple[int, int] = (0, 1), *, planned: bool = True
) -> Callable[[], None]:
    """The product: build and seal what is planned; with a share, the build of it alone."""
    from sharding.build import build_shards, choose_shards, plan_for_build
    from sharding.seal import seal_frames
    from sharding.storage import open_storage

    config = _config(dump, out)
    storage = open_storage(config.frames_dir)
    if planned:
        plan_for_build(storage, config)

    def run() -> None:
        plan = plan_for_build(storage, config)
        numbers = choose_shards(plan, share=share)
        build_shards(storage, dump, plan, numbers, max_bad_fraction=0)
        if share == (0, 1):
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
    """The same bytes into one file, synced."""
    paths = sorted(tars.iterdir())

    def run() -> None:
        with (out / "all").open("wb") as file:
            subprocess.run(["cat", *paths], stdout=file, check=True)
            os.fsync(file.fileno())

    return run


def plan_many(out: Path) -> Callable[[], None]:
    """Plan from a listing of one row a movie, publish the plan, read it back."""
    from sharding.build import publish_plan
    from sharding.frames import read_plan
    from sharding.plan import Movie, make_plan
    from sharding.storage import open_storage

    rows = "".join(
        f'["tt{key:07d}","tt{key:07d}.tar","146800640:{10**18 + key}",4400,{140_000_000 + key}]\n'
        for key in range(PLANNED)
    )
    (out / "listing.jsonl").write_text(rows)

    def run() -> None:
        with (out / "listing.jsonl").open() as listing:
            movies = [
                Movie(name, name, source, stamp, images, n_bytes)
                for name, source, stamp, images, n_bytes in map(json.loads, listing)
            ]
        storage = open_storage(str(out / "frames"))
        publish_plan(storage, make_plan(movies, shard_bytes=512 * 1024**2))
        if len((read_plan(storage) or make_plan([], shard_bytes=1)).movies) != PLANNED:
            raise SystemExit("the plan is not what was planned")

    return run


def _way(name: str, data: Path, out: Path) -> Callable[[], None]:
    tars, folders = data / "tars", data / "folders"
    ways: dict[str, Callable[[], Callable[[], None]]] = {
        "tars": lambda: build(tars, out),
        "folders": lambda: build(folders, out),
        "tars, plan too": lambda: build(tars, out, planned=False),
        "half-0": lambda: build(tars, out, (0, 2)),
        "half-1": lambda: build(tars, out, (1, 2)),
        "tars -> ShardWriter": lambda: shardwriter(tars, out),
        "folders -> ShardWriter": lambda: shardwriter_folders(folders, out),
        "cat + fsync": lambda: cat(tars, out),
        "plan 100,000": lambda: plan_many(out),
    }
    return ways[name]()


# --- measuring ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """One timing."""

    seconds: float
    cpu_s: float
    peak_mb: float


def one(name: str, data: Path, out: Path) -> None:
    """Run in a process of its own: get ready, wait for the word, run, tell."""
    run = _way(name, data, out)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    before = _cpu_seconds()
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    told = {"seconds": seconds, "cpu_s": _cpu_seconds() - before, "peak_mb": _peak_mb()}
    sys.stdout.write(json.dumps(told) + "\n")


def _peak_mb() -> float:
    # Not getrusage: its peak is at least that of the process that started this one.
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) / 1024


def _cpu_seconds() -> float:
    use = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in use)


def turn(names: tuple[str, ...], data: Path, scratch: Path) -> Turn:
    """Run these ways at the same time, from one start."""
    out = Path(tempfile.mkdtemp(dir=scratch))
    processes = [_started(name, data, out) for name in names]
    for process in processes:
        if _line(process) != "ready":
            raise SystemExit("a way did not begin")
    for process in processes:
        _say(process, "go\n")
    told = [json.loads(_line(process)) for process in processes]
    for process in processes:
        process.communicate()
    shutil.rmtree(out)
    os.sync()  # what is written back later is nobody else's time
    return Turn(
        max(row["seconds"] for row in told),
        sum(row["cpu_s"] for row in told),
        max(row["peak_mb"] for row in told),
    )


def _started(name: str, data: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--one", name, "--data", str(data), "--out", str(out)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _line(process: subprocess.Popen[str]) -> str:
    return process.stdout.readline().strip() if process.stdout else ""


def _say(process: subprocess.Popen[str], word: str) -> None:
    if process.stdin:
        process.stdin.write(word)
        process.stdin.flush()


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    rate: str
    cpu: str
    ratio: float
    goal: str
    met: bool

    def line(self) -> str:
        """Return it as it is printed."""
        verdict = "met" if self.met else "not met"
        return (
            f"{self.name:<30}{self.rate:>14}{self.cpu:>16}{self.ratio:>10.3g}  {self.goal:>9}  "
            f"{verdict}"
        )


def measure(*, quick: bool, scratch: Path) -> dict[str, Any]:
    """Run all ways in turns; print the table, return what the file holds."""
    movies, shots, repeats = (12, 110, 3) if quick else (24, 110, 5)
    data = scratch / "data"
    n_bytes = make_dump(data, movies=movies, shots=shots)
    n_images = movies * shots * 3
    ways = {
        name: (name,)
        for name in (
            "cat + fsync",
            "tars",
            "tars, plan too",
            "tars -> ShardWriter",
            "folders",
            "folders -> ShardWriter",
            "plan 100,000",
        )
    } | {"two processes": ("half-0", "half-1")}
    skipped = [name for name in ways if "ShardWriter" in name and not _there("webdataset")]
    for name in skipped:
        sys.stdout.write(f"{name}: skipped, webdataset is not installed\n")
        del ways[name]
    turns: dict[str, list[Turn]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, processes in ways.items():
            made = turn(processes, data, scratch)
            if repeat:  # the first one warms the page cache
                turns[name].append(made)
    rows = _rows(turns, n_bytes, n_images)
    sys.stdout.write(f"{n_images:,} images, {n_bytes / 1e6:.0f} MB, {repeats} turns\n")
    sys.stdout.write(f"{'name':<30}{'rate':>14}{'CPU ms/image':>16}{'ratio':>10}  {'goal':>9}\n")
    for row in rows:
        sys.stdout.write(row.line() + "\n")
    return {
        "ratios": {row.name: round(row.ratio, 4) for row in rows},
        "turns_s": {name: [round(t.seconds, 4) for t in made] for name, made in turns.items()},
        "versions": _versions(),
        "machine": {
            "cores": os.cpu_count(),
            "processor": platform.machine(),
            "load": [round(value, 2) for value in os.getloadavg()],
        },
        "method": f"{n_images} JPEGs, {n_bytes} bytes, shards of {SHARD_BYTES} bytes; ways in "
        f"turn, one turn thrown away, median of {repeats}; each its own process, imports not "
        "counted, page cache warm; ours from a plan that is there, with sha256 and fsync of each "
        "shard, index, sidecar and seal; two processes have half the shards each",
    }


def _rows(turns: dict[str, list[Turn]], n_bytes: int, n_images: int) -> list[Row]:
    def seconds(name: str) -> float:
        return statistics.median(turn.seconds for turn in turns[name])

    def peak(name: str) -> float:
        return max(turn.peak_mb for turn in turns[name])

    def against(ratio: str, ours: str, peer: str, goal: float) -> list[Row]:
        if peer not in turns:
            return []
        value = seconds(peer) / seconds(ours)
        cpu = statistics.median(turn.cpu_s for turn in turns[ours]) / n_images * 1000
        rate = f"{n_bytes / seconds(ours) / 1e6:,.0f} MB/s"
        return [Row(ratio, rate, f"{cpu:.3f}", value, f">= {goal}", value >= goal)]

    rss = max(peak("tars"), peak("folders"), peak("two processes"))
    planned = seconds("plan 100,000")
    rows = [
        *against("tars_vs_shardwriter", "tars", "tars -> ShardWriter", 2.7),
        *against("tars_and_plan_vs_shardwriter", "tars, plan too", "tars -> ShardWriter", 2.0),
        *against("tars_vs_cat", "tars", "cat + fsync", 0.6),
        *against("folders_vs_shardwriter", "folders", "folders -> ShardWriter", 2.0),
        *against("two_vs_one_process", "two processes", "tars", 1.6),
        Row("worker_rss_mb", "", "", rss, "<= 150", rss <= 150),
    ]
    peak_mb = peak("plan 100,000")
    return [
        *rows,
        Row("plan_100k_s", f"{PLANNED / planned:,.0f} /s", "", planned, "<= 10", planned <= 10),
        Row("plan_100k_mb", "", "", peak_mb, "<= 500", peak_mb <= 500),
    ]


def _there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _versions() -> dict[str, str]:
    names = [name for name in ("numpy", "webdataset", "pydantic") if _there(name)]
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}


def main() -> None:
    """Measure, or be one of the ways."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less data, 3 turns, under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write ratios and turns here")
    parser.add_argument("--scratch", type=Path, help="on the file system to measure")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.one, args.data, args.out)
        return
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        made = measure(quick=args.quick, scratch=Path(scratch))
    if args.json:
        args.json.write_text(json.dumps(made, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
