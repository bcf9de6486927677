"""Other loaders over the same movies, each in its own format.

Optional packages: mosaicml-streaming, litdata, megatron-energon, datasets, tensorstore, pylance.
Each way reads random windows of 256 rows in batches of 32, or complete padded movies in batches of
8, as recommended by its documentation. ``memmap`` is what a user would write without a library.
TensorStore and Lance store windows that were cut in advance, their fastest layout.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from turns import Run

FRAMES, DIM, BATCH, MOVIE_BATCH, SHOTS = 256, 512, 32, 8, 64
SHOT_ROWS = 3  # rows per shot in the data
REPEAT = 50  # passes per "epoch" of a loader that requires a length


def crop(movie_ND: Any) -> Any:
    """Return a copy of a random window."""
    import torch

    start = int(torch.randint(0, len(movie_ND) - FRAMES + 1, ()))
    return torch.from_numpy(np.array(movie_ND[start : start + FRAMES]))


def complete(movie_ND: Any) -> Any:
    """Return the movie, copied if it is read-only."""
    import torch

    return torch.from_numpy(movie_ND if movie_ND.flags.writeable else movie_ND.copy())


def pad(movies: list[Any]) -> Any:
    """Return movies padded to the longest one."""
    import torch

    batch = torch.zeros((len(movies), max(map(len, movies)), DIM), dtype=torch.float16)
    for row, movie in zip(batch, movies, strict=True):
        row[: len(movie)] = movie
    return batch


def timed(batches: Iterable[Any], size: int, seconds: float) -> Run:
    """Return the timed work: reading batches, after two that do not count."""
    iterator = iter(batches)

    def run() -> dict[str, float]:
        for _ in range(2):
            next(iterator)
        count, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            next(iterator)
            count += size
        return {"rate": count / (time.perf_counter() - begin)}

    return run


def forever(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches of one pass after another."""
    while True:
        yield from loader


class MappedMovies:
    """All movies in one memory-mapped ``.npy`` file, one after another.

    Axes: B = windows of a batch, M = movies, N = rows.
    """

    def __init__(self, data: Path) -> None:
        self.rows_ND = np.load(data / "memmap.npy", mmap_mode="r")
        self.edges_M1 = np.load(data / "memmap_edges.npy")
        """First row of each movie, followed by the number of rows."""

        self.n_movies = len(self.edges_M1) - 1
        self._generator = np.random.default_rng(0)

    def starts(self, n_rows: int, multiple: int = 1) -> list[int]:
        """Return the first rows of random windows, one per window of a batch."""
        movie_B = self._generator.integers(0, self.n_movies, BATCH)
        begin_B, end_B = self.edges_M1[movie_B], self.edges_M1[movie_B + 1]
        choices_B = (end_B - begin_B - n_rows) // multiple + 1
        chosen_B = (self._generator.random(BATCH) * choices_B).astype(np.int64)
        return (begin_B + chosen_B * multiple).tolist()  # type: ignore[no-any-return]

    def movies(self) -> list[Any]:
        """Return the rows of random movies, one array per movie of a batch."""
        chosen = self._generator.integers(0, self.n_movies, MOVIE_BATCH)
        return [self.rows_ND[self.edges_M1[at] : self.edges_M1[at + 1]] for at in chosen]


def memmap(data: Path, seconds: float) -> Run:
    """A loop that copies slices of a memory map into one reused batch."""
    mapped = MappedMovies(data)
    batch = np.zeros((BATCH, FRAMES, DIM), np.float16)

    def batches() -> Iterator[Any]:
        while True:
            for row, start in zip(batch, mapped.starts(FRAMES), strict=True):
                row[:] = mapped.rows_ND[start : start + FRAMES]
            yield batch

    return timed(batches(), BATCH, seconds)


