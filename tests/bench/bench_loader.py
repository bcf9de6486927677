"""Speed of the loader, compared with plain reads and other loaders.

    python tests/bench/bench_loader.py [--quick] [--json FILE] [--scratch FOLDER]

Random windows of 256 rows of 512 float16, of movies of 322 to 6,000 rows, in batches of 32,
complete movies in batches of 8, and windows of 64 shots. ``memmap`` is a loop that copies slices of
one memory-mapped ``.npy`` into a batch. ``limit16`` is 16 threads of preadv into one reused buffer,
``ring`` two threads into as many buffers as a stream keeps in flight. All ways take turns in one
run, each in a separate process. Loaders that are not installed are skipped.
"""

from __future__ import annotations

import http.client
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from loader_peers import NEEDS, PEERS, SHOT_ROWS, SHOTS, make_peers
from turns import OUTSIDE, Measured, Row, Run, Turn, main, median_of, skip_absent, take_turns

FRAMES, DIM, BATCH, MOVIE_BATCH = 256, 512, 32, 8
ROW = 2 * DIM
WINDOW = FRAMES * ROW
DELAY_MS = 30
MILLION = 1_000_000


# --- the data -------------------------------------------------------------------------------------


def movie_rows(movies: int) -> list[int]:
    """Return the rows of each movie: 300 to 6,000, mean about 1,600."""
    drawn = 300 + np.random.default_rng([6, 0]).gamma(2.0, 650.0, movies)
    return np.minimum(drawn, 6000).astype(int).tolist()  # type: ignore[no-any-return]


