from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.check_report import (
    Contents,
    Facts,
    Film,
    choose_taken,
    contents,
    judge,
    render_table,
    short_limit,
)
from sharding.dump.sources import Image
from tests.sharding.dirty import found

GENRES = ("Drama", "War")
ids = st.integers(0, 12).map(lambda number: f"tt{number}")


@st.composite
def films(draw: st.DrawFn) -> list[Film]:
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

    movies = draw(st.lists(ids, unique=True, max_size=12))
    return [
        choose_taken(movie, [source(f"{movie}.{k}") for k in range(draw(st.integers(1, 3)))])
        for movie in movies
    ]


facts = st.builds(
    Facts,
    vocabulary=st.just(GENRES),
    genres=st.none()
    | st.dictionaries(ids, st.lists(st.sampled_from([*GENRES, "Noir"]), max_size=3).map(tuple)),
    split=st.none() | st.dictionaries(ids, st.sampled_from(["train", "val", "test"])),
)


@given(films(), facts, st.randoms(use_true_random=False))
def test_the_order_of_movies_does_not_matter(films: list[Film], facts: Facts, chance: Any) -> None:
    before = judge(films, facts).to_bytes()
    chance.shuffle(films)
    assert judge(films, facts).to_bytes() == before


@given(films(), facts)
def test_every_movie_of_the_split_is_there_or_missing_and_every_other_is_extra(
    films: list[Film], facts: Facts
) -> None:
    by_key = {finding.key: finding.items for finding in judge(films, facts).findings}
    there = {film.movie for film in films if film.taken.images}
    if facts.split is None:
        assert by_key["missing"] is by_key["extra"] is None
        return
    missing, extra = set(by_key["missing"] or ()), set(by_key["extra"] or ())
    assert missing | (there - extra) == set(facts.split)
    assert not missing & there
    assert extra <= there


@given(films(), facts)
def test_a_movie_with_images_has_its_genres_or_one_reason_why_not(
    films: list[Film], facts: Facts
) -> None:
    report = judge(films, facts)
    by_key = {finding.key: finding.items for finding in report.findings}
    kinds = ("without_metadata", "null_genres", "only_unknown_genres")
    reasons = [movie for kind in kinds for movie in by_key[kind] or ()]
    assert len(reasons) == len(set(reasons))
    for film in films:
        named = set((facts.genres or {}).get(film.movie, ()))
        unlabelled = facts.genres is not None and not named & set(GENRES)
        assert (film.movie in reasons) == (unlabelled and film.taken.images > 0)


@given(films(), facts)
def test_every_report_becomes_a_table_with_each_kind_once(films: list[Film], facts: Facts) -> None:
    report = judge(films, facts)
    lines = render_table(report).splitlines()
    for finding in report.findings:
        assert sum(line.startswith(finding.text + " ") for line in lines) == 1
    assert max(map(len, lines)) <= 100


@given(films(), facts)
def test_the_exit_code_tells_clean_usable_and_unusable(films: list[Film], facts: Facts) -> None:
    report = judge(films, facts)
    whole = [film for film in films if film.n_good > 0]
    if not whole:
        assert report.exit_code == 4
    if report.exit_code == 0:
        assert not found(report)
    assert report.exit_code in (0, 3, 4)


@given(st.lists(st.integers(0, 5000), max_size=30))
def test_a_movie_is_short_below_nine_images_or_a_tenth_of_the_median(images: list[int]) -> None:
    limit = short_limit(images)
    counted = sorted(n for n in images if n)
    assert limit >= 9
    if counted:
        middle = counted[len(counted) // 2] + counted[(len(counted) - 1) // 2]
        assert limit == pytest.approx(max(9, middle / 20))


def test_of_two_sources_more_images_win_and_then_an_archive() -> None:
    tar, folder = Contents("a.tar", images=6), Contents("a", images=6, folder=True)
    more, cut = Contents("240P/a", images=7, folder=True), Contents("0.tar", error="cut")
    assert choose_taken("a", [folder, tar]).taken == tar
    assert choose_taken("a", [cut, folder, tar, more]).taken == more


def test_two_images_of_a_shot_are_too_few_and_three_are_not() -> None:
    images = [Image(shot, image, "", 1, 0, 0) for shot in (1, 2) for image in range(shot + 1)]
    assert contents("a", images, ()).thin == {1: 2}