def memmap_workers(data: Path, seconds: float) -> Run:
    """A map-style ``Dataset`` over a memory map, under a ``DataLoader`` with 2 workers."""
    import torch

    mapped = MappedMovies(data)
    rows_ND, edges_M1 = mapped.rows_ND, mapped.edges_M1

    class Windows(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return mapped.n_movies * REPEAT

        def __getitem__(self, at: int) -> Any:
            movie = at % mapped.n_movies
            return crop(rows_ND[edges_M1[movie] : edges_M1[movie + 1]])

    loader = torch.utils.data.DataLoader(
        Windows(), BATCH, shuffle=True, num_workers=2, drop_last=True
    )
    return timed(forever(loader), BATCH, seconds)


def memmap_movies(data: Path, seconds: float) -> Run:
    """Complete movies, copied from a memory map into one reused batch and padded with zeros."""
    mapped = MappedMovies(data)
    longest = int(np.diff(mapped.edges_M1).max())
    buffer = np.zeros((MOVIE_BATCH, longest, DIM), np.float16)

    def batches() -> Iterator[Any]:
        while True:
            movies = mapped.movies()
            batch = buffer[:, : max(map(len, movies))]
            for row, movie in zip(batch, movies, strict=True):
                row[: len(movie)] = movie
                row[len(movie) :] = 0
            yield batch

    return timed(batches(), MOVIE_BATCH, seconds)


def memmap_shots(data: Path, seconds: float) -> Run:
    """Windows of 64 shots, each the mean of its 3 rows of a memory map, in one reused batch."""
    mapped = MappedMovies(data)
    batch = np.zeros((BATCH, SHOTS, DIM), np.float16)
    edges = np.arange(SHOTS) * SHOT_ROWS
    sizes = np.full((SHOTS, 1), SHOT_ROWS, np.float32)  # in general shots differ in size

    def batches() -> Iterator[Any]:
        while True:
            for row, start in zip(batch, mapped.starts(SHOTS * SHOT_ROWS, SHOT_ROWS), strict=True):
                window = mapped.rows_ND[start : start + SHOTS * SHOT_ROWS]
                row[:] = np.add.reduceat(window, edges, axis=0, dtype=np.float32) / sizes
            yield batch

    return timed(batches(), BATCH, seconds)


def tensorstore(data: Path, seconds: float) -> Run:
    """TensorStore over zarr3, one chunk per window, all reads of a batch in flight."""
    import tensorstore as peer

    store = peer.open(_zarr(data), open=True).result()
    generator = np.random.default_rng(0)
    batch = np.zeros((BATCH, FRAMES, DIM), np.float16)

    def batches() -> Iterator[Any]:
        while True:
            with peer.Batch() as together:
                chosen = generator.integers(0, store.shape[0], BATCH).tolist()
                futures = [store[window].read(batch=together) for window in chosen]
            for row, future in zip(batch, futures, strict=True):
                row[:] = future.result()
            yield batch

    return timed(batches(), BATCH, seconds)


def lance(data: Path, seconds: float) -> Run:
    """Lance, one row per window, a batch per ``take``."""
    import lance as peer

    dataset = peer.dataset(str(data / "lance"))
    n_windows, generator = dataset.count_rows(), np.random.default_rng(0)

    def batches() -> Iterator[Any]:
        while True:
            table = dataset.take(generator.integers(0, n_windows, BATCH).tolist())
            windows = table.column("features").combine_chunks().flatten()
            yield windows.to_numpy().reshape(BATCH, FRAMES, DIM)

    return timed(batches(), BATCH, seconds)


def webdataset(
    data: Path, seconds: float, url: str | None = None, *, workers: int = 0, movies: bool = False
) -> Run:
    """webdataset over the shards of this project."""
    import torch
    import webdataset as wds

    torch.set_num_threads(1)
    names = sorted(path.name for path in (data / "set").glob("*.tar"))
    urls = [f"{url or data / 'set'}/{name}" for name in names]
    take, size = (complete, MOVIE_BATCH) if movies else (crop, BATCH)
    pipe = wds.WebDataset(urls, shardshuffle=len(urls)).shuffle(100).decode()
    pipe = pipe.map(lambda sample: (take(sample["features.npy"]),))
    collate = (lambda rows: (pad([row for (row,) in rows]),)) if movies else None
    options = {"collation_fn": collate} if collate else {}
    pipe = pipe.batched(size, partial=False, **options).repeat()
    loader = wds.WebLoader(pipe, batch_size=None, num_workers=workers) if workers else pipe
    return timed(loader, size, seconds)


def mds(data: Path, seconds: float, *, workers: int = 0, movies: bool = False) -> Run:
    """MosaicML Streaming."""
    from streaming import StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    take, size = (complete, MOVIE_BATCH) if movies else (crop, BATCH)

    class Movies(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: Any) -> Any:
            return take(super().__getitem__(at)["features"])

    clean_stale_shared_memory()
    n_movies = len(list((data / "npy").iterdir()))
    dataset = Movies(
        local=str(data / "mds"), shuffle=True, batch_size=size, epoch_size=n_movies * REPEAT
    )
    options = {"collate_fn": pad} if movies else {}
    loader = StreamingDataLoader(
        dataset, batch_size=size, num_workers=workers, drop_last=True, **options
    )
    return timed(forever(loader), size, seconds)


def energon(data: Path, seconds: float, *, movies: bool = False) -> Run:
    """Megatron-Energon over the same shards, prepared by its tool."""
    import io

    import torch
    from megatron import energon as peer

    take, size = (complete, MOVIE_BATCH) if movies else (crop, BATCH)

    @peer.edataclass
    class Window(peer.Sample):  # type: ignore[misc]
        features: torch.Tensor

    @peer.stateless  # type: ignore[untyped-decorator]
    def cook(sample: Any) -> Any:
        raw = sample["features.npy"]
        rows = np.load(io.BytesIO(raw)) if isinstance(raw, bytes) else np.asarray(raw)
        return Window(**peer.basic_sample_keys(sample), features=take(rows))

    class Encoder(peer.DefaultTaskEncoder):  # type: ignore[misc]
        cookers = (peer.Cooker(cook),)

        def batch(self, samples: list[Any]) -> Any:
            rows = [sample.features for sample in samples]
            return pad(rows) if movies else torch.stack(rows)

        def encode_batch(self, batch: Any) -> Any:
            return batch

    dataset = peer.get_train_dataset(
        str(data / "energon"),
        batch_size=size,
        shuffle_buffer_size=100,
        max_samples_per_sequence=100,
        worker_config=peer.WorkerConfig(rank=0, world_size=1, num_workers=0),
        task_encoder=Encoder(),
    )
    return timed(peer.get_savable_loader(dataset), size, seconds)


def litdata_temporal(data: Path, seconds: float) -> Run:
    """LitData's ``read_window`` with ``TemporalArrayLoader``, in one thread, into a batch."""
    import litdata
    import torch

    loader = litdata.streaming.TemporalArrayLoader()
    dataset = litdata.StreamingDataset(str(data / "litdata_temporal"), item_loader=loader)
    rows, generator = dataset.frame_counts, np.random.default_rng(0)

    def batches() -> Iterator[Any]:
        while True:
            order = generator.permutation(len(rows))
            for first in range(0, len(order) - BATCH + 1, BATCH):
                batch = torch.empty((BATCH, FRAMES, DIM), dtype=torch.float16)
                for row, movie in zip(batch, order[first : first + BATCH].tolist(), strict=True):
                    start = int(generator.integers(0, rows[movie] - FRAMES + 1))
                    window = dataset.read_window(movie, start, FRAMES, ["features"])["features"]
                    row[:] = torch.from_numpy(window)
                yield batch

    return timed(batches(), BATCH, seconds)


def litdata_movies(data: Path, seconds: float) -> Run:
    """LitData's default chunks, complete movies."""
    import litdata

    dataset = litdata.StreamingDataset(
        str(data / "litdata"), shuffle=True, transform=lambda sample: complete(sample["features"])
    )
    loader = litdata.StreamingDataLoader(
        dataset, batch_size=MOVIE_BATCH, num_workers=0, drop_last=True, collate_fn=pad
    )
    return timed(forever(loader), MOVIE_BATCH, seconds)


def hf_arrow(data: Path, seconds: float) -> Run:
    """HF datasets, memory-mapped Arrow files."""
    import datasets
    import torch

    dataset = datasets.load_from_disk(str(data / "arrow"))
    n_movies = len(dataset)

    class Windows(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return n_movies * REPEAT

        def __getitem__(self, at: int) -> Any:
            rows = np.frombuffer(dataset[at % n_movies]["features"], "<f2")
            return crop(rows.reshape(-1, DIM))

    loader = torch.utils.data.DataLoader(Windows(), BATCH, shuffle=True, drop_last=True)
    return timed(forever(loader), BATCH, seconds)


def hf_parquet_movies(data: Path, seconds: float) -> Run:
    """HF datasets, streamed Parquet files, complete movies."""
    import datasets
    import torch

    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # otherwise 5 s after each pass
    files = sorted(str(path) for path in (data / "parquet").iterdir())
    rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)

    def movie(row: Any) -> dict[str, Any]:
        return {"features": complete(np.frombuffer(row["features"], "<f2").reshape(-1, DIM))}

    mixed = rows.shuffle(seed=1, buffer_size=100).repeat(None).map(movie, remove_columns=["id"])
    loader = torch.utils.data.DataLoader(
        mixed,
        MOVIE_BATCH,
        drop_last=True,
        collate_fn=lambda taken: pad([row["features"] for row in taken]),
    )
    return timed(loader, MOVIE_BATCH, seconds)


Peer = Callable[..., Run]

PEERS: dict[str, Peer] = {
    "memmap": memmap,
    "memmap w2": memmap_workers,
    "memmap movies": memmap_movies,
    "memmap shots": memmap_shots,
    "tensorstore": tensorstore,
    "lance": lance,
    "webdataset w0": webdataset,
    "webdataset w2": lambda *args: webdataset(*args, workers=2),
    "webdataset movies": lambda *args: webdataset(*args, movies=True),
    "mds w0": mds,
    "mds w2": lambda *args: mds(*args, workers=2),
    "mds movies": lambda *args: mds(*args, movies=True),
    "energon w0": energon,
    "energon movies": lambda *args: energon(*args, movies=True),
    "litdata temporal": litdata_temporal,
    "litdata movies": litdata_movies,
    "hf arrow": hf_arrow,
    "hf parquet movies": hf_parquet_movies,
}
"""By name: functions from the data folder and the seconds of a turn to the timed work."""

NEEDS = {
    **{name: name.split()[0] for name in PEERS if not name.startswith("memmap")},
    **dict.fromkeys(("mds w0", "mds w2", "mds movies"), "streaming"),
    **dict.fromkeys(("energon w0", "energon movies"), "megatron"),
    **dict.fromkeys(("hf arrow", "hf parquet movies"), "datasets"),
    "webdataset w2 http": "webdataset",
}
"""Module that a way needs, by the name of the way."""


# --- their formats --------------------------------------------------------------------------------


def make_peers(data: Path, names: Collection[str]) -> set[str]:
    """Write the movies in each required format; return the ways whose data was written."""
    libraries = {name.split()[0] for name in names}
    ready = {name for name in names if name.startswith("webdataset")}
    _write_npy(data)
    for peer, make in MAKERS.items():
        if peer.split()[0] not in libraries:
            continue
        try:
            make(data)
        except Exception as error:  # noqa: BLE001  # a loader that cannot write is skipped
            sys.stdout.write(f"{peer}: skipped, {type(error).__name__}: {str(error)[:100]}\n")
        else:
            ready |= {
                name
                for name in names
                if name == peer or (" " not in peer and name.startswith(peer))
            }
    return ready


def _write_npy(data: Path) -> None:
    from sharding.features import open_features
    from sharding.storage.base import Range

    features = open_features(str(data / "set"))
    (data / "npy").mkdir()
    for movie, name in enumerate(features.movie_ids):
        rows = np.empty((int(features.index.rows[movie]), DIM), "<f2")
        place = Range(features.shard_file(movie), int(features.index.offset[movie]))
        features.storage.read_into([place], [rows.reshape(-1).view(np.uint8).data])
        np.save(data / "npy" / f"{name}.npy", rows)


def _movies(data: Path) -> Iterator[tuple[str, Any]]:
    for path in sorted((data / "npy").iterdir()):
        yield path.stem, np.load(path)


def _windows(data: Path) -> Iterator[Any]:
    """Yield the consecutive windows of each movie, without its last rows."""
    for _, rows_ND in _movies(data):
        yield rows_ND[: len(rows_ND) // FRAMES * FRAMES].reshape(-1, FRAMES, DIM)


def _make_memmap(data: Path) -> None:
    lengths = [len(rows) for _, rows in _movies(data)]
    edges_M1 = np.cumsum([0, *lengths])
    np.save(data / "memmap_edges.npy", edges_M1)
    shape = (int(edges_M1[-1]), DIM)
    mapped = np.lib.format.open_memmap(data / "memmap.npy", "w+", np.dtype("<f2"), shape)
    for begin, (_, rows) in zip(edges_M1[:-1].tolist(), _movies(data), strict=True):
        mapped[begin : begin + len(rows)] = rows
    mapped.flush()


def _zarr(data: Path) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(data / "zarr")}}