def make_set(folder: Path, movies: int) -> None:
    """Write a sealed feature set with 40 movies per shard."""
    from sharding.features import MovieFeatures, publish_feature_shard, seal_features
    from sharding.labels import make_labels
    from sharding.storage.local import DiskStorage

    def movie(number: int, rows: int) -> MovieFeatures:
        values = np.random.default_rng([6, 1, number]).standard_normal((rows, DIM), np.float32)
        shots = np.arange(rows, dtype=np.int32) // SHOT_ROWS
        return MovieFeatures(f"tt{number:07d}", values.astype("<f2"), shots, rows)

    storage = DiskStorage(folder)
    content = (movie(number, rows) for number, rows in enumerate(movie_rows(movies)))
    n_shards = -(-movies // 40)
    for shard in range(n_shards):
        publish_feature_shard(storage, shard, itertools.islice(content, 40), input_digest="bench")
    seal_features(
        storage,
        n_shards=n_shards,
        provenance={"import": {"from": "bench"}, "dim": DIM},
        labels_for=lambda ids: make_labels(
            ids, ("Drama", "Comedy"), {key: ["Drama"] for key in ids}, dict.fromkeys(ids, "train")
        )[0],
    )


def make_million(folder: Path) -> None:
    """Write the index of a million movies."""
    from sharding.format.index import FeatureIndex

    rows = np.minimum(300 + np.random.default_rng(3).gamma(2.0, 650.0, MILLION), 6000)
    numbers = np.arange(MILLION)
    index = FeatureIndex(
        movie_id=np.char.mod("tt%07d", numbers).astype("S9"),
        shard=(numbers // 40).astype(np.uint32),
        offset=(numbers % 40 * 1_600_000).astype(np.uint64),
        rows=rows.astype(np.uint32),
    )
    (folder / "million.npz").write_bytes(index.to_bytes())


# --- the ways -------------------------------------------------------------------------------------


class Places:
    """Byte ranges of random windows and movies, for plain reads."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        from sharding.features import open_features

        features = open_features(str(folder))
        index, generator = features.index, np.random.default_rng(seed)
        chosen = generator.integers(0, len(index), 8192)
        first = (generator.random(8192) * (index.rows[chosen] - FRAMES + 1)).astype(np.int64)
        self.names = [features.shard_file(int(movie)) for movie in chosen]
        self.windows = (index.offset[chosen].astype(np.int64) + first * ROW).tolist()
        self.movies = [(int(index.offset[movie]), int(index.rows[movie]) * ROW) for movie in chosen]
        self.n_movies = len(index)


def by_threads(threads: int, seconds: float, read: Callable[[int, int], None]) -> float:
    """Call ``read(thread, number)`` from threads for some seconds; return calls per second."""
    ticket, counts, begin = itertools.count(), [0] * threads, time.perf_counter()

    def work(thread: int) -> None:
        while time.perf_counter() - begin < seconds:
            read(thread, next(ticket))
            counts[thread] += 1

    pool = [threading.Thread(target=work, args=(thread,)) for thread in range(threads)]
    for each in pool:
        each.start()
    for each in pool:
        each.join()
    return sum(counts) / (time.perf_counter() - begin)


def preads(
    data: Path, seconds: float, *, movies: bool = False, threads: int = 16, buffers: int = 1
) -> Run:
    """Plain preadv into reused batches; ``limit16``: 16 threads into a single batch."""
    places = Places(data / "set")
    handles = {name: os.open(data / "set" / name, os.O_RDONLY) for name in set(places.names)}
    shape = (BATCH, 6000 if movies else FRAMES, DIM)
    batches = [np.zeros(shape, np.float16) for _ in range(buffers)]
    rows = [row.reshape(-1).view(np.uint8).data for batch in batches for row in batch]

    def read(_: int, number: int) -> None:
        number %= len(places.names)
        offset, size = places.movies[number] if movies else (places.windows[number], WINDOW)
        buffer = rows[number % len(rows)][:size]
        if os.preadv(handles[places.names[number]], [buffer], offset) != size:
            raise SystemExit("preadv: short read")

    return lambda: {"rate": by_threads(threads, seconds, read)}


def rate_of(batches: Iterator[Any], size: int, seconds: float, warm: int = 6) -> float:
    """Return items per second, after ``warm`` batches that do not count."""
    for _ in range(warm):
        next(batches)
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        next(batches)
        count += size
    return count / (time.perf_counter() - begin)


def config_of(**fields: Any) -> Any:
    from configs.schema import StreamConfig

    return StreamConfig(**{"cache_dir": "off", "threads": 2, **fields})


WARM_BATCHES = 40
"""Batches of a local stream that do not count: the loader chooses how to read in the first 16."""


def ours(data: Path, seconds: float, location: str | None = None, flight: int = 32) -> Run:
    """This loader: windows, from a folder or a URL."""
    from configs.schema import StorageConfig
    from sharding.features import open_features
    from training.stream.loader import FeatureStream

    url = location or str(data / "set")
    features = open_features(url, StorageConfig(max_in_flight=flight))
    config = config_of(windows_per_movie=400)

    def run() -> Mapping[str, float]:
        with FeatureStream(features, np.arange(len(features.index)), config) as stream:
            warm = 6 if location else WARM_BATCHES
            rate = rate_of(iter(stream), BATCH, seconds, warm=warm)
            stats = stream.stats()
        read = stats["bytes"] / (stats["windows"] * WINDOW)
        return {"rate": rate, "read": read, "windows": stats["windows"]}

    return run


def ours_movies(data: Path, seconds: float) -> Run:
    """This loader: complete movies in batches of 8."""
    from sharding.features import open_features
    from training.stream.loader import FeatureStream

    features = open_features(str(data / "set"))
    config = config_of(sampling="full_movie", global_batch=MOVIE_BATCH, windows_per_movie=100)

    def run() -> Mapping[str, float]:
        with FeatureStream(features, np.arange(len(features.index)), config) as stream:
            return {"rate": rate_of(iter(stream), MOVIE_BATCH, seconds, warm=50)}

    return run


def ours_shots(data: Path, seconds: float) -> Run:
    """This loader: windows of shots, each row the mean of a shot."""
    from sharding.features import open_features
    from training.stream.loader import FeatureStream

    features = open_features(str(data / "set"))
    config = config_of(unit="shot", window=SHOTS, windows_per_movie=400)

    def run() -> Mapping[str, float]:
        with FeatureStream(features, np.arange(len(features.index)), config) as stream:
            return {"rate": rate_of(iter(stream), BATCH, seconds, warm=WARM_BATCHES)}

    return run


def evict(folder: Path) -> None:
    """Evict the files of a folder from the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cold(data: Path, *, product: bool) -> Run:
    """Each movie once, with the page cache evicted; the startup is timed."""
    from sharding.features import open_features
    from training.stream.loader import FeatureStream

    # Of a copy: pages that another way keeps mapped, waiting for its turn, are not evicted.
    folder = data / "cold"
    features = open_features(str(folder))
    places = Places(folder)
    handles = {name: os.open(folder / name, os.O_RDONLY) for name in set(places.names)}
    batch = np.zeros((BATCH, WINDOW), np.uint8)
    threads = 16

    def run() -> Mapping[str, float]:
        evict(folder)
        begin = time.perf_counter()
        if product:
            config = config_of(threads=threads, drop_last=True)
            with FeatureStream(features, np.arange(len(features.index)), config) as stream:
                n_windows = sum(len(batch.movie) for batch in stream)
        else:
            n_windows, ticket = places.n_movies // BATCH * BATCH, itertools.count()

            def work() -> None:
                while (number := next(ticket)) < n_windows:
                    handle = handles[places.names[number]]
                    os.preadv(handle, [batch[number % BATCH].data], places.windows[number])

            pool = [threading.Thread(target=work) for _ in range(threads)]
            for each in pool:
                each.start()
            for each in pool:
                each.join()
        return {"rate": n_windows / (time.perf_counter() - begin)}

    return run


# --- over a slow server ---------------------------------------------------------------------------


def slow_server(folder: Path) -> str:
    """Start a server with 30 ms to the first byte that ends with this process; return its URL."""
    script = Path(__file__).with_name("slow_http.py")
    command = [sys.executable, str(script), str(folder), str(DELAY_MS)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    OUTSIDE.add(process.pid)
    _SERVERS.append(process)
    return process.stdout.readline().strip() if process.stdout else ""


_SERVERS: list[subprocess.Popen[str]] = []


def over_http(data: Path, way: Callable[[str], Run]) -> Run:
    """Read from a slow server; add ``sent``, its count of the bytes sent per byte of windows."""
    url = slow_server(data / "set")
    run = way(url)

    def sent() -> int:
        with urllib.request.urlopen(f"{url}/_sent") as response:  # noqa: S310  # our own server
            return int(response.read())

    def counted() -> Mapping[str, float]:
        before = sent()
        figures = dict(run() or {})
        if windows := figures.get("windows"):
            figures["sent"] = (sent() - before) / (windows * WINDOW)
        return figures

    return counted


def plain_gets(data: Path, url: str, flight: int, seconds: float) -> Run:
    """Concurrent ranged GETs, each into its row of one reused batch."""
    places = Places(data / "set")
    rows = [row.data for row in np.zeros((BATCH, WINDOW), np.uint8)]
    host = url.removeprefix("http://")
    links = [http.client.HTTPConnection(host, timeout=30) for _ in range(flight)]

    def read(thread: int, number: int) -> None:
        number %= len(places.names)
        offset, buffer = places.windows[number], rows[number % BATCH]
        link, byte_range = links[thread], f"bytes={offset}-{offset + WINDOW - 1}"
        link.request("GET", f"/{places.names[number]}", headers={"Range": byte_range})
        response, at = link.getresponse(), 0
        while at < WINDOW:
            at += response.readinto(buffer[at:])
        response.read()

    return lambda: {"rate": by_threads(flight, seconds, read)}


# --- small figures --------------------------------------------------------------------------------


def peak_mb() -> float:
    """Return the peak resident memory of this process."""
    words = Path("/proc/self/status").read_text().split()
    return int(words[words.index("VmHWM:") + 1]) / 1024


def million(data: Path) -> Run:
    """Open the index of a million movies and plan an epoch."""
    from sharding.format.index import FeatureIndex
    from training.stream.epoch_plan import SamplingOrder, plan_epoch

    path, movies = data / "million.npz", np.arange(MILLION)
    before, first = peak_mb(), list[float]()

    def run() -> Mapping[str, float]:
        begin = time.perf_counter()
        index = FeatureIndex.from_bytes(path.read_bytes(), "million.npz")
        opened = time.perf_counter()
        first.append(peak_mb() - before)  # in later turns the peak includes an earlier plan
        plan_epoch(SamplingOrder(0, FRAMES, 1, BATCH), movies, index.rows, epoch=0)
        return {"open_s": opened - begin, "mb": first[0], "plan_s": time.perf_counter() - opened}

    return run


def first_batch(data: Path, *, step: int) -> Run:
    """Open the set, create a stream at a step, read one batch."""
    from sharding.features import open_features
    from training.stream import batch  # importing torch is not timed
    from training.stream.loader import FeatureStream

    def run() -> Mapping[str, float]:
        begin = time.perf_counter()
        features = open_features(str(data / "set"))
        config = config_of(windows_per_movie=100)
        with FeatureStream(features, np.arange(len(features.index)), config) as stream:
            stream.load_state_dict({**stream.state_dict(), "step": step})
            assert isinstance(next(iter(stream)), batch.Batch)
            return {"first_s": time.perf_counter() - begin}

    return run


def import_alone(modules: str) -> Run:
    """Import modules in a new interpreter; none of them may initialize CUDA."""
    code = f"import sys, {modules}; sys.exit(torch.cuda.is_initialized())"

    def run() -> Mapping[str, float]:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return {"import_s": time.perf_counter() - begin}

    return run


def _peer(name: str, data: Path, _: Path) -> Run:
    return PEERS[name](data, SECONDS)


SECONDS = float(os.environ.get("BENCH_SECONDS", "1.0"))

WAYS: dict[str, Callable[[Path, Path], Run]] = {
    "limit16": lambda data, _: preads(data, SECONDS),
    "ring": lambda data, _: preads(data, SECONDS, threads=2, buffers=5),
    "ours": lambda data, _: ours(data, SECONDS),
    "limit16 movies": lambda data, _: preads(data, SECONDS, movies=True),
    "ours movies": lambda data, _: ours_movies(data, SECONDS),
    "ours shots": lambda data, _: ours_shots(data, SECONDS),
    "limit16 cold": lambda data, _: cold(data, product=False),
    "ours cold": lambda data, _: cold(data, product=True),
    "get16 http": lambda data, _: over_http(
        data, lambda url: plain_gets(data, url, 16, 2 * SECONDS)
    ),
    "ours16 http": lambda data, _: over_http(data, lambda url: ours(data, 2 * SECONDS, url, 16)),
    "get64 http": lambda data, _: over_http(
        data, lambda url: plain_gets(data, url, 64, 2 * SECONDS)
    ),
    "ours64 http": lambda data, _: over_http(data, lambda url: ours(data, 2 * SECONDS, url, 64)),
    "million": lambda data, _: million(data),
    "first batch": lambda data, _: first_batch(data, step=0),
    "resumed": lambda data, _: first_batch(data, step=100),
    "import": lambda _, __: import_alone("training.stream.loader, training.stream.batch, torch"),
    "import torch": lambda _, __: import_alone("torch"),
    **{name: partial(_peer, name) for name in PEERS},
    "webdataset w2 http": lambda data, _: over_http(
        data, lambda url: PEERS["webdataset w2"](data, 2 * SECONDS, url)
    ),
}


# --- measuring ------------------------------------------------------------------------------------


def measure(quick: bool, scratch: Path) -> Measured:
    """Run all ways in turn."""
    movies, repeats = (80, 3) if quick else (400, 5)
    data = scratch / "data"
    (data / "set").mkdir(parents=True)
    make_set(data / "set", movies)
    shutil.copytree(data / "set", data / "cold")
    make_million(data)
    available = skip_absent(WAYS, NEEDS)
    peers = make_peers(data, {name for name in available if name in PEERS})
    ways = {name: (name,) for name in available if name not in PEERS or name in peers}
    turns = take_turns(ways, data=data, scratch=scratch, repeats=repeats)
    return Measured(
        rows=_rows(turns),
        turns=turns,
        title=f"{movies} movies, {sum(movie_rows(movies)) * ROW / 1e6:.0f} MB, {repeats} turns",
        method=f"{movies} movies; windows of {FRAMES} x {DIM} float16 in batches of {BATCH}, "
        f"complete movies in batches of {MOVIE_BATCH}, windows of {SHOTS} shots of {SHOT_ROWS} "
        "rows; for TensorStore (a chunk per window) and Lance (a row per window) the windows were "
        "cut in advance; all ways take turns, each in a separate "
        f"process; median of {repeats} turns of {SECONDS} s after a discarded one; page cache "
        f"warm, or evicted with the startup included; HTTP with {DELAY_MS} ms to the first byte; "
        "CPU includes worker processes, but not the HTTP server",
    )


def cpu_per_item(turn: Turn) -> float:
    """Return the CPU milliseconds per window or movie of a turn."""
    return 1000 * turn.cpu_s / turn.figures["rate"] / turn.seconds


def _rows(turns: Mapping[str, Sequence[Turn]]) -> list[Row]:
    def rate(name: str) -> str:
        return f"{median_of(turns[name], 'rate'):,.0f} /s"

    def cpu(name: str) -> str:
        return f"{statistics.median(map(cpu_per_item, turns[name])):.3f}"

    def against(name: str, our: str, peers: Sequence[str], goal: float | None) -> list[Row]:
        """Return the ratio to the best available peer: the median of the ratios within a turn."""
        present = [peer for peer in peers if peer in turns]
        if not present:
            return []
        best = max(present, key=lambda peer: median_of(turns[peer], "rate"))
        ratio = statistics.median(
            mine.figures["rate"] / theirs.figures["rate"]
            for mine, theirs in zip(turns[our], turns[best], strict=True)
        )
        if goal is None:
            return [Row(name, rate(our), cpu(our), ratio, "", None)]
        return [Row.at_least(name, ratio, goal, rate(our), cpu(our))]

    def cpu_against(name: str, our: str, peer: str, goal: float) -> list[Row]:
        """Return the ratio of the CPU time per item: the median of the ratios within a turn."""
        if peer not in turns:
            return []
        ratio = statistics.median(
            cpu_per_item(mine) / cpu_per_item(theirs)
            for mine, theirs in zip(turns[our], turns[peer], strict=True)
        )
        return [Row.at_most(name, ratio, goal, rate(our), cpu(our))]

    plain = [
        Row(name, rate(name), cpu(name), 1.0, "", None)
        for name in turns
        if "rate" in turns[name][0].figures
    ]
    streaming = ["mds movies", "energon movies", "litdata movies", "hf parquet movies"]
    small = turns["million"]
    used = median_of(turns["ours"], "read")
    resume = median_of(turns["resumed"], "first_s") / median_of(turns["first batch"], "first_s")
    imported = median_of(turns["import"], "import_s") / median_of(turns["import torch"], "import_s")
    return [
        *plain,
        *against("warm_vs_limit16", "ours", ["limit16"], 0.75),
        *against("warm_vs_ring", "ours", ["ring"], None),
        *against("warm_vs_memmap", "ours", ["memmap"], 1.0),
        *cpu_against("cpu_vs_memmap", "ours", "memmap", 1.1),
        *against("whole_vs_memmap", "ours movies", ["memmap movies"], 1.0),
        *against("shots_vs_memmap", "ours shots", ["memmap shots"], 1.0),
        *against("cold_vs_limit16", "ours cold", ["limit16 cold"], 0.8),
        *against("vs_webdataset", "ours", ["webdataset w0", "webdataset w2"], 30),
        *against("vs_mds", "ours", ["mds w0", "mds w2"], 20),
        *against("vs_energon", "ours", ["energon w0"], 20),
        *against("vs_litdata", "ours", ["litdata temporal"], 3.5),
        *against("vs_hf_arrow", "ours", ["hf arrow"], 5),
        *against("vs_tensorstore", "ours", ["tensorstore"], 2),
        *against("vs_lance", "ours", ["lance"], 5),
        Row.at_most("bytes_read_per_used", used, 1.05),
        *against("movies_vs_limit16", "ours movies", ["limit16 movies"], 0.4),
        *against("movies_vs_best_streaming_peer", "ours movies", streaming, 2),
        *against("movies_vs_webdataset", "ours movies", ["webdataset movies"], 3),
        *against("http_vs_16_gets", "ours16 http", ["get16 http"], 0.9),
        *against("http_vs_64_gets", "ours64 http", ["get64 http"], 0.9),
        Row.at_most("http_bytes_per_used", median_of(turns["ours64 http"], "sent"), 1.1),
        *against("http_vs_webdataset", "ours64 http", ["webdataset w2 http"], 4),
        Row.at_most("index_1m_open_s", median_of(small, "open_s"), 0.1),
        Row.at_most("index_1m_mb", median_of(small, "mb"), 60),
        Row.at_most("plan_1m_s", median_of(small, "plan_s"), 0.3),
        Row.at_most("first_batch_s", median_of(turns["first batch"], "first_s"), 0.15),
        Row.at_most("resume_vs_fresh", resume, 1.1),
        Row.at_most("import_s", median_of(turns["import"], "import_s"), 3),
        Row.at_most("import_vs_torch", imported, 1.15),
    ]


VERSIONS = (
    *("numpy", "torch", "obstore", "webdataset", "mosaicml-streaming", "litdata"),
    *("megatron-energon", "datasets", "pyarrow", "tensorstore", "pylance"),
)

if __name__ == "__main__":
    main(__doc__, WAYS, measure, versions=VERSIONS)
