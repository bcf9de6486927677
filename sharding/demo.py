"""The mini dump: short synthetic films in MovieNet's layout, from a seed, in seconds.

A film is a row of scenes of two shots, one dark and one light, in one colour. Four genres are told
by what a frame looks like: each lights up one corner of every frame. Four others are told by order
alone: each owns a colour, and in its scenes the light comes (dark, then light) where the film has
the genre and goes (light, then dark) where it has not. Such a film with and without the genre
consists of the same JPEGs, byte for byte: no mean over frames, no histogram, nothing but their
order tells. Every film shows every colour, so which scenes there are tells nothing either.

Colours, corners and light are strong enough to survive an image tower with untrained weights.

S = shots of a film, I = images a shot, H, W = pixels, C = 3 (RGB).
"""

from __future__ import annotations

import colorsys
import json
import logging
import tarfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from configs.errors import DataError
from configs.runtime.progress import progress
from configs.runtime.publish import publishing_folder

logger = logging.getLogger(__name__)

FRAMES, METADATA, SPLIT = "240P", "meta", "split.json"
"""Names in the mini dump: what ``data.dump``, ``data.metadata`` and ``data.split`` point to."""

LOOK_GENRES = ("Horror", "Sci-Fi", "War", "Western")
"""Told by what every frame looks like: one bright corner each."""

ORDER_GENRES = ("Comedy", "Romance", "Thriller", "Mystery")
"""Told by the order of frames alone: one colour each, in which the light comes or goes."""

N_FILMS = 480
"""With the cycle below: 320 to learn from, 120 to measure on, 40 kept for last."""

SPLIT_CYCLE = ("train",) * 8 + ("val",) * 3 + ("test",)
"""Splits of consecutive films; short, so that the first few films are of every split."""

FOLDER_EVERY = 16
"""Every so many-th film is a folder of images, the others are tars; both forms occur."""

SHOTS = (8, 24)
"""Fewest and most shots of a film. The fewest hold one scene of each order genre."""

IMAGES = 3
"""Images a shot, as in MovieNet."""

HEIGHT, WIDTH = 48, 64
"""Pixels: small, so that 23,000 images decode in seconds, but more than the tower's 32."""

QUALITY = 90
"""Of the JPEGs; enough that an image is its shot and not its artefacts."""

LOOK_SHARE, ORDER_SHARE = 0.35, 0.4
"""Chance that a film has a genre: far from rare, so that 120 films measure each."""

DARK, LIGHT, NEUTRAL = 0.3, 0.8, 0.5
"""Brightness of the two shots of a scene, and of the odd shot that ends some films."""

CORNER = 12
"""Height in pixels of the two corners at the top and the two at the bottom; half as wide as the
picture, so that they are seen after a square crop of its middle."""

SHOT_COLOUR, SHOT_SLOPE, FILM_TINT, FILM_CORNER, IMAGE_NOISE = 0.05, 0.06, 0.1, 0.1, 0.03
"""Standard deviations, in parts of full brightness: a shot's own colour and its gradient across the
picture, a film's tint and its unlit corners, and what tells the three images of a shot apart."""

_VERSION = 1
_MARK = "demo.json"
_LABELS, _LOOKS = 0, 1


@dataclass(frozen=True)
class Film:
    """One synthetic film."""

    movie: str
    genres: tuple[str, ...]
    jpegs: Mapping[str, bytes]
    """By file name, ``shot_0000_img_0.jpg``, in order of shot and image."""


def make_demo(out: Path, *, seed: int = 0) -> None:
    """Write the mini dump; one that is there already, of the same seed, is left as it is.

    Args:
        out: Folder to become the dump: ``240P/`` with one tar or one folder a film, ``meta/`` with
            one JSON a film, and ``split.json``. Whole or absent, also after a kill.
        seed: Another seed, another dump; the same seed, the same bytes.

    Raises:
        DataError: ``out`` holds something else; it is left alone.
    """
    mark = _json({"demo": _VERSION, "seed": seed})
    if _is_done(out, mark):
        logger.info("%s: the mini dump of seed %d is there already", out, seed)
        return
    split: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    with publishing_folder(out) as folder, progress(N_FILMS, label="demo", unit="films") as bar:
        (folder / FRAMES).mkdir()
        (folder / METADATA).mkdir()
        for number in range(N_FILMS):
            film = make_film(number, seed=seed)
            _write_frames(film, folder / FRAMES, as_folder=number % FOLDER_EVERY == 0)
            facts = {"imdb_id": film.movie, "title": f"Demo {number + 1}", "genres": film.genres}
            (folder / METADATA / f"{film.movie}.json").write_bytes(_json(facts))
            split[SPLIT_CYCLE[number % len(SPLIT_CYCLE)]].append(film.movie)
            bar.advance()
        (folder / SPLIT).write_bytes(_json(split))
        (folder / _MARK).write_bytes(mark)


