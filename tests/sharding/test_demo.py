"""The mini dump: its layout, its guarantees and its bytes."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import simplejpeg

from configs.errors import DataError
from configs.schema import GENRES
from sharding.demo import (
    FRAMES,
    IMAGES,
    LOOK_GENRES,
    METADATA,
    ORDER_GENRES,
    SHOTS,
    SPLIT,
    make_demo,
    make_movie,
)

pytestmark = pytest.mark.slow

IMAGE = re.compile(r"shot_(\d{4})_img_(\d)\.jpg")


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "dump"
    make_demo(out)
    return out


def movies(dump: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the id and the images by name of each movie, from tars and folders."""
    for entry in sorted((dump / FRAMES).iterdir()):
        if entry.is_dir():
            yield entry.name, {file.name: file.read_bytes() for file in entry.iterdir()}
            continue
        with tarfile.open(entry) as tar:
            images = {member.name: tar.extractfile(member) for member in tar}
            assert all(name.startswith(f"{entry.stem}/shot_") for name in images)
            yield (
                entry.stem,
                {name.partition("/")[2]: file.read() for name, file in images.items() if file},
            )


def digest(folder: Path) -> str:
    """Return one digest over every path and content below ``folder``."""
    total = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(f"{file.relative_to(folder)}\0".encode())
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def test_the_same_seed_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sharding.demo.N_MOVIES", 48)  # tars and folders, all three splits
    make_demo(tmp_path / "once")
    make_demo(tmp_path / "twice")
    make_demo(tmp_path / "other", seed=1)
    assert digest(tmp_path / "once") == digest(tmp_path / "twice") != digest(tmp_path / "other")


def test_a_movie_does_not_depend_on_the_movies_before_it() -> None:
    assert [make_movie(n) for n in (0, 1, 2)] == [make_movie(n) for n in (2, 1, 0)][::-1]


def test_movies_are_tars_and_folders_of_three_images_per_shot(dump: Path) -> None:
    kinds = [entry.is_dir() for entry in (dump / FRAMES).iterdir()]
    assert sum(kinds) >= 20
    assert len(kinds) - sum(kinds) >= 20
    seen = set()
    for _, images in movies(dump):
        matches = [IMAGE.fullmatch(name) for name in sorted(images)]
        numbers = [match.groups() for match in matches if match]
        n_shots = len(images) // IMAGES
        assert numbers == [(f"{s:04d}", str(i)) for s in range(n_shots) for i in range(3)]
        seen.add(n_shots)
    assert (min(seen), max(seen)) == SHOTS == (8, 24)


def test_every_jpeg_decodes(dump: Path) -> None:
    shapes = {
        simplejpeg.decode_jpeg_header(jpeg)[:2] == simplejpeg.decode_jpeg(jpeg).shape[:2]
        for _, images in movies(dump)
        for jpeg in images.values()
    }
    assert shapes == {True}


def test_every_movie_is_in_one_split_and_120_are_in_val(dump: Path) -> None:
    split = json.loads((dump / SPLIT).read_text())
    assert {name: len(ids) for name, ids in split.items()} == {
        "train": 320,
        "val": 120,
        "test": 40,
    }
    all_ids = [movie for ids in split.values() for movie in ids]
    assert sorted(all_ids) == [movie for movie, _ in movies(dump)]


def test_metadata_has_at_least_one_genre_of_the_vocabulary_for_each_movie(dump: Path) -> None:
    facts = [json.loads(file.read_text()) for file in sorted((dump / METADATA).iterdir())]
    assert [fact["imdb_id"] for fact in facts] == [movie for movie, _ in movies(dump)]
    assert all(fact["title"] and fact["genres"] for fact in facts)
    assert {genre for fact in facts for genre in fact["genres"]} <= set(GENRES)


@pytest.mark.parametrize("genre", LOOK_GENRES + ORDER_GENRES)
def test_every_genre_has_at_least_15_positive_and_15_negative_movies_in_val(
    dump: Path, genre: str
) -> None:
    split = json.loads((dump / SPLIT).read_text())
    facts = [json.loads((dump / METADATA / f"{m}.json").read_text()) for m in split["val"]]
    assert 15 <= sum(genre in fact["genres"] for fact in facts) <= 105


def test_half_of_the_genres_depend_on_the_order_of_frames() -> None:
    assert len(ORDER_GENRES) == len(LOOK_GENRES)
    assert not set(ORDER_GENRES) & set(LOOK_GENRES)


@pytest.mark.parametrize("genre", ORDER_GENRES)
@pytest.mark.parametrize("number", range(10))
def test_an_order_genre_reorders_frames_without_changing_any(genre: str, number: int) -> None:
    without, with_it = make_movie(number, genres=[]), make_movie(number, genres=[genre])
    assert list(with_it.jpegs.values()) != list(without.jpegs.values())
    assert sorted(with_it.jpegs.values()) == sorted(without.jpegs.values())


@pytest.mark.parametrize("genre", LOOK_GENRES)
def test_a_look_genre_changes_every_frame(genre: str) -> None:
    without, with_it = make_movie(0, genres=[]), make_movie(0, genres=[genre])
    assert not set(with_it.jpegs.values()) & set(without.jpegs.values())


def test_an_existing_mini_dump_is_not_rewritten(dump: Path) -> None:
    before = (dump / SPLIT).stat()
    make_demo(dump)
    assert (dump / SPLIT).stat() == before


def test_a_dump_of_another_seed_replaces_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sharding.demo.N_MOVIES", 2)
    make_demo(tmp_path / "dump")
    before = digest(tmp_path / "dump")
    make_demo(tmp_path / "dump", seed=1)
    assert digest(tmp_path / "dump") != before
    assert [entry.name for entry in tmp_path.iterdir()] == ["dump"]


def test_a_folder_that_is_not_a_mini_dump_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(DataError, match=r"not a mini dump.*remove it or choose another"):
        make_demo(tmp_path)
    assert (tmp_path / "thesis.tex").exists()
