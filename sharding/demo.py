"""The mini dump: short synthetic movies in MovieNet's layout, generated from a seed in seconds.

A movie is a sequence of scenes. A scene has two shots of one colour, one dark and one light. Four
genres are visible in each frame: each lights one corner. Four other genres are visible only in the
order of the frames: each has its own colour, and its scenes brighten (dark, then light) if the
movie has the genre and darken (light, then dark) if it does not. The movie consists of the same
JPEGs with and without such a genre, byte for byte, so a mean or a histogram over frames carries no
signal. Every movie contains every colour, so the set of its scenes carries none either.

Colours, corners and brightness are strong enough to survive an image tower with random weights.

S = shots of a movie, I = images per shot, H, W = pixels, C = 3 (RGB).
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
"""Names in the mini dump, for ``data.dump``, ``data.metadata`` and ``data.split``."""

LOOK_GENRES = ("Horror", "Sci-Fi", "War", "Western")
"""Visible in every frame: one bright corner per genre."""

ORDER_GENRES = ("Comedy", "Romance", "Thriller", "Mystery")
"""Visible only in the order of frames: one colour per genre, which brightens or darkens."""

N_MOVIES = 480
"""With the cycle below: 320 in train, 120 in val, 40 in test."""

SPLIT_CYCLE = ("train",) * 8 + ("val",) * 3 + ("test",)
"""Splits of consecutive movies; short, so that a small ``data.limit`` covers every split."""

FOLDER_EVERY = 16
"""Every 16th movie is a folder of images, the others are tars, so that both forms occur."""

SHOTS = (8, 24)
"""Minimum and maximum shots per movie. The minimum has room for one scene of each order genre."""

IMAGES = 3
"""Images per shot, as in MovieNet."""

HEIGHT, WIDTH = 48, 64
"""Pixels: small, so that 23,000 images decode in seconds, but more than the tower's 32."""

QUALITY = 90
"""JPEG quality; high enough that images differ by their shots, not by compression artefacts."""

LOOK_SHARE, ORDER_SHARE = 0.35, 0.4
"""Probability of a genre; high enough that 120 movies suffice to measure each."""

DARK, LIGHT, NEUTRAL = 0.3, 0.8, 0.5
"""Brightness of the two shots of a scene, and of the unpaired shot at the end of some movies."""

CORNER = 12
"""Height of the four corners in pixels. They are half as wide as the picture, so that a square
centre crop contains them."""

SHOT_COLOUR, SHOT_SLOPE, MOVIE_TINT, MOVIE_CORNER, IMAGE_NOISE = 0.05, 0.06, 0.1, 0.1, 0.03
"""Standard deviations, as fractions of full brightness: a shot's own colour and its gradient across
the picture, a movie's tint and its unlit corners, and the noise between the images of a shot."""

_VERSION = 1
_MARK = "demo.json"
_LABELS, _LOOKS = 0, 1


@dataclass(frozen=True)
class DemoMovie:
    """One synthetic movie."""

    movie: str
    genres: tuple[str, ...]
    jpegs: Mapping[str, bytes]
    """JPEG per file name, e.g. ``shot_0000_img_0.jpg``, in order of shot and image."""


def make_demo(out: Path, *, seed: int = 0) -> None:
    """Write the mini dump; an existing one of the same seed is kept.

    Args:
        out: Folder of the dump: ``240P/`` with one tar or folder per movie, ``meta/`` with one JSON
            per movie, and ``split.json``. It is published atomically.
        seed: Determines every byte of the dump.

    Raises:
        DataError: ``out`` contains something else; it is not changed.
    """
    mark = _json({"demo": _VERSION, "seed": seed})
    if _is_done(out, mark):
        logger.info("%s: the mini dump of seed %d already exists", out, seed)
        return
    split: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    with publishing_folder(out) as folder, progress(N_MOVIES, label="demo", unit="movies") as bar:
        (folder / FRAMES).mkdir()
        (folder / METADATA).mkdir()
        for number in range(N_MOVIES):
            movie = make_movie(number, seed=seed)
            _write_frames(movie, folder / FRAMES, as_folder=number % FOLDER_EVERY == 0)
            facts = {"imdb_id": movie.movie, "title": f"Demo {number + 1}", "genres": movie.genres}
            (folder / METADATA / f"{movie.movie}.json").write_bytes(_json(facts))
            split[SPLIT_CYCLE[number % len(SPLIT_CYCLE)]].append(movie.movie)
            bar.advance()
        (folder / SPLIT).write_bytes(_json(split))
        (folder / _MARK).write_bytes(mark)