def _make_tensorstore(data: Path) -> None:
    import tensorstore as peer

    windows = list(_windows(data))
    store = peer.open(
        {**_zarr(data), "context": {"file_io_sync": False}},
        create=True,
        dtype=peer.float16,
        shape=[sum(map(len, windows)), FRAMES, DIM],
        chunk_layout=peer.ChunkLayout(chunk_shape=[1, FRAMES, DIM]),
    ).result()
    begin = 0
    for each in windows:
        store[begin : begin + len(each)].write(each).result()
        begin += len(each)


def _make_lance(data: Path) -> None:
    import lance as peer
    import pyarrow

    kind = pyarrow.list_(pyarrow.float16(), FRAMES * DIM)
    schema = pyarrow.schema([("features", kind)])
    batches = (
        pyarrow.record_batch(
            [pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(each.ravel()), type=kind)],
            schema=schema,
        )
        for each in _windows(data)
    )
    peer.write_dataset(batches, str(data / "lance"), schema=schema)


def _make_mds(data: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(data / "mds"), columns={"id": "str", "features": "ndarray"}) as writer:
        for name, rows in _movies(data):
            writer.write({"id": name, "features": rows})


def _make_energon(data: Path) -> None:
    (data / "energon").mkdir()
    for path in (data / "set").glob("*.tar"):
        os.link(path, data / "energon" / path.name)
    program = [str(Path(sys.executable).parent / "energon"), "prepare", str(data / "energon")]
    options = ["--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset"]
    command = [*program, *options, "--num-workers", "1", "--force-overwrite"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)


