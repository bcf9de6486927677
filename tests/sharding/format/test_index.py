from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import DataError
from sharding.format.index import FeatureIndex, FrameIndex
from tests.damage import damaged, reads_or_reports
from tests.sharding.films import is_silent_or_one_line
from tests.sharding.format.values import ids


@given(st.integers(0, 20), st.integers(0, 2**16))
def test_a_frame_index_is_restored_from_its_bytes(n: int, seed: int) -> None:
    raw = np.random.default_rng(seed).integers(0, 2**15, (5, n))
    dtypes: list[Any] = [np.uint64, np.uint32, np.uint32, np.int32, np.int16]
    index = FrameIndex(*(row.astype(dtype) for row, dtype in zip(raw, dtypes, strict=True)))
    restored = FrameIndex.from_bytes(index.to_bytes(), "index")
    for name in ("offset", "size", "movie", "shot", "image"):
        np.testing.assert_array_equal(getattr(restored, name), getattr(index, name), strict=True)


@given(st.lists(ids, max_size=6))
def test_a_feature_index_is_restored_from_its_bytes(movies: list[str]) -> None:
    n = np.arange(len(movies))
    names = np.array([movie.encode() for movie in movies], dtype=np.bytes_)
    index = FeatureIndex(
        names, n.astype(np.uint32), (n * 2**33).astype(np.uint64), n.astype(np.uint32)
    )
    restored = FeatureIndex.from_bytes(index.to_bytes(), "index")
    assert restored.movies == tuple(movies)
    np.testing.assert_array_equal(restored.offset, index.offset, strict=True)
    wide = FeatureIndex(names.astype("S99"), index.shard, index.offset, index.rows)
    assert wide.to_bytes() == index.to_bytes()


@given(st.data())
def test_an_index_with_one_changed_byte_is_refused_or_equal(data: st.DataObject) -> None:
    n = np.arange(4)
    index = FrameIndex(
        n.astype(np.uint64),
        n.astype(np.uint32),
        n.astype(np.uint32),
        n.astype(np.int32),
        n.astype(np.int16),
    )
    corrupt = bytearray(index.to_bytes())
    at = data.draw(st.integers(0, len(corrupt) - 1))
    corrupt[at] ^= data.draw(st.integers(1, 255))

    def read() -> None:
        restored = FrameIndex.from_bytes(bytes(corrupt), "index")
        np.testing.assert_array_equal(restored.offset, index.offset)

    assert is_silent_or_one_line(read)


@given(st.data())
def test_a_damaged_feature_index_is_read_or_a_one_line_error(data: st.DataObject) -> None:
    n = np.arange(3)
    index = FeatureIndex(
        np.array([b"tt1", b"tt2", b"tt3"]),
        n.astype(np.uint32),
        n.astype(np.uint64),
        n.astype(np.uint32),
    )
    corrupt = data.draw(damaged(index.to_bytes()))
    assert reads_or_reports(lambda: FeatureIndex.from_bytes(corrupt, "index").movies)


def test_the_ids_are_checked_when_an_index_is_opened_and_decoded_when_they_are_used() -> None:
    n = np.arange(2)
    columns = (n.astype(np.uint32), n.astype(np.uint64), n.astype(np.uint32))
    index = FeatureIndex.from_bytes(FeatureIndex(np.array([b"a", b"b"]), *columns).to_bytes(), "i")
    assert "movies" not in vars(index)
    assert index.movies == ("a", "b")
    foreign = FeatureIndex(np.array([b"a", b"\xe9"]), *columns).to_bytes()
    with pytest.raises(DataError, match=r"^i: movie_id: got bytes outside ASCII; "):
        FeatureIndex.from_bytes(foreign, "i")