def make_movie(number: int, *, seed: int = 0, genres: Collection[str] | None = None) -> DemoMovie:
    """Generate one movie.

    Args:
        number: Number of the movie, from 0.
        seed: Seed of the dump.
        genres: Genres to use instead of random ones; all other random content stays the same.
    """
    if genres is None:
        genres = _draw_genres(_generator(seed, number, _LABELS))
    generator = _generator(seed, number, _LOOKS)
    n_shots = int(generator.integers(SHOTS[0], SHOTS[1] + 1))
    # Scenes cycle through the colours in a random order per movie: all occur, none twice in a row.
    colours = generator.permutation(len(ORDER_GENRES))
    scenes = [int(colours[i % len(colours)]) for i in range(n_shots // 2)]
    pictures_SIHWC = _draw_pictures(generator, scenes, n_shots, genres)
    order_S = np.arange(n_shots)
    for i, colour in enumerate(scenes):
        if ORDER_GENRES[colour] not in genres:
            order_S[[2 * i, 2 * i + 1]] = 2 * i + 1, 2 * i
    return DemoMovie(
        movie=f"tt{9_000_001 + number}",
        genres=tuple(genre for genre in LOOK_GENRES + ORDER_GENRES if genre in genres),
        jpegs=_encode(pictures_SIHWC[order_S]),
    )


def _generator(seed: int, number: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng([seed, number, purpose])


def _draw_genres(generator: np.random.Generator) -> frozenset[str]:
    """Draw genres independently; a movie without a look genre gets one.

    So every movie has a label, and look genres carry no information about order genres.
    """
    looks = {genre for genre in LOOK_GENRES if generator.random() < LOOK_SHARE}
    spare = LOOK_GENRES[generator.integers(len(LOOK_GENRES))]
    orders = {genre for genre in ORDER_GENRES if generator.random() < ORDER_SHARE}
    return frozenset((looks or {spare}) | orders)


def _draw_pictures(
    generator: np.random.Generator, scenes: list[int], n_shots: int, genres: Collection[str]
) -> np.ndarray:
    """Return uint8 ``[S, I, H, W, C]``: the dark shot of each scene, then its light shot."""
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
    unlit = 0.35 + MOVIE_CORNER * generator.standard_normal()
    for i, genre in enumerate(LOOK_GENRES):
        rows = slice(0, CORNER) if i < 2 else slice(HEIGHT - CORNER, HEIGHT)
        columns = slice(0, WIDTH // 2) if i % 2 == 0 else slice(WIDTH // 2, WIDTH)
        lit = colorsys.hsv_to_rgb((i + 0.5) / len(LOOK_GENRES), 1, 1)
        picture_SHWC[:, rows, columns] = lit if genre in genres else unlit
    picture_SHWC *= 1 + MOVIE_TINT * generator.standard_normal(3)
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


def _write_frames(movie: DemoMovie, frames: Path, *, as_folder: bool) -> None:
    if as_folder:
        (frames / movie.movie).mkdir()
        for name, jpeg in movie.jpegs.items():
            (frames / movie.movie / name).write_bytes(jpeg)
        return
    # Written by the standard library, as a typical external tar: it is input, not a shard.
    with tarfile.open(frames / f"{movie.movie}.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name, jpeg in movie.jpegs.items():
            member = tarfile.TarInfo(f"{movie.movie}/{name}")
            member.size = len(jpeg)
            tar.addfile(member, BytesIO(jpeg))


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _is_done(out: Path, mark: bytes) -> bool:
    """Return whether ``out`` is this mini dump; refuse to replace anything but a mini dump."""
    if (out / _MARK).is_file():
        return (out / _MARK).read_bytes() == mark
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(
            f"{out}: got a folder or file that is not a mini dump, want an absent or empty folder; "
            "remove it or choose another data.dump"
        )
    return False
