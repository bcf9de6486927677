from __future__ import annotations

import gzip
import logging
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import ConfigError, DataError
from sharding.dump import scan
from sharding.dump.scan import find_sources, read_movies
from sharding.storage.memory import MemoryStorage
from tests.disks import failing_disk
from tests.sharding.dump.deliveries import (
    MOVIES,
    below,
    expect_one_line,
    plain,
    published,
    put,
    put_parts,
    tar_bytes,
    zip_bytes,
    zip_of_tars,
)
from tests.sharding.films import build_all, film, jpeg, write_folder, write_tar

MOVIE = "tt0032138"
Write = Callable[..., None]


@pytest.mark.parametrize("level", ["", "240P", "240P/all"])
def test_tars_and_folders_are_found_in_subfolders(tmp_path: Path, level: str) -> None:
    write_tar(tmp_path / level, "tt2", film("tt2"))
    write_folder(tmp_path / level, "tt1", film("tt1"))
    (tmp_path / level / "README.txt").write_text("not a movie")
    (tmp_path / level / ".hidden").mkdir()
    prefix = f"{level}/" if level else ""
    assert find_sources(tmp_path).by_name == {
        "tt1": (f"{prefix}tt1",),
        "tt2": (f"{prefix}tt2.tar",),
    }
    movies = read_movies(tmp_path)
    assert [(m.movie, m.images, m.n_bytes) for m in movies] == [("tt1", 6, 1803), ("tt2", 6, 1803)]


def test_of_two_sources_of_a_movie_the_one_with_more_images_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(tmp_path, "tt1", film("tt1", shots=2))
    write_folder(tmp_path, "tt1", film("tt1", shots=3))
    write_tar(tmp_path, "tt2", film("tt2"))
    write_folder(tmp_path / "240P", "tt2", film("tt2"))
    movies = read_movies(tmp_path)
    assert [movie.source for movie in movies] == ["tt1", "tt2.tar"]
    assert "tt1 has two sources: using tt1 (9 images), not tt1.tar (6)" in caplog.text


@pytest.mark.parametrize("name", ["a.b", "Amélie 2001", "tt 1"])
@pytest.mark.parametrize("write", [write_folder, write_tar])
def test_a_name_that_is_not_an_id_is_escaped_and_stored_in_the_manifest(
    tmp_path: Path, write: Write, name: str
) -> None:
    write(tmp_path, name, film(name))
    storage = MemoryStorage()
    manifest = build_all(storage, tmp_path)
    (movie,) = manifest.renamed
    assert manifest.renamed == {movie: name}
    assert f"{movie}/shot_0000_img_0.jpg".encode() in storage.read("frames-00000.tar")


def test_a_limit_selects_the_first_movies_with_images_or_the_listed_ones(tmp_path: Path) -> None:
    (tmp_path / "tt0").mkdir()
    for movie in ("tt1", "tt2", "tt3"):
        write_tar(tmp_path, movie, film(movie))
    assert [movie.movie for movie in read_movies(tmp_path, 2)] == ["tt1", "tt2"]
    assert [movie.movie for movie in read_movies(tmp_path, ("tt3", "tt1"))] == ["tt1", "tt3"]
    with pytest.raises(DataError, match="no movie 'tt4' in the dump; did you mean tt"):
        read_movies(tmp_path, ("tt4",))


def test_a_truncated_tar_can_be_excluded_by_name(tmp_path: Path) -> None:
    for movie in ("tt1", "tt2", "tt3"):
        write_tar(tmp_path, movie, film(movie))
    path = tmp_path / "tt2.tar"
    path.write_bytes(path.read_bytes()[:1400])
    with pytest.raises(
        DataError, match=r"copy it again, or continue without it: data\.exclude=\[tt2\]"
    ):
        read_movies(tmp_path)
    others = read_movies(tmp_path, exclude=("tt2",))
    assert [movie.movie for movie in others] == ["tt1", "tt3"]
    assert [m.movie for m in read_movies(tmp_path, 2, exclude=("tt2",))] == ["tt1", "tt3"]
    with pytest.raises(DataError, match=r"data\.exclude: no movie 'tt4' in the dump"):
        read_movies(tmp_path, exclude=("tt4",))


def test_a_dump_without_movies_or_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.dump: no folder"):
        read_movies(tmp_path / "absent")
    with pytest.raises(DataError, match="no movie, want"):
        read_movies(tmp_path)
    write_folder(tmp_path, "tt1", {"frame1.jpg": jpeg(1)})
    with pytest.raises(DataError, match="got no image in any movie, want images named"):
        read_movies(tmp_path)


def test_compressed_files_cause_a_warning_and_are_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(tmp_path, "tt1", film("tt1"))
    (tmp_path / "tt2.tar.xz").write_bytes(b"")
    assert len(read_movies(tmp_path)) == 1
    assert "compressed files of the dump are not read: tt2.tar.xz; unpack them" in caplog.text


