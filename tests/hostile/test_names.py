"""No name of a file, folder or member becomes a path, and each that is shown is printable."""

from __future__ import annotations

import io
import os
import re
import tarfile
from pathlib import Path

import pytest

from sharding.__main__ import main
from sharding.format.names import movie_id
from sharding.storage.local import DiskStorage
from tests.sharding.conftest import write_config
from tests.sharding.films import build_all, film, jpeg

FOLDERS = (
    "a b", "a\nb", "\x1b[2J", os.fsdecode(b"\xff\xfe"), "\u202ecod", "CON", "aux.", "Alien",
    "alien", "~", "$HOME", "-rf", "{0..9}", "%s", "é", "e\u0301", "_", "x_2e", "a\\b", "'; touch x",
)  # fmt: skip
"""Names that a folder of a dump may have on this file system."""

MEMBERS = (
    "../../up/shot_0000_img_0.jpg", "/abs/shot_0000_img_0.jpg",
    "tt1/../../side/shot_0000_img_0.jpg",
    "..\\back\\shot_0000_img_0.jpg", "C:\\disk\\shot_0000_img_0.jpg", "./dot/./shot_0000_img_0.jpg",
    "tt2//shot_0000_img_0.jpg", "tt3/shot_0000_img_0.jpg/", "tt4/shot_0000_img_0.jpg\n",
    "tt5/shot_-001_img_0.jpg", "tt6/shot_999999999_img_9999.jpg", "tt7/shot_0000_img_0.jpg",
)  # fmt: skip
MEMBER = re.compile(r"[A-Za-z0-9_-]{1,64}/shot_[0-9]{4,9}_img_[0-9]{1,4}\.jpg")


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def built_members(frames: Path) -> list[str]:
    names = []
    for path in sorted(frames.glob("*.tar")):
        with tarfile.open(path) as archive:
            names += archive.getnames()
    return names


def test_folders_of_any_name_become_movies_with_plain_ids(tmp_path: Path) -> None:
    dump, frames = tmp_path / "dump", tmp_path / "root" / "frames"
    for name in FOLDERS:
        (dump / name).mkdir(parents=True)
        for image, data in film(name).items():
            (dump / name / image).write_bytes(data)
    before = files_of(tmp_path)
    build_all(DiskStorage(frames), dump)
    written = files_of(tmp_path) - before
    assert all(re.fullmatch(r"root/frames/[a-z0-9.-]+", name) for name in written)
    members = built_members(frames)
    assert all(MEMBER.fullmatch(name) for name in members)
    # Alien and alien, and the two ways to write é, are different movies.
    assert {name.partition("/")[0] for name in members} == set(map(movie_id, FOLDERS))
    assert len(members) == 6 * len(FOLDERS)


def test_members_of_any_name_leave_the_archive_only_as_images_of_their_movie(
    tmp_path: Path,
) -> None:
    dump, frames = tmp_path / "dump" / "240P", tmp_path / "root" / "frames"
    dump.mkdir(parents=True)
    with tarfile.open(dump / "movies.tar", "w") as archive:
        safe = [f"{folder}/shot_0001_img_0.jpg" for folder in ("up", "abs", "tt1/side", "back")]
        for name in (*MEMBERS, *safe):
            member, data = tarfile.TarInfo(name), jpeg(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    before = files_of(tmp_path)
    build_all(DiskStorage(frames), dump, max_bad_fraction=1.0)
    written = files_of(tmp_path) - before
    assert all(re.fullmatch(r"root/frames/[a-z0-9.-]+", name) for name in written)
    members = built_members(frames)
    assert all(MEMBER.fullmatch(name) for name in members)
    unsafe = [name for name in members if name.startswith(("up/", "abs/", "back/"))]
    assert all(name.endswith("/shot_0001_img_0.jpg") for name in unsafe)


def test_a_name_too_long_for_an_id_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(tmp_path)
    name = "\n" * 60
    (tmp_path / "dump" / name).mkdir(parents=True)
    (tmp_path / "dump" / name / "shot_0000_img_0.jpg").write_bytes(jpeg(name))
    assert main(["plan", "--quiet", "--config", str(tmp_path / "root.yaml")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "the name cannot become an id" in error


def test_what_a_command_prints_about_a_dump_contains_no_control_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(tmp_path)
    for name in ("\x1b[2J", "a\rb", "tt1"):
        folder = tmp_path / "dump" / name
        folder.mkdir(parents=True)
        (folder / "shot_0000_img_0.jpg").write_bytes(jpeg(name))
        (folder / "shot_0001_img_0.jpg").write_bytes(b"")
        (folder / "\x1b]0;title\x07.txt").write_bytes(b"")
    main(["check", "--config", str(tmp_path / "root.yaml")])
    out, err = capsys.readouterr()
    assert "tt1" in out + err
    assert all(line.isprintable() for line in (out + err).split("\n"))
