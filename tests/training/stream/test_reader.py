"""Reading: right bytes in the right place, buffers used again only when nobody holds them."""

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
from training.stream.reader import BufferPool, ReadSlice, ReadStats, WindowReader

FRAMES, BATCH, DIM = 12, 6, 8
SHAPE = (BATCH, FRAMES, DIM)
N_ROWS = [3 + (movie * 37) % 41 for movie in range(40)]  # 3 to 43 rows: shorter and longer ones


@pytest.fixture
def films(make_films: Callable[..., Any]) -> Any:
    return make_films(N_ROWS, dim=DIM)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    gc.collect()
    assert reading_threads() == []


def reading_threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("stream-read")]


def new_ring(keep: int = 5) -> BufferPool:
    return BufferPool(keep=keep)


def fetcher_of(films: Any, ring: BufferPool, shuffle_seed: int | None = None) -> WindowReader:
    return WindowReader(
        films.features,
        films.features.storage,
        ring,
        cut=WindowSpec(FRAMES, shuffle_seed=shuffle_seed),
        threads=3,
        stats=ReadStats(),
    )


def read_all(fetcher: WindowReader, films: Any, epoch: int = 0) -> Iterator[ReadSlice]:
    index = films.features.index
    plan = plan_epoch(SamplingOrder(0, FRAMES, 1, BATCH), films.movies, index.rows, epoch=epoch)
    yield from fetcher.read_ahead((plan.slice(k, 0, 1) for k in range(plan.steps)), prefetch=2)


def expected(films: Any, fetched: ReadSlice) -> np.ndarray[Any, Any]:
    places = zip(fetched.piece.movie.tolist(), fetched.piece.start.tolist(), strict=True)
    return np.stack([films.window(movie, start, FRAMES) for movie, start in places])


def test_every_window_holds_its_rows_and_zeros_beyond_even_in_a_used_buffer(films: Any) -> None:
    ring = new_ring()
    with fetcher_of(films, ring) as fetcher:
        for epoch in range(5):
            for fetched in read_all(fetcher, films, epoch):
                assert np.array_equal(fetched.features_BTD, expected(films, fetched))
    assert ring.made <= 5


def test_a_kept_list_of_batches_stays_right(films: Any) -> None:
    ring = new_ring()
    with fetcher_of(films, ring) as fetcher:
        kept = list(read_all(fetcher, films)) + list(read_all(fetcher, films, epoch=1))
        assert ring.made == len(kept)
        for fetched in kept:
            assert np.array_equal(fetched.features_BTD, expected(films, fetched))


def content(kept: Any) -> str:
    return kept.tobytes().hex() if isinstance(kept, memoryview) else str(kept.tolist())


