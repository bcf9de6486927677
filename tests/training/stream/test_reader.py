"""The reader: correct bytes at the correct place, and buffers reused only when unreferenced."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import DataError, MachineError
from sharding.storage.base import Range
from sharding.storage.memory import MemoryStorage
from training.stream.epoch_plan import SamplingOrder, WindowSpec, frame_order, plan_epoch
from training.stream.reader import BufferPool, Pace, ReadSlice, ReadStats, WindowReader

WINDOW, BATCH, DIM = 12, 6, 8
SHAPE = (BATCH, WINDOW, DIM)
N_ROWS = [3 + (movie * 37) % 41 for movie in range(40)]  # 3 to 43 rows, window: 12


@pytest.fixture
def films(make_films: Callable[..., Any]) -> Any:
    return make_films(N_ROWS, dim=DIM)


@pytest.fixture(autouse=True)
def no_thread_remains() -> Iterator[None]:
    yield
    gc.collect()
    assert reading_threads() == []


def reading_threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("stream-read")]


def new_pool(keep: int = 5) -> BufferPool:
    return BufferPool(keep=keep)


def reader_of(
    films: Any, pool: BufferPool, shuffle_seed: int | None = None, pace: Pace | None = None
) -> WindowReader:
    return WindowReader(
        films.features,
        films.features.storage,
        pool,
        spec=WindowSpec(WINDOW, shuffle_seed=shuffle_seed),
        threads=3,
        stats=ReadStats(),
        pace=pace,
    )


def read_all(reader: WindowReader, films: Any, epoch: int = 0) -> Iterator[ReadSlice]:
    index = films.features.index
    plan = plan_epoch(SamplingOrder(0, WINDOW, 1, BATCH), films.movies, index.rows, epoch=epoch)
    yield from reader.read_ahead((plan.slice(k, 0, 1) for k in range(plan.steps)), prefetch=2)


def expected(films: Any, read_slice: ReadSlice) -> np.ndarray[Any, Any]:
    places = zip(read_slice.piece.movie.tolist(), read_slice.piece.start.tolist(), strict=True)
    return np.stack([films.window(movie, start, WINDOW) for movie, start in places])


def test_every_window_has_its_rows_followed_by_zeros_even_in_a_reused_buffer(films: Any) -> None:
    pool = new_pool()
    with reader_of(films, pool) as reader:
        for epoch in range(5):
            for read_slice in read_all(reader, films, epoch):
                assert np.array_equal(read_slice.features_BTD, expected(films, read_slice))
    assert pool.n_allocated <= 5


def test_batches_in_a_list_remain_unchanged(films: Any) -> None:
    pool = new_pool()
    with reader_of(films, pool) as reader:
        slices = list(read_all(reader, films)) + list(read_all(reader, films, epoch=1))
        assert pool.n_allocated == len(slices)
        for read_slice in slices:
            assert np.array_equal(read_slice.features_BTD, expected(films, read_slice))


def content(view: Any) -> str:
    return view.tobytes().hex() if isinstance(view, memoryview) else str(view.tolist())


@pytest.mark.parametrize(
    "view_of",
    [
        lambda features: features[2],
        lambda features: features[1:3, ::2].T,
        lambda features: torch.from_numpy(features)[2, 1:].T,
        lambda features: torch.from_numpy(features).view(-1)[50:80],
        lambda features: torch.from_numpy(features).numpy()[4],
        lambda features: torch.from_numpy(features).detach().unbind(0)[3],
        lambda features: torch.utils.dlpack.from_dlpack(torch.from_numpy(features))[1],
        lambda features: torch.from_numpy(features).untyped_storage(),
        lambda features: memoryview(features)[1:2],
    ],
)
def test_any_view_of_a_batch_keeps_its_buffer_out_of_the_pool(
    films: Any, view_of: Callable[[Any], Any]
) -> None:
    pool = new_pool()
    with reader_of(films, pool) as reader:
        batches = read_all(reader, films)
        view = view_of(next(batches).features_BTD)
        before = content(view)
        for epoch in range(3):
            for _ in read_all(reader, films, epoch):
                pass
        assert content(view) == before


def test_a_buffer_is_returned_when_the_last_view_of_its_batch_is_deleted() -> None:
    pool = new_pool()
    buffer = pool.take(SHAPE)
    address = buffer.features_BTD.ctypes.data
    tensor = torch.from_numpy(buffer.features_BTD)
    view = tensor[1:2]
    del buffer, tensor
    assert pool.take(SHAPE).features_BTD.ctypes.data != address
    del view
    addresses = {pool.take(SHAPE).features_BTD.ctypes.data for _ in range(1)}
    buffers = [pool.take(SHAPE) for _ in range(2)]
    assert address in addresses | {each.features_BTD.ctypes.data for each in buffers}
    assert pool.n_allocated == 2


def test_the_pool_keeps_at_most_the_given_number_of_free_buffers() -> None:
    pool = new_pool(keep=2)
    buffers = [pool.take(SHAPE) for _ in range(6)]
    del buffers
    buffers = [pool.take(SHAPE) for _ in range(3)]
    assert pool.n_allocated == 7
    assert len(buffers) == 3


def test_permuted_rows_are_a_window_of_the_permuted_movie(films: Any) -> None:
    with reader_of(films, new_pool(), shuffle_seed=9) as reader:
        for read_slice in read_all(reader, films):
            piece = read_slice.piece
            for window, movie, start in zip(
                read_slice.features_BTD, piece.movie.tolist(), piece.start.tolist(), strict=True
            ):
                permuted = films.rows[movie][frame_order(9, movie, N_ROWS[movie])]
                rows = permuted[start : start + WINDOW]
                assert np.array_equal(window[: len(rows)], rows)
                assert not window[len(rows) :].any()


class Failing(MemoryStorage):
    """A storage that fails after ``after`` windows."""

    def __init__(self, files: dict[str, bytes], after: int) -> None:
        super().__init__()
        self.files, self.left = files, after

    def read_into(self, ranges: Sequence[Range], buffers: Sequence[memoryview]) -> None:
        self.left -= len(ranges)
        if self.left < 0:
            raise DataError("features-00001.tar: got 3 bytes at 512, want 192; verify the set")
        super().read_into(ranges, buffers)


@pytest.mark.parametrize("after", [0, 5, 20])
def test_an_error_in_a_thread_reaches_the_consumer_unchanged(films: Any, after: int) -> None:
    storage = Failing(films.features.storage.files, after)
    broken = replace(films, features=replace(films.features, storage=storage))
    with (
        pytest.raises(DataError, match="got 3 bytes at 512"),
        reader_of(broken, new_pool()) as reader,
    ):
        list(read_all(reader, broken))


def test_a_truncated_shard_is_reported_in_one_line(films: Any) -> None:
    storage = MemoryStorage()
    storage.files = {name: data[:1200] for name, data in films.features.storage.files.items()}
    broken = replace(films, features=replace(films.features, storage=storage))
    with pytest.raises(DataError) as caught, reader_of(broken, new_pool()) as reader:
        list(read_all(reader, broken))
    assert len(str(caught.value).splitlines()) == 1


class Slow(MemoryStorage):
    """A storage that delays each read."""

    def read_into(self, ranges: Sequence[Range], buffers: Sequence[memoryview]) -> None:
        time.sleep(0.02)
        super().read_into(ranges, buffers)


def test_an_abandoned_iteration_stops_its_threads_without_reading_the_rest(films: Any) -> None:
    storage = Slow()
    storage.files = films.features.storage.files
    slow = replace(films, features=replace(films.features, storage=storage))
    with reader_of(slow, new_pool()) as reader:
        next(read_all(reader, slow))
        assert len(reading_threads()) == 3
    assert reading_threads() == []


def test_at_most_prefetch_plus_one_batches_are_in_memory(films: Any) -> None:
    pool = new_pool()
    with reader_of(films, pool) as reader:
        batches = read_all(reader, films)
        current = next(batches)
        assert pool.n_allocated == 3
        del current


class InMemory(MemoryStorage):
    """A storage whose first ``n_cached`` batches are in memory; it counts the others."""

    def __init__(self, files: dict[str, bytes], n_cached: int) -> None:
        super().__init__()
        self.files = files
        self.n_cached, self.n_read = n_cached, 0

    def copy_cached(
        self, names: Sequence[str], offsets: Sequence[int], rows: Sequence[Any], /
    ) -> bool:
        self.n_cached -= 1
        for name, offset, row in zip(names, offsets, rows, strict=True):
            row[:] = np.frombuffer(self.files[name], np.uint8)[offset : offset + len(row)]
        return self.n_cached >= 0

    def read_into(self, ranges: Sequence[Range], buffers: Sequence[memoryview]) -> None:
        self.n_read += len(ranges)
        super().read_into(ranges, buffers)


def copying() -> Pace:
    """Return the pace of a consumer that needs no time for a batch."""
    pace = Pace()
    for _ in range(16):
        pace.add(waited_s=1.0, used_s=0.0)
    assert pace.copies
    return pace


@pytest.mark.parametrize("n_cached", [7, 3, 0])
def test_batches_copied_from_memory_equal_those_read_by_threads(films: Any, n_cached: int) -> None:
    """After the first batch that is not in memory, threads read ahead again."""
    storage = InMemory(films.features.storage.files, n_cached)
    cached = replace(films, features=replace(films.features, storage=storage))
    stats = ReadStats()
    with reader_of(cached, new_pool(), pace=copying()) as reader:
        reader._stats = stats
        slices = list(read_all(reader, cached))
    for read_slice in slices:
        assert np.array_equal(read_slice.features_BTD, expected(films, read_slice))
    assert len(slices) == 7
    assert storage.n_read == BATCH * (7 - n_cached)
    assert stats.windows == len(N_ROWS)


class CopiesLater(Pace):
    """Reads ahead until the first batch is delivered, and copies after that."""

    def add(self, waited_s: float, used_s: float) -> None:  # noqa: ARG002  # at any speed
        self.copies = True


def test_batches_are_the_same_if_copying_begins_in_the_middle_of_an_epoch(films: Any) -> None:
    """The first slices are planned together, for reading; the later ones for copying."""
    storage = InMemory(films.features.storage.files, n_cached=2**63)
    cached = replace(films, features=replace(films.features, storage=storage))
    plan = plan_epoch(
        SamplingOrder(0, WINDOW, 4, BATCH), films.movies, films.features.index.rows, epoch=0
    )
    pieces = [plan.slice(k, 0, 1) for k in range(plan.steps)]
    with reader_of(cached, new_pool(), pace=CopiesLater()) as reader:
        slices = list(reader.read_ahead(pieces, prefetch=2))
    for read_slice, piece in zip(slices, pieces, strict=True):
        assert read_slice.piece is piece
        assert np.array_equal(read_slice.features_BTD, expected(films, read_slice))
    assert 0 < storage.n_read < BATCH * len(pieces), "some are read, and some are copied"


def test_batches_are_copied_while_the_consumer_waits_longer_than_it_works() -> None:
    pace = copying()
    for _ in range(16):
        pace.add(waited_s=1.0, used_s=2.0)
    assert not pace.copies
    for _ in range(16):
        pace.add(waited_s=3.0, used_s=2.0)
    assert pace.copies


def test_after_a_batch_that_was_not_in_memory_copying_is_tried_again_only_later() -> None:
    pace = copying()
    pace.refuse()
    tries = 0
    while not pace.copies:
        tries += 1
        pace.add(waited_s=1.0, used_s=0.0)
    assert tries == 16 * 16


def test_the_buffer_that_was_returned_last_is_used_next() -> None:
    pool = new_pool()
    first, second = pool.take(SHAPE), pool.take(SHAPE)
    addresses = [each.features_BTD.ctypes.data for each in (first, second)]
    del first
    del second
    assert pool.take(SHAPE).features_BTD.ctypes.data == addresses[1]


def test_a_forked_child_is_refused_in_one_line(films: Any) -> None:
    """The child process replies through a pipe and exits immediately."""
    read_end, write_end = os.pipe()
    with reader_of(films, new_pool()) as reader:
        batches = read_all(reader, films)
        next(batches)
        child = os.fork()
        if child == 0:
            try:
                next(batches)
                answer = "continued"
            except MachineError as error:
                answer = str(error)
            os.write(write_end, answer.encode())
            os._exit(0)
        os.close(write_end)
        with os.fdopen(read_end) as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        rest = sum(1 for _ in batches)
    assert "do not survive a fork" in answer
    assert len(answer.splitlines()) == 1
    assert rest == 6


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["", "raise SystemExit(3)"])
def test_a_program_that_exits_during_an_iteration_exits_immediately(
    make_films: Callable[..., Any], tmp_path: Path, ending: str
) -> None:
    make_films(N_ROWS, dim=DIM, folder=tmp_path)
    program = f"""
        import numpy as np
        from configs.schema import StreamConfig
        from sharding.features import open_features
        from training.stream.loader import FeatureStream

        features = open_features({str(tmp_path)!r})
        stream = FeatureStream(features, np.arange(40), StreamConfig(window=8, global_batch=4))
        batches = iter(stream)
        batch = next(batches)
        {ending}
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        timeout=240,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (3 if "SystemExit" in ending else 0, "")
