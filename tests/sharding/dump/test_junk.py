"""Junk of macOS, Windows, Synology and file systems is no movie, no image and no finding."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.load import load_config
from sharding.check import check_dump
from sharding.dump.junk import is_junk
from sharding.dump.scan import read_movies
from sharding.dump.sources import FolderSource
from tests.sharding.dirty import MOVIES, findings_of, real_film, write_clean_dump
from tests.sharding.films import write_folder

IN_MOVIES = (
    ".DS_Store",
    "._shot_0000_img_0.jpg",
    "Thumbs.db",
    "desktop.ini",
    "@eaDir/shot_0000_img_0.jpg/SYNOPHOTO_THUMB_M.jpg",
)
IN_DUMP = (
    *IN_MOVIES[:4],
    "__MACOSX/._tt0000001",
    "__MACOSX/tt0000001/._shot_0000_img_0.jpg",
    "__MACOSX/._tt0000001.tar",
    "$RECYCLE.BIN/S-1-5/shot_0000_img_0.jpg",
    "System Volume Information/IndexerVolumeGuid",
    "@eaDir/tt0000001/SYNO.jpg",
    "lost+found/shot_0000_img_0.jpg",
)


def files() -> dict[str, bytes]:
    """Return a dump with junk, as files by path; junk precedes the images, as in most archives."""
    junk = [*IN_DUMP, *(f"{movie}/{name}" for movie in MOVIES for name in IN_MOVIES)]
    images = {
        f"{movie}/{name}": data for movie in MOVIES for name, data in real_film(movie).items()
    }
    return dict.fromkeys(junk, b"junk") | images


def as_folder(folder: Path) -> Path:
    for name, data in files().items():
        path = folder / "junk" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder / "junk"


def as_zip(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "movies.zip", "w") as archive:
        for name, data in files().items():
            archive.writestr(name, data)
    return folder / "movies.zip"


def as_tar(folder: Path) -> Path:
    with tarfile.open(folder / "movies.tar", "w") as archive:
        for name, data in files().items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return folder / "movies.tar"


@pytest.mark.parametrize("deliver", [as_folder, as_zip, as_tar])
def test_a_dump_with_junk_is_as_clean_as_without(
    tmp_path: Path, deliver: Callable[[Path], Path], caplog: pytest.LogCaptureFixture
) -> None:
    write_clean_dump(tmp_path)
    places = {"metadata": "meta", "split": "split.json", "root": "root"}
    overrides = [f"data.{key}={tmp_path / name}" for key, name in places.items()]
    dump = deliver(tmp_path)
    report = check_dump(load_config(tmp_path / "config.yaml", [*overrides, f"data.dump={dump}"]))
    assert (findings_of(report), report.exit_code) == ({}, 0)
    assert report.totals["movies"] == len(MOVIES)
    assert [movie.movie for movie in read_movies(dump)] == list(MOVIES)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_file_of_the_user_is_no_junk_and_still_named(tmp_path: Path) -> None:
    write_folder(tmp_path, "tt1", {**real_film("tt1"), "notes.txt": b"x", "thumbs.DB": b"x"})
    assert [member.member for member in FolderSource(tmp_path / "tt1").skipped] == ["notes.txt"]
    assert not [name for name in ("tt1", "thumbs", "MACOSX", "recycle.bin.tar") if is_junk(name)]
