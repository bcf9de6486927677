"""What the rehearsal's dump contains, dirt included: a function of shot counts and a seed alone.

Each film has at most one kind of dirt of its source or labels, and any of its images may be bad.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sharding.format.names import movie_id

FilmDirt = Literal[
    "clean",
    "folder",
    "gzip",
    "subfolder",
    "joined",
    "twice",
    "truncated",
    "no_images",
    "junk",
    "odd_members",
    "odd_name",
    "null_genres",
    "no_metadata",
    "broken_metadata",
    "unknown_genre",
    "no_split",
]
ImageDirt = Literal["missing", "empty", "cut", "garbage"]

FILM_DIRT: Mapping[FilmDirt, int] = {
    "folder": 7,
    "gzip": 3,
    "subfolder": 10,
    "joined": 2,
    "twice": 2,
    "truncated": 1,
    "no_images": 1,
    "junk": 8,
    "odd_members": 4,
    "odd_name": 2,
    "null_genres": 1,
    "no_metadata": 1,
    "broken_metadata": 1,
    "unknown_genre": 1,
    "no_split": 1,
}
"""Films of each kind among 110; the others are clean tars."""

IMAGE_DIRT: Mapping[ImageDirt, float] = {
    "missing": 5e-4,
    "empty": 1e-4,
    "cut": 2e-4,
    "garbage": 1e-4,
}
"""Probability of each defect of an image."""

IMAGES = 3
"""Images per shot."""

NOTES, LINK = "notes.txt", "shot_9999_img_0.jpg"
"""Members of ``odd_members``: a text, and a symbolic link that is named like an image."""

_WITHOUT_SPLIT: frozenset[FilmDirt] = frozenset({"no_split"})
_UNREADABLE: frozenset[FilmDirt] = frozenset({"truncated", "no_images"})
_SPLITS = ("train",) * 6 + ("val",) * 2 + ("test",) * 2

Slot = tuple[int, int]
"""Shot and image."""


@dataclass(frozen=True)
class Film:
    """One film of the dump."""

    number: int
    name: str
    """In the dump; its id is ``movie_id(name)``."""

    shots: int
    dirt: FilmDirt
    bad: Mapping[Slot, ImageDirt]

    @property
    def images(self) -> list[Slot]:
        """The images that the dump contains, intact or not."""
        slots = ((shot, image) for shot in range(self.shots) for image in range(IMAGES))
        return [slot for slot in slots if self.bad.get(slot) != "missing"]

    def split(self) -> str | None:
        """Return the split of the film; None if it is in none."""
        return None if self.dirt in _WITHOUT_SPLIT else _SPLITS[self.number % len(_SPLITS)]


def choose_films(shots: Mapping[str, int], n: int) -> dict[str, int]:
    """Return the shot counts of ``n`` films at equal distances in order of size."""
    ordered = sorted(shots, key=lambda film: (shots[film], film))
    chosen = [ordered[(2 * k + 1) * len(ordered) // (2 * n)] for k in range(n)]
    return {film: shots[film] for film in sorted(chosen)}


def built_in_shots(n: int) -> dict[str, int]:
    """Return shot counts with about the median and mean of MovieNet's, where those are absent."""
    generator = random.Random(23)
    draws = (generator.lognormvariate(7.23, 0.5) for _ in range(n))
    return {f"tt{9_100_000 + k}": min(4043, max(24, int(draw))) for k, draw in enumerate(draws)}


def plan_films(
    shots: Mapping[str, int],
    seed: int,
    film_dirt: Mapping[FilmDirt, int] = FILM_DIRT,
    image_dirt: Mapping[ImageDirt, float] = IMAGE_DIRT,
) -> tuple[Film, ...]:
    """Return the films of a dump in order of id.

    Raises:
        ValueError: there are fewer films than dirty ones.
    """
    names = sorted(shots)
    kinds: list[FilmDirt] = [kind for kind, n in film_dirt.items() for _ in range(n)]
    if len(kinds) > len(names):
        raise ValueError(f"films: got {len(names)}, want at least {len(kinds)}")
    dirty = random.Random(seed).sample(names, len(kinds))
    kind_of = dict(zip(dirty, kinds, strict=True))
    return tuple(
        _plan_film(number, name, shots[name], kind_of.get(name, "clean"), seed, image_dirt)
        for number, name in enumerate(names)
    )


def _plan_film(
    number: int,
    name: str,
    shots: int,
    dirt: FilmDirt,
    seed: int,
    image_dirt: Mapping[ImageDirt, float],
) -> Film:
    generator, bad = random.Random(f"{seed} {name}"), dict[Slot, ImageDirt]()
    for shot in range(shots):
        for image in range(IMAGES):
            if drawn := _draw(generator.random(), image_dirt):
                bad[shot, image] = drawn
    return Film(number, f"{name} (cut 2)" if dirt == "odd_name" else name, shots, dirt, bad)


def _draw(value: float, image_dirt: Mapping[ImageDirt, float]) -> ImageDirt | None:
    for kind, share in image_dirt.items():
        if value < share:
            return kind
        value -= share
    return None


def expected_findings(films: Sequence[Film]) -> dict[str, set[str]]:
    """Return what ``movienet-shard check --decode`` must name, by the key of the finding."""
    findings: dict[str, set[str]] = defaultdict(set)
    for film in films:
        movie = movie_id(film.name)
        for key, name in _film_findings(film, movie):
            findings[key].add(name)
        if film.dirt not in _UNREADABLE:
            for key, name in _image_findings(film, movie):
                findings[key].add(name)
    return dict(findings)


def _film_findings(film: Film, movie: str) -> list[tuple[str, str]]:
    found: dict[FilmDirt, list[tuple[str, str]]] = {
        "truncated": [("unreadable", f"{film.name}.tar")],
        "no_images": [("without_images", movie), ("misnamed_images", movie)],
        "joined": [("joined_tars", f"{film.name}.tar")],
        "twice": [("twice", movie)],
        "odd_members": [
            ("odd_members", f"{movie}/{film.name}/{NOTES}"),
            ("unreadable_images", f"{movie}/{film.name}/{LINK}"),
        ],
        "null_genres": [("null_genres", movie)],
        "no_metadata": [("without_metadata", movie)],
        "broken_metadata": [("damaged_metadata", movie)],
        "unknown_genre": [("only_unknown_genres", movie)],
        "no_split": [("extra", movie)],
    }
    missing = [("missing", movie)] if film.dirt in _UNREADABLE else []
    return found.get(film.dirt, []) + missing


def _image_findings(film: Film, movie: str) -> list[tuple[str, str]]:
    keys = {"empty": "empty_images", "cut": "undecodable_images", "garbage": "undecodable_images"}
    found = [
        (keys[kind], f"{movie}/shot_{shot:04d}_img_{image}.jpg")
        for (shot, image), kind in film.bad.items()
        if kind in keys
    ]
    lost = [shot for (shot, _), kind in film.bad.items() if kind == "missing"]
    thin = {shot for shot in lost if lost.count(shot) < IMAGES}
    return found + [("thin_shots", f"{movie}/shot_{shot:04d}") for shot in thin]
