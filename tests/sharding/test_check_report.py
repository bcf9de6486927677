from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.check_report import (
    CheckedMovie,
    Contents,
    Facts,
    choose_source,
    contents,
    judge,
    render_table,
    short_limit,
)
from sharding.dump.sources import Image
from tests.sharding.dirty import findings_of

GENRES = ("Drama", "War")
ids = st.integers(0, 12).map(lambda number: f"tt{number}")


@st.composite
def checked_movies(draw: st.DrawFn) -> list[CheckedMovie]:
    def source(name: str) -> Contents:
        images = [
            Image(shot, image, "", size, 0, 0)
            for shot, image, size in draw(
                st.lists(
                    st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, 2)),
                    unique_by=lambda image: image[:2],
                    max_size=20,
                )
            )
        ]
        error = draw(st.sampled_from(["", "", "cut"])) if not images else ""
        return Contents(name, error=error) if error else contents(name, images, ())

    return [
        choose_source(movie, [source(f"{movie}.{k}") for k in range(draw(st.integers(1, 3)))])
        for movie in draw(st.lists(ids, unique=True, max_size=12))
    ]


facts = st.builds(
    Facts,
    vocabulary=st.just(GENRES),
    genres=st.none()
    | st.dictionaries(ids, st.lists(st.sampled_from([*GENRES, "Noir"]), max_size=3).map(tuple)),
    split=st.none() | st.dictionaries(ids, st.sampled_from(["train", "val", "test"])),
)


@pytest.mark.slow
@given(checked_movies(), facts, st.randoms(use_true_random=False))
def test_the_order_of_movies_does_not_matter(
    movies: list[CheckedMovie], facts: Facts, chance: Any
) -> None:
    before = judge(movies, facts).to_bytes()
    chance.shuffle(movies)
    assert judge(movies, facts).to_bytes() == before


@pytest.mark.slow
@given(checked_movies(), facts)
def test_each_movie_of_the_split_is_present_or_missing_and_each_other_one_is_extra(
    movies: list[CheckedMovie], facts: Facts
) -> None:
    by_key = {finding.key: finding.items for finding in judge(movies, facts).findings}
    present = {movie.movie for movie in movies if movie.chosen.images}
    if facts.split is None:
        assert by_key["missing"] is by_key["extra"] is None
        return
    missing, extra = set(by_key["missing"] or ()), set(by_key["extra"] or ())
    assert missing | (present - extra) == set(facts.split)
    assert not missing & present
    assert extra <= present


@given(checked_movies(), facts)
def test_a_movie_with_images_has_genres_or_exactly_one_reason_against_it(
    movies: list[CheckedMovie], facts: Facts
) -> None:
    report = judge(movies, facts)
    by_key = {finding.key: finding.items for finding in report.findings}
    kinds = ("without_metadata", "null_genres", "only_unknown_genres")
    reasons = [movie for kind in kinds for movie in by_key[kind] or ()]
    assert len(reasons) == len(set(reasons))
    for movie in movies:
        named = set((facts.genres or {}).get(movie.movie, ()))
        unlabelled = facts.genres is not None and not named & set(GENRES)
        assert (movie.movie in reasons) == (unlabelled and movie.chosen.images > 0)


@given(checked_movies(), facts)
def test_the_table_has_80_columns_and_one_row_per_kind_of_defect(
    movies: list[CheckedMovie], facts: Facts
) -> None:
    report = judge(movies, facts)
    lines = render_table(report).splitlines()
    for finding in report.findings:
        assert sum(line.startswith(finding.text + " ") for line in lines) == 1
    assert max(map(len, lines)) <= 80


@given(checked_movies(), facts)
def test_the_exit_code_is_that_of_clean_usable_or_unusable(
    movies: list[CheckedMovie], facts: Facts
) -> None:
    report = judge(movies, facts)
    if not any(movie.n_good > 0 for movie in movies):
        assert report.exit_code == 4
    if report.exit_code == 0:
        assert not findings_of(report)
    assert report.exit_code in (0, 3, 4)


@given(st.lists(st.integers(0, 5000), max_size=30))
def test_a_movie_is_short_below_nine_images_or_a_tenth_of_the_median(images: list[int]) -> None:
    limit = short_limit(images)
    counted = sorted(n for n in images if n)
    assert limit >= 9
    if counted:
        middle = counted[len(counted) // 2] + counted[(len(counted) - 1) // 2]
        assert limit == pytest.approx(max(9, middle / 20))


def test_of_two_sources_the_one_with_more_images_wins_then_the_archive() -> None:
    tar, folder = Contents("a.tar", images=6), Contents("a", images=6, folder=True)
    larger, truncated = Contents("240P/a", images=7, folder=True), Contents("0.tar", error="cut")
    assert choose_source("a", [folder, tar]).chosen == tar
    assert choose_source("a", [truncated, folder, tar, larger]).chosen == larger


def test_two_images_of_a_shot_are_too_few_and_three_are_not() -> None:
    images = [Image(shot, image, "", 1, 0, 0) for shot in (1, 2) for image in range(shot + 1)]
    assert contents("a", images, ()).thin == {1: 2}
