from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import DataError
from sharding.format.names import array_list, movie_id, movie_name, shard_name
from tests.sharding.format.values import texts


@given(texts.filter(bool))
def test_a_name_comes_back_from_its_id(name: str) -> None:
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
def test_names_that_are_no_ids_are_mapped(name: str, written: str) -> None:
    assert movie_id(name) == written


@pytest.mark.parametrize("name", ["", "a" * 65, "é" * 20])
def test_a_name_that_gives_no_id_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="rename its source"):
        movie_id(name)


@given(st.sets(st.integers(0, 40)))
def test_an_array_list_names_just_these_numbers(numbers: set[int]) -> None:
    named: list[int] = []
    for part in filter(None, array_list(numbers).split(",")):
        first, _, last = part.partition("-")
        named += range(int(first), int(last or first) + 1)
    assert named == sorted(numbers)


def test_an_array_list_is_short() -> None:
    assert array_list([7, 1, 0, 2, 9]) == "0-2,7,9"
    assert shard_name("frames", 7) == "frames-00007"
