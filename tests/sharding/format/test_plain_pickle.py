"""Pickles: plain data round-trips, code never runs, and damage is one line."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from configs.errors import DataError
from sharding.format.plain_pickle import load_pickle
from tests.damage import damaged, reads_or_reports


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch hostile",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_hostile_pickle_runs_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"contains (posix|nt)\.system, want only"):
        load_pickle(pickle.dumps({"a": Hostile()}, protocol), "m.pkl")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "data",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cbuiltins\ngetattr\n(S'1'\nS'join'\ntR.",
        b"c__builtin__\n__import__\n(S'os'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.",
        pickle.dumps(OrderedDict(a=1)),
        pickle.dumps(Path("x")),
    ],
)
def test_a_pickle_may_contain_only_plain_data(data: bytes) -> None:
    with pytest.raises(DataError, match=r"m\.pkl: not a valid pickle"):
        load_pickle(data, "m.pkl")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.binary(max_size=5)
    | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner)
    | st.tuples(inner) | st.frozensets(st.integers()),
    max_leaves=6,
)  # fmt: skip


@given(plain, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_data_round_trips_through_a_pickle(value: object, protocol: int) -> None:
    assert load_pickle(pickle.dumps(value, protocol), "m.pkl") == value


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_movies_may_share_a_record_or_a_tuple_of_tuples(protocol: int) -> None:
    record, cast = {"genres": ["Drama"]}, (("Ann", 1), ("Bob", 2))
    content = {
        "tt1": record,
        "tt2": record,
        "tt3": [cast, {cast}],
        "tt4": [cast, frozenset([cast])],
    }
    assert load_pickle(pickle.dumps(content, protocol), "m.pkl") == content


def test_shared_values_are_counted_each_time_and_a_cycle_is_refused() -> None:
    many = [["Drama"] * 1000] * 1000
    assert load_pickle(pickle.dumps(many), "m.pkl") == many
    too_many = r"^m\.pkl: contains more than 10,000,000 values, a list counted each time .*; write"
    with pytest.raises(DataError, match=too_many):
        load_pickle(pickle.dumps([many] * 10), "m.pkl")
    cycle: list[object] = ["Drama"]
    cycle.append({"tt1": cycle})
    with pytest.raises(DataError, match=r"^m\.pkl: contains a list that contains itself; write"):
        load_pickle(pickle.dumps(cycle), "m.pkl")


def test_hashing_a_shared_value_again_and_again_is_refused() -> None:
    pair: object = ("Drama",)
    for _ in range(18):
        pair = (pair, pair)
    keys = [{pair: 1} for _ in range(20)]
    sets = [frozenset([pair, number]) for number in range(20)]
    for content, protocol in ((keys, 4), (sets, 4), (sets, 2)):
        with pytest.raises(DataError, match="more than 10,000,000 values"):
            load_pickle(pickle.dumps(content, protocol), "m.pkl")


@given(hnp.arrays(st.sampled_from(["u1", "<f4", "i8", "?"]), 3), st.integers(0, 5))
def test_numpy_arrays_and_scalars_round_trip_through_a_pickle(
    array: np.ndarray, protocol: int
) -> None:
    read = load_pickle(pickle.dumps([array, array[0]], protocol), "m.pkl")
    np.testing.assert_equal(read, [array.tolist(), array[0].item()])


@given(st.data(), st.integers(0, 5))
def test_a_damaged_pickle_is_read_or_a_one_line_error(data: st.DataObject, protocol: int) -> None:
    content = {"tt1": ["Drama"], "tt2": np.array([1, 0]), "tt3": [np.float32(1), b"x", 2.5]}
    corrupt = data.draw(damaged(pickle.dumps(content, protocol)))
    assert reads_or_reports(lambda: load_pickle(corrupt, "m.pkl"))