def test_a_truncated_tar_of_a_dump_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path, MOVIE, film(MOVIE))
    path = tmp_path / f"{MOVIE}.tar"
    path.write_bytes(path.read_bytes()[:1400])
    with pytest.raises(DataError, match=rf"{MOVIE}\.tar: got 1400 bytes, want .* truncated"):
        read_movies(tmp_path)


def test_a_scan_reads_only_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path, MOVIE, film(MOVIE, size=100_000))

    def fail(*_: object) -> int:
        raise AssertionError("an image was read")

    monkeypatch.setattr(os, "preadv", fail)
    assert read_movies(tmp_path)[0].n_bytes > 600_000


def test_a_search_of_many_archives_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scan, "_MANY_ARCHIVES", 1)
    for movie in ("tt1", "tt2"):
        write_tar(tmp_path, movie, film(movie))
    with caplog.at_level(logging.INFO):
        find_sources(tmp_path)
    assert f"searching 2 archives of {tmp_path} for movies" in caplog.text


def test_of_a_zip_and_a_folder_of_a_movie_the_one_with_more_images_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain(tmp_path, {"tt1": film("tt1", shots=3)})
    put(tmp_path / "a.zip", zip_bytes(below("frames/", {"tt1": film("tt1", shots=2)})))
    (movie,) = read_movies(tmp_path)
    assert (movie.source, movie.images) == ("tt1", 9)
    assert "tt1 has two sources: using tt1 (9 images), not a.zip::frames/tt1 (6)" in caplog.text


@pytest.mark.skipif(shutil.which("zip") is None, reason="no zip program")
def test_the_error_for_a_split_zip_explains_how_to_join_it(tmp_path: Path) -> None:
    big = {movie: film(movie, size=20_000) for movie in ("tt1", "tt2")}
    plain(tmp_path / "in", big)
    split, joined = tmp_path / "split" / "m.zip", tmp_path / "joined.zip"
    split.parent.mkdir()
    cwd = tmp_path / "in"
    subprocess.run(["zip", "-qr0", "-s", "64k", str(split), "."], cwd=cwd, check=True)
    disks = len(list(split.parent.iterdir()))
    n_bytes = sum(path.stat().st_size for path in split.parent.iterdir())
    assert disks > 2
    expect_one_line(
        split.parent, rf"m\.zip: got {disks} disks with {n_bytes} bytes of a split zip.*zip -s 0"
    )
    expect_one_line(split, rf"m\.zip: the last of {disks} disks of a split zip.*zip -s 0")
    command = ["zip", "-q", "-s", "0", str(split), "--out", str(joined)]
    subprocess.run(command, check=True)
    assert published(joined) == published(tmp_path / "in")
    split.unlink()
    expect_one_line(split.parent, rf"got {disks - 1} disks without the last one, m\.zip")


def test_the_error_for_a_gzip_of_several_movies_explains_how_to_decompress_it(
    tmp_path: Path,
) -> None:
    data = tar_bytes(below("", MOVIES))
    put_parts(tmp_path / "movies.tar.gz", gzip.compress(data), ["00", "01"])
    expect_one_line(
        tmp_path, rf"tar\.gz of 5 movies, but gzip allows no random access.*{len(data)} bytes"
    )


def test_links_and_unsafe_paths_of_tars_in_a_zip_are_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = zip_of_tars(tmp_path, {"tt1": film("tt1")})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../240P/tt1.tar", tar_bytes(film("tt1", shots=9)))
        archive.writestr("/tt3.tar", tar_bytes(film("tt3")))
        info = zipfile.ZipInfo("240P/tt2.tar")
        info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, b"/etc/passwd")
    assert [(movie.movie, movie.images) for movie in read_movies(path)] == [("tt1", 6)]
    assert "belong to no movie are skipped: tt3.tar and 1 more" in caplog.text


# --- sources that cannot be read ------------------------------------------------------------------

CHECKOUT = Path(__file__).parents[3]


def test_a_plan_names_every_movie_that_cannot_be_read_at_once(tmp_path: Path) -> None:
    for movie in ("tt1", "tt2", "tt3", "tt4"):
        write_tar(tmp_path, movie, film(movie))
    (tmp_path / "tt2.tar").write_bytes(b"\xff" * 600)
    (tmp_path / "tt3.tar").unlink()
    (tmp_path / "tt3.tar").symlink_to("missing")
    (tmp_path / "tt4.tar").unlink()
    (tmp_path / "tt4.tar.00").write_bytes(b"")
    (tmp_path / "tt4.tar.02").write_bytes(b"")
    expected = (
        r"tt2\.tar: damaged header at byte 0.*; 2 more movies cannot be read; repair them, or "
        r"continue without them: data\.exclude=\[tt2, tt3, tt4\]"
    )
    with pytest.raises(DataError, match=expected):
        read_movies(tmp_path)
    others = read_movies(tmp_path, exclude=("tt2", "tt3", "tt4"))
    assert [movie.movie for movie in others] == ["tt1"]


