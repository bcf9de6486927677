from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import DataError
from configs.load import load_config
from sharding.format.plan import Plan
from sharding.plan import (
    Movie,
    can_extend,
    choose,
    difference,
    exclude_override,
    excluded_movies,
    extend_plan,
    ids_by_name,
    make_plan,
    plan_shards,
)

movies = st.lists(st.integers(0, 2_000), max_size=30).map(
    lambda sizes: [Movie(f"tt{k:03d}", "", "", "", 1, size) for k, size in enumerate(sizes)]
)


@given(movies, st.integers(1, 10**4))
def test_every_movie_is_in_exactly_one_shard_in_order_of_id(
    movies: list[Movie], shard_bytes: int
) -> None:
    plan = plan_shards(movies, shard_bytes=shard_bytes)
    assert [movie for shard in plan for movie in shard] == movies
    assert all(plan)


@given(movies, st.integers(1, 10**4))
def test_only_a_shard_of_a_single_movie_exceeds_the_target_size(
    movies: list[Movie], shard_bytes: int
) -> None:
    for shard in plan_shards(movies, shard_bytes=shard_bytes):
        content = sum(movie.n_bytes for movie in shard)
        heavy = [movie for movie in shard if movie.n_bytes]
        assert content <= shard_bytes or len(heavy) == 1


@given(movies, st.integers(1, 10**4))
def test_a_shard_is_closed_only_when_the_next_movie_does_not_fit(
    movies: list[Movie], shard_bytes: int
) -> None:
    shards = plan_shards(movies, shard_bytes=shard_bytes)
    for shard, following in pairwise(shards):
        content = sum(movie.n_bytes for movie in shard)
        assert content + following[0].n_bytes > shard_bytes


def test_a_shard_size_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="shard_bytes: got 0, want at least 1"):
        plan_shards([], shard_bytes=0)


@given(movies, st.randoms(use_true_random=False), st.integers(1, 10**4))
def test_the_plan_does_not_depend_on_the_listing_order(
    movies: list[Movie], chance: object, shard_bytes: int
) -> None:
    shuffled = list(movies)
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    plan = make_plan(shuffled, shard_bytes=shard_bytes)
    assert plan == make_plan(movies, shard_bytes=shard_bytes)
    assert Plan.from_bytes(plan.to_bytes(), "plan") == plan


def test_the_input_digest_is_stable_across_releases() -> None:
    # Golden: another value would force users to rebuild every existing set.
    movie = Movie("tt1", "tt1", "240P/tt1.tar", "9:8", 3, 400)
    assert (
        make_plan([movie], shard_bytes=1_000).input_digest(0)
        == "33feb25881495d3347325244fb650041bd260e2414c80f1c64f09bde36dbc5f8"
    )


def test_the_input_digest_depends_only_on_the_fingerprints_of_its_own_shard() -> None:
    old = [Movie("a", "a", "a", "1", 1, 6), Movie("b", "b", "b", "1", 1, 6)]
    new = [old[0], Movie("b", "b", "b", "2", 1, 6)]
    before, after = (make_plan(movies, shard_bytes=6) for movies in (old, new))
    assert before.input_digest(0) == after.input_digest(0)
    assert before.input_digest(1) != after.input_digest(1)
    assert difference(before, after) == "1 changed (b)"


def test_a_movie_that_only_moves_to_another_shard_is_not_changed() -> None:
    old = [Movie(name, name, name, "1", 1, 6) for name in "bcd"]
    before = make_plan(old, shard_bytes=6)
    grown = make_plan([Movie("a", "a", "a", "1", 1, 6), *old], shard_bytes=6)
    assert [movie.shard for movie in grown.movies if movie.movie != "a"] == [1, 2, 3]
    assert difference(before, grown) == "1 new (a)"
    assert can_extend(before, grown)
    assert difference(grown, before) == "1 removed (a)"
    assert not can_extend(grown, before)


def test_a_limit_selects_ids_and_an_unknown_id_is_refused_with_the_nearest_ones() -> None:
    ids = ("tt001", "tt002", "x_a_20b")
    assert choose(ids, ("x_a_20b", "tt001")) == ("tt001", "x_a_20b")
    assert choose(ids, ("a b",)) == ("x_a_20b",)
    with pytest.raises(DataError, match=r"data.limit: no movie 'tt01' .*did you mean tt001"):
        choose(ids, ("tt001", "tt01"))


def test_an_excluded_movie_counts_until_its_shard_was_sealed_before_an_extension() -> None:
    movies = [Movie(name, name, name, "1", 1, 6) for name in ("tt1", "tt2", "tt3")]
    old = make_plan(movies[:2], shard_bytes=6)
    assert excluded_movies(old, ["tt2", "tt3"]) == ["tt2"]
    extended = extend_plan(old, movies, parent="ab")
    assert excluded_movies(extended, ["tt2", "tt3"]) == ["tt3"]


def test_two_names_with_the_same_id_are_refused() -> None:
    assert ids_by_name(["b", "a b"]) == {"b": "b", "a b": "x_a_20b"}
    with pytest.raises(DataError, match="both get the id x_a_20b"):
        ids_by_name(["x_a_20b", "a b"])


def test_a_suggested_override_excludes_exactly_the_named_movies() -> None:
    assert exclude_override(["tt1", "x_a_2c"]) == "data.exclude=[tt1, x_a_2c]"
    names = ("Heat, 1995", "[REC]", "#1", "Alien: 3", "null", "True", "007", "1e3", '"Q"', "-", "é")
    assert load_config(Path("demo"), [exclude_override(names)]).data.exclude == names