def make_film(number: int, *, seed: int = 0, genres: Collection[str] | None = None) -> Film:
    """Make one film.

    Args:
        number: Which film, from 0.
        seed: Seed of the dump.
        genres: Its genres instead of drawn ones. What else is drawn does not depend on them.
    """
    if genres is None:
        genres = _draw_genres(_generator(seed, number, _LABELS))
    generator = _generator(seed, number, _LOOKS)
    n_shots = int(generator.integers(SHOTS[0], SHOTS[1] + 1))
    # Scenes go round the colours in an order of the film's own: all occur, none twice in a row.
    colours = generator.permutation(len(ORDER_GENRES))
    scenes = [int(colours[i % len(colours)]) for i in range(n_shots // 2)]
    pictures_SIHWC = _draw_pictures(generator, scenes, n_shots, genres)
    order_S = np.arange(n_shots)
    for i, colour in enumerate(scenes):
        if ORDER_GENRES[colour] not in genres:
            order_S[[2 * i, 2 * i + 1]] = 2 * i + 1, 2 * i
    return Film(
        movie=f"tt{9_000_001 + number}",
        genres=tuple(genre for genre in LOOK_GENRES + ORDER_GENRES if genre in genres),
        jpegs=_encode(pictures_SIHWC[order_S]),
    )


def _generator(seed: int, number: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng([seed, number, purpose])


def _draw_genres(generator: np.random.Generator) -> frozenset[str]:
    """Draw each genre on its own; a film without a look genre is given one.

    So every film has a label, and the looks tell nothing of the order genres.
    """
    looks = {genre for genre in LOOK_GENRES if generator.random() < LOOK_SHARE}
    spare = LOOK_GENRES[generator.integers(len(LOOK_GENRES))]
    orders = {genre for genre in ORDER_GENRES if generator.random() < ORDER_SHARE}
    return frozenset((looks or {spare}) | orders)


def _draw_pictures(
    generator: np.random.Generator, scenes: list[int], n_shots: int, genres: Collection[str]
) -> np.ndarray:
    """Return uint8 ``[S, I, H, W, C]``: each scene's dark shot, then its light one."""
    hues = [colorsys.hsv_to_rgb(i / len(ORDER_GENRES), 0.85, 1) for i in range(len(ORDER_GENRES))]
    colour_SC = np.full((n_shots, 3), NEUTRAL)
    for i, colour in enumerate(scenes):
        colour_SC[2 * i : 2 * i + 2] = np.outer((DARK, LIGHT), hues[colour])
    colour_SC += SHOT_COLOUR * generator.standard_normal((n_shots, 3))
    across_S11, down_S11 = SHOT_SLOPE * generator.standard_normal((2, n_shots, 1, 1))
    slope_SHW = (
        across_S11 * np.linspace(-1, 1, WIDTH) + down_S11 * np.linspace(-1, 1, HEIGHT)[:, None]
    )
    picture_SHWC = colour_SC[:, None, None] + slope_SHW[..., None]
    unlit = 0.35 + FILM_CORNER * generator.standard_normal()
    for i, genre in enumerate(LOOK_GENRES):
        rows = slice(0, CORNER) if i < 2 else slice(HEIGHT - CORNER, HEIGHT)
        columns = slice(0, WIDTH // 2) if i % 2 == 0 else slice(WIDTH // 2, WIDTH)
        lit = colorsys.hsv_to_rgb((i + 0.5) / len(LOOK_GENRES), 1, 1)
        picture_SHWC[:, rows, columns] = lit if genre in genres else unlit
    picture_SHWC *= 1 + FILM_TINT * generator.standard_normal(3)
    noise = generator.standard_normal((n_shots, IMAGES, HEIGHT // 4, WIDTH // 4, 3))
    noise_SIHWC = IMAGE_NOISE * noise.repeat(4, axis=2).repeat(4, axis=3)
    pictures_SIHWC = picture_SHWC[:, None] + noise_SIHWC
    pictures: np.ndarray = np.clip(pictures_SIHWC * 255, 0, 255).astype(np.uint8)
    return pictures


def _encode(pictures_SIHWC: np.ndarray) -> dict[str, bytes]:
    import simplejpeg

    return {
        f"shot_{shot:04d}_img_{image}.jpg": simplejpeg.encode_jpeg(picture_HWC, quality=QUALITY)
        for shot, pictures_IHWC in enumerate(pictures_SIHWC)
        for image, picture_HWC in enumerate(pictures_IHWC)
    }


def _write_frames(film: Film, frames: Path, *, as_folder: bool) -> None:
    if as_folder:
        (frames / film.movie).mkdir()
        for name, jpeg in film.jpegs.items():
            (frames / film.movie / name).write_bytes(jpeg)
        return
    # Made by the standard library, as anybody's tar: it is input, not one of our shards.
    with tarfile.open(frames / f"{film.movie}.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name, jpeg in film.jpegs.items():
            member = tarfile.TarInfo(f"{film.movie}/{name}")
            member.size = len(jpeg)
            tar.addfile(member, BytesIO(jpeg))


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _is_done(out: Path, mark: bytes) -> bool:
    """Tell whether ``out`` is this mini dump; refuse to replace what is no mini dump at all."""
    if (out / _MARK).is_file():
        return (out / _MARK).read_bytes() == mark
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(
            f"{out}: got something that is no mini dump, want an absent or empty folder; "
            "remove it or choose another data.dump"
        )
    return False