def test_a_corrupt_tar_in_a_zip_does_not_hide_the_others(tmp_path: Path) -> None:
    members = {f"tt{k}.tar": tar_bytes(film(f"tt{k}")) for k in range(3)}
    put(tmp_path / "movies.zip", zip_bytes(members | {"tt1.tar.gz": b"no gzip"}))
    sources = find_sources(tmp_path)
    assert list(sources.by_name) == ["tt0", "tt1", "tt2"]
    with pytest.raises(DataError, match=r"tt1\.tar\.gz: corrupt.*data\.exclude=\[tt1\]"):
        read_movies(tmp_path)
    assert len(read_movies(tmp_path, exclude=("tt1",))) == 2


def run(command: str, dump: Path, *overrides: str) -> tuple[int, str]:
    """Run a command that root's permissions do not help; return exit code and output."""
    genres, config = (dump.parent / name for name in ("genres.json", "config.yaml"))
    if not genres.exists():
        genres.write_text('{"tt0": ["Drama"]}')
    config.write_text(
        f"version: 1\ndata: {{dump: {dump}, root: {dump.parent}/root, metadata: {genres}}}\n"
        "encoder: {name: x}\ntraining: {run_name: x}\n"
    )
    words = [sys.executable, "-m", "sharding", command, "--config", str(config), *overrides]
    if os.geteuid() == 0:
        words = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *words]
    done = subprocess.run(words, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_folders_and_tars_without_permission_are_named_and_can_be_excluded(tmp_path: Path) -> None:
    dump = tmp_path / "dump"
    for k in range(3):
        write_tar(dump, f"tt{k}", film(f"tt{k}"))
        write_folder(dump / "all", f"tt{k + 5}", film(f"tt{k + 5}"))
    closed = [dump / "tt1.tar", dump / "all" / "tt6"]
    for path in closed:
        path.chmod(0)
    code, out = run("check", dump)
    assert (code, "unreadable sources                   2  tt1.tar, all/tt6" in out) == (3, True)
    code, out = run("plan", dump)
    assert code == 1
    assert f"{closed[0]}: Permission denied; 1 more movies cannot be read" in out
    assert "data.exclude=[tt1, tt6]" in out
    code, out = run("plan", dump, "data.exclude=[tt1, tt6]")
    assert (code, "movies 4 " in out) == (0, True)
    (tmp_path / "genres.json").chmod(0)
    code, out = run("check", dump)
    assert (code, "genres.json: Permission denied" in out) == (4, True)
    for path in closed:
        path.chmod(0o755)  # so that pytest can remove it


def test_a_tar_on_a_failing_disk_is_named_and_can_be_excluded(tmp_path: Path) -> None:
    def write(disk: Path) -> Path:
        write_folder(disk, "tt1", {})
        write_tar(disk, "tt2", film("tt2", size=200_000))
        return disk / "tt2.tar"

    write_tar(tmp_path / "dump", "tt3", film("tt3"))
    with failing_disk(tmp_path / "dump" / "disk", write):
        with pytest.raises(DataError, match=r"disk/tt2\.tar: Input/output.*exclude=\[tt2\]"):
            read_movies(tmp_path / "dump")
        (movie,) = read_movies(tmp_path / "dump", exclude=("tt2",))
    assert movie.movie == "tt3"


def test_links_to_folders_of_the_dump_neither_hang_nor_double_movies(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dump = tmp_path / "in" / "dump"
    write_folder(dump / "all", "tt1", film("tt1"))
    write_tar(dump, "tt2", film("tt2"))
    for k in range(9):
        (dump / f"loop{k}").symlink_to("..")
        (dump / "all" / f"up{k}").symlink_to("../all")
    (dump / "again").symlink_to("all")
    (dump / "all" / "tt1-copy").symlink_to("tt1")
    (dump / "itself").symlink_to("itself")
    assert [movie.source for movie in read_movies(dump)] == ["again/tt1", "tt2.tar"]
    assert "folders that are read already, by another name or link, are skipped" in caplog.text


@pytest.mark.parametrize("name", ["tt1.tar", "tt1.tar.gz", "movies.zip", "movies.zip.001"])
def test_a_pipe_or_device_in_place_of_an_archive_is_refused(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    expect_one_line(tmp_path, rf"{name}: got a pipe, device or folder, want a file")
    expect_one_line(tmp_path / name, rf"{name}: got a pipe, device or folder, want a file")
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    expect_one_line(tmp_path, rf"{name}: got a pipe, device or folder, want a file")