def _item(path: str) -> dict[str, Any]:
    return {"features": np.load(path)}


def _make_litdata(data: Path, *, temporal: bool) -> None:
    import litdata

    litdata.optimize(
        fn=_item,
        inputs=[str(path) for path in sorted((data / "npy").iterdir())],
        output_dir=str(data / ("litdata_temporal" if temporal else "litdata")),
        chunk_bytes="64MB",
        num_workers=1,
        item_loader=litdata.streaming.TemporalArrayLoader() if temporal else None,
        keep_data_ordered=True,
        verbose=False,
    )


def _make_arrow(data: Path) -> None:
    import datasets

    features = datasets.Features(
        {"id": datasets.Value("string"), "features": datasets.Value("large_binary")}
    )
    rows = lambda: ({"id": name, "features": array.tobytes()} for name, array in _movies(data))  # noqa: E731
    dataset = datasets.Dataset.from_generator(
        rows, features=features, cache_dir=str(data / "arrow-cache"), writer_batch_size=8
    )
    dataset.save_to_disk(str(data / "arrow"))


def _make_parquet(data: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema([("id", pyarrow.string()), ("features", pyarrow.large_binary())])
    (data / "parquet").mkdir()
    movies = _movies(data)
    for shard in itertools.count():
        shard_movies = list(itertools.islice(movies, 40))
        if not shard_movies:
            return
        # One row group per movie allows a reader to skip movies.
        with parquet.ParquetWriter(
            data / "parquet" / f"{shard:05d}.parquet", schema, compression="none"
        ) as writer:
            for name, rows in shard_movies:
                table = pyarrow.table([[name], [rows.tobytes()]], schema=schema)
                writer.write_table(table)


MAKERS: dict[str, Callable[[Path], None]] = {
    "memmap": _make_memmap,
    "tensorstore": _make_tensorstore,
    "lance": _make_lance,
    "mds": _make_mds,
    "energon": _make_energon,
    "litdata temporal": lambda data: _make_litdata(data, temporal=True),
    "litdata movies": lambda data: _make_litdata(data, temporal=False),
    "hf arrow": _make_arrow,
    "hf parquet movies": _make_parquet,
}
