"""The rehearsal's dump: real shot counts, dirt from the seed, and what `check` finds in it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from configs.schema import Config
from sharding.check import check_dump
from tests.rehearsal.dump import ABSENT, FRAMES, METADATA, SPLIT, write_dump
from tests.rehearsal.dump_plan import (
    FILM_DIRT,
    FilmDirt,
    ImageDirt,
    built_in_shots,
    choose_films,
    expected_findings,
    plan_films,
)

SHOTS = {f"tt{number:07d}": number for number in range(1, 1101)}


def test_films_are_chosen_over_all_sizes_and_the_same_seed_gives_the_same_dirt() -> None:
    chosen = choose_films(SHOTS, 110)
    assert list(chosen.values()) == list(range(6, 1101, 10))
    films = plan_films(chosen, seed=1)
    assert films == plan_films(chosen, seed=1)
    assert films != plan_films(chosen, seed=2)
    counts = Counter(film.dirt for film in films)
    assert {kind: counts[kind] for kind in FILM_DIRT} == FILM_DIRT
    assert {film.split() for film in films} == {"train", "val", "test", None}


def test_built_in_shot_counts_are_about_those_of_movienet() -> None:
    counts = sorted(built_in_shots(1100).values())
    assert counts[550] == pytest.approx(1385, rel=0.1)
    assert sum(counts) == pytest.approx(1_599_471, rel=0.1)


def test_more_dirty_films_than_films_are_refused() -> None:
    with pytest.raises(ValueError, match="got 3, want at least 45"):
        plan_films({"tt1": 3, "tt2": 3, "tt3": 3}, seed=0)


KINDS: tuple[tuple[FilmDirt, FilmDirt, FilmDirt], ...] = (
    ("truncated", "joined", "odd_name"),
    ("no_images", "twice", "gzip"),
    ("odd_members", "folder", "junk"),
    ("null_genres", "no_metadata", "subfolder"),
    ("broken_metadata", "unknown_genre", "no_split"),
)
BAD: dict[ImageDirt, float] = {"missing": 0.1, "empty": 0.1, "cut": 0.1, "garbage": 0.1}


@pytest.mark.parametrize("kinds", KINDS)
def test_check_names_exactly_the_dirt_of_the_plan(
    tmp_path: Path, kinds: tuple[FilmDirt, ...]
) -> None:
    films = plan_films(
        {"tt0000002": 8, "tt0000003": 9, "tt0000004": 10, "tt0000005": 11},
        seed=3,
        film_dirt=dict.fromkeys(kinds, 1),
        image_dirt=BAD,
    )
    write_dump(tmp_path, films)
    config = Config.model_validate(
        {
            "version": 1,
            "data": {
                "dump": str(tmp_path / FRAMES),
                "metadata": str(tmp_path / METADATA),
                "split": str(tmp_path / SPLIT),
                "root": str(tmp_path / "root"),
            },
            "encoder": {"name": "tower"},
            "training": {"run_name": "run"},
        }
    )
    found = json.loads(check_dump(config, decode=True).to_bytes())["findings"]
    expected = expected_findings(films)
    expected.setdefault("missing", set()).add(ABSENT)
    assert {key: set(found[key]) for key in expected} == expected
    others = {key for key, names in found.items() if names} - set(expected)
    assert others <= {"unknown_genres", "too_many_bad", "short_movies"}