@pytest.mark.parametrize(
    "piece_of",
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
def test_any_view_of_a_batch_keeps_its_buffer_out_of_the_ring(
    films: Any, piece_of: Callable[[Any], Any]
) -> None:
    ring = new_ring()
    with fetcher_of(films, ring) as fetcher:
        batches = read_all(fetcher, films)
        kept = piece_of(next(batches).features_BTD)
        before = content(kept)
        for epoch in range(3):
            for _ in read_all(fetcher, films, epoch):
                pass
        assert content(kept) == before


def test_a_buffer_comes_back_when_the_last_view_of_its_batch_is_gone() -> None:
    ring = new_ring()
    lent = ring.take(SHAPE)
    address = lent.features_BTD.ctypes.data
    tensor = torch.from_numpy(lent.features_BTD)
    part = tensor[1:2]
    del lent, tensor
    assert ring.take(SHAPE).features_BTD.ctypes.data != address
    del part
    addresses = {ring.take(SHAPE).features_BTD.ctypes.data for _ in range(1)}
    kept = [ring.take(SHAPE) for _ in range(2)]
    assert address in addresses | {each.features_BTD.ctypes.data for each in kept}
    assert ring.made == 2


def test_the_ring_keeps_no_more_free_buffers_than_it_was_told() -> None:
    ring = new_ring(keep=2)
    lent = [ring.take(SHAPE) for _ in range(6)]
    del lent
    again = [ring.take(SHAPE) for _ in range(3)]
    assert ring.made == 7
    assert len(again) == 3


def test_permuted_rows_are_a_window_of_the_permuted_movie(films: Any) -> None:
    with fetcher_of(films, new_ring(), shuffle_seed=9) as fetcher:
        for fetched in read_all(fetcher, films):
            piece = fetched.piece
            for window, movie, start in zip(
                fetched.features_BTD, piece.movie.tolist(), piece.start.tolist(), strict=True
            ):
                permuted = films.rows[movie][frame_order(9, movie, N_ROWS[movie])]
                rows = permuted[start : start + FRAMES]
                assert np.array_equal(window[: len(rows)], rows)
                assert not window[len(rows) :].any()


class Failing(MemoryStorage):
    """Fails once ``after`` windows are read."""

    def __init__(self, files: dict[str, bytes], after: int) -> None:
        super().__init__()
        self.files, self.left = files, after

    def read_into(self, ranges: Sequence[Range], buffers: Sequence[memoryview]) -> None:
        self.left -= len(ranges)
        if self.left < 0:
            raise DataError("features-00001.tar: got 3 bytes at 512, want 192; verify the set")
        super().read_into(ranges, buffers)


@pytest.mark.parametrize("after", [0, 5, 20])
def test_an_error_in_a_thread_reaches_the_consumer_as_it_is(films: Any, after: int) -> None:
    storage = Failing(films.features.storage.files, after)
    broken = replace(films, features=replace(films.features, storage=storage))
    with (
        pytest.raises(DataError, match="got 3 bytes at 512"),
        fetcher_of(broken, new_ring()) as fetcher,
    ):
        list(read_all(fetcher, broken))


def test_a_cut_shard_is_one_line(films: Any) -> None:
    storage = MemoryStorage()
    storage.files = {name: data[:1200] for name, data in films.features.storage.files.items()}
    broken = replace(films, features=replace(films.features, storage=storage))
    with pytest.raises(DataError) as caught, fetcher_of(broken, new_ring()) as fetcher:
        list(read_all(fetcher, broken))
    assert len(str(caught.value).splitlines()) == 1


class Slow(MemoryStorage):
    """Takes its time."""

    def read_into(self, ranges: Sequence[Range], buffers: Sequence[memoryview]) -> None:
        time.sleep(0.02)
        super().read_into(ranges, buffers)


def test_an_iteration_left_midway_stops_its_threads_without_reading_the_rest(films: Any) -> None:
    storage = Slow()
    storage.files = films.features.storage.files
    slow = replace(films, features=replace(films.features, storage=storage))
    with fetcher_of(slow, new_ring()) as fetcher:
        next(read_all(fetcher, slow))
        assert len(reading_threads()) == 3
    assert reading_threads() == []


def test_what_is_read_ahead_is_never_more_than_prefetch_and_one(films: Any) -> None:
    ring = new_ring()
    with fetcher_of(films, ring) as fetcher:
        batches = read_all(fetcher, films)
        held = next(batches)
        assert ring.made == 3
        del held


def test_a_forked_child_is_refused_in_one_line(films: Any) -> None:
    """The child really is forked; it answers through a pipe and leaves at once."""
    read_end, write_end = os.pipe()
    with fetcher_of(films, new_ring()) as fetcher:
        batches = read_all(fetcher, films)
        next(batches)
        child = os.fork()
        if child == 0:
            try:
                next(batches)
                answer = "read on"
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


@pytest.mark.parametrize("ending", ["", "raise SystemExit(3)"])
def test_a_program_that_ends_in_the_middle_of_an_iteration_ends_at_once(
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
        kept = next(batches)
        {ending}
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        timeout=240,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (3 if "SystemExit" in ending else 0, "")
