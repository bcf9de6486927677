from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import DataError
from sharding.format.names import array_list, movie_id, movie_name, shard_name
from tests.sharding.format.values import texts


@pytest.mark.parametrize("name", ["", "\ud800tt3", "x" * 65])
def test_a_name_without_an_id_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(DataError, match=r"^movie '[^\n]*': the name cannot become an id"):
        movie_id(name)


@given(texts.filter(bool))
def test_a_name_is_restored_from_its_id(name: str) -> None:
    try:
        written = movie_id(name)
    except DataError:
        return
    assert written == name or movie_name(written) == name


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("tt0032138", "tt0032138"),
        ("a.b", "x_a_2eb"),
        ("Amélie 2001", "x_Am_c3_a9lie_202001"),
        ("..", "x__2e_2e"),
        ("a_b c", "x_a_5fb_20c"),
    ],
)
def test_a_name_that_is_not_a_valid_id_is_escaped(name: str, written: str) -> None:
    assert movie_id(name) == written


@pytest.mark.parametrize("name", ["", "a" * 65, "é" * 20])
def test_a_name_that_cannot_become_an_id_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="rename its source"):
        movie_id(name)


@given(st.sets(st.integers(0, 40)))
def test_an_array_list_contains_exactly_the_given_numbers(numbers: set[int]) -> None:
    listed: list[int] = []
    for span in filter(None, array_list(numbers).split(",")):
        first, _, last = span.partition("-")
        listed += range(int(first), int(last or first) + 1)
    assert listed == sorted(numbers)


def test_an_array_list_merges_runs_of_numbers() -> None:
    assert array_list([7, 1, 0, 2, 9]) == "0-2,7,9"


def test_a_shard_name_has_five_digits() -> None:
    assert shard_name("frames", 7) == "frames-00007"
