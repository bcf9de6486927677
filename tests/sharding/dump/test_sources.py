from __future__ import annotations

import io
import logging
import os
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import DataError
from sharding.dump.archives import open_source
from sharding.dump.scan import read_movies
from sharding.format.index import FrameIndex
from sharding.storage.memory import MemoryStorage
from tests.sharding.dump.deliveries import (
    DEFLATED,
    STORED,
    below,
    plain,
    published,
    put,
    rejected,
    tar_bytes,
    zip_bytes,
    zip_of_images,
)
from tests.sharding.films import build_all, film, jpeg, shard_of, write_folder, write_tar

MOVIE = "tt0032138"
Write = Callable[..., None]
CHECKOUT = Path(__file__).parents[3]


@pytest.mark.parametrize("prefix", ["", f"{MOVIE}/", "./", f"./{MOVIE}/", f"240P/{MOVIE}/"])
def test_members_of_a_tar_may_be_in_a_folder(tmp_path: Path, prefix: str) -> None:
    write_folder(tmp_path / "plain", MOVIE, film(MOVIE))
    write_tar(tmp_path / "tar", MOVIE, film(MOVIE), prefix=prefix)
    assert shard_of(tmp_path / "tar") == shard_of(tmp_path / "plain")


def test_images_are_ordered_by_number_and_not_by_name(tmp_path: Path) -> None:
    names = ["shot_10000_img_0.jpg", "shot_0002_img_10.jpg", "shot_0002_img_9.jpg"]
    write_tar(tmp_path, MOVIE, {name: jpeg(name) for name in names})
    storage = MemoryStorage()
    build_all(storage, tmp_path)
    index = FrameIndex.from_bytes(storage.read("frames-00000.index.npz"), "index")
    assert index.shot.tolist() == [2, 2, 10_000]
    assert index.image.tolist() == [9, 10, 0]


def test_unsafe_members_of_a_tar_are_listed_and_not_written(tmp_path: Path) -> None:
    skipped = {
        "../shot_0005_img_0.jpg": "unsafe path",
        "/etc/shot_0006_img_0.jpg": "unsafe path",
        "notes.txt": "no image of a shot",
        "shot_٣_img_0.jpg": "no image of a shot",
    }
    dump = tmp_path / "dump"
    write_tar(dump, MOVIE, film(MOVIE))
    with tarfile.open(dump / f"{MOVIE}.tar", "a") as archive:
        for name in skipped:
            info = tarfile.TarInfo(name)
            info.size = 400
            archive.addfile(info, io.BytesIO(bytes(400)))
        link = tarfile.TarInfo("shot_0007_img_0.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    storage = MemoryStorage()
    manifest = build_all(storage, dump, max_bad_fraction=0.5)
    assert manifest.samples == 6
    with open_source(dump, f"{MOVIE}.tar") as source:
        reasons = {member.member: member.reason for member in source.skipped}
    assert reasons == skipped | {"shot_0007_img_0.jpg": "not a plain file"}
    assert storage.read("rejected.jsonl").count(b"\n") == len(reasons)
    assert sorted(tmp_path.rglob("*")) == before


def gnu_tar(folder: Path, archive: Path, *names: str) -> Path:
    subprocess.run(["tar", "-C", folder, "-caf", archive, *names], check=True)
    return archive


def share_equal_images(dump: Path, movies: list[str]) -> None:
    """Replace images by hard links to an equal one, also of another movie, as ``jdupes`` does."""
    first = dump / movies[0] / "shot_0000_img_0.jpg"
    for movie in movies:
        for name in ("shot_0001_img_1.jpg", "shot_0001_img_2.jpg"):
            (dump / movie / name).unlink()
            (dump / movie / name).hardlink_to(first)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_hard_links_in_a_tar_are_images(tmp_path: Path, suffix: str) -> None:
    plain(tmp_path / "plain", {"tt1": film("tt1")})
    share_equal_images(tmp_path / "plain", ["tt1"])
    (tmp_path / "packed").mkdir()
    gnu_tar(tmp_path / "plain" / "tt1", tmp_path / "packed" / f"tt1{suffix}", ".")
    assert published(tmp_path / "packed") == published(tmp_path / "plain")


def test_hard_links_to_images_of_another_movie_in_the_same_tar_are_images(tmp_path: Path) -> None:
    movies = ["tt1", "tt2", "tt3"]
    plain(tmp_path / "plain", {movie: film(movie) for movie in movies})
    share_equal_images(tmp_path / "plain", movies)
    packed = gnu_tar(tmp_path / "plain", tmp_path / "movies.tar", *movies)
    assert published(packed) == published(tmp_path / "plain")


@pytest.mark.parametrize("movies", [["tt1"], ["tt1", "tt2"]])
def test_tars_joined_by_cat_are_complete_and_counted(tmp_path: Path, movies: list[str]) -> None:
    plain(tmp_path / "plain", {movie: film(movie) for movie in movies})
    reels = [
        {
            f"{movie}/{name}": data
            for movie in movies
            for name, data in film(movie).items()
            if name.startswith(shot)
        }
        for shot in ("shot_0000", "shot_0001")
    ]
    name = "tt1.tar" if len(movies) == 1 else "movies.tar"
    path = put(tmp_path / "in" / name, b"".join(map(tar_bytes, reels)))
    assert published(path.parent) == published(tmp_path / "plain")
    sources = [movie.source for movie in read_movies(path.parent)]
    for source in sources:
        with open_source(path.parent, source) as opened:
            assert opened.joined == 1
    assert len(sources) == len(movies)


def test_a_tar_of_several_movies_that_is_named_like_the_first_is_refused(tmp_path: Path) -> None:
    data = tar_bytes(below("240P/", {movie: film(movie) for movie in ("tt1", "tt2")}))
    put(tmp_path / "tt1.tar", data)
    with pytest.raises(DataError, match=r"images in 240P/tt1 and in 240P/tt2, want one movie"):
        read_movies(tmp_path)
    (tmp_path / "tt1.tar").rename(tmp_path / "movies.tar")
    assert len(read_movies(tmp_path)) == 2


def a_link_to_nothing(dump: Path) -> None:
    # git-annex and DataLad leave such links for files that were not fetched.
    write_folder(dump, MOVIE, film(MOVIE))
    (dump / MOVIE / "shot_0003_img_0.jpg").symlink_to("../.git/annex/objects/missing")


def a_link_to_itself(dump: Path) -> None:
    write_folder(dump, MOVIE, film(MOVIE))
    (dump / MOVIE / "shot_0003_img_0.jpg").symlink_to("shot_0003_img_0.jpg")


def a_pipe(dump: Path) -> None:
    write_folder(dump, MOVIE, film(MOVIE))
    os.mkfifo(dump / MOVIE / "shot_0003_img_0.jpg")


def a_hard_link_without_its_target(dump: Path) -> None:
    write_tar(dump, MOVIE, film(MOVIE))
    with tarfile.open(dump / f"{MOVIE}.tar", "a") as archive:
        link = tarfile.TarInfo("shot_0003_img_0.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "elsewhere/shot_0000_img_0.jpg"
        archive.addfile(link)


def an_unsafe_path(dump: Path) -> None:
    write_tar(dump, MOVIE, film(MOVIE))
    with tarfile.open(dump / f"{MOVIE}.tar", "a") as archive:
        archive.addfile(tarfile.TarInfo("../shot_0003_img_0.jpg"))


HUGE = 9 * 1024**3
"""Bytes of a sparse file or member, which takes no space on the disk."""


def a_huge_file(dump: Path) -> None:
    write_folder(dump, MOVIE, film(MOVIE))
    with (dump / MOVIE / "shot_0003_img_0.jpg").open("wb") as file:
        file.truncate(HUGE)


def a_huge_member_of_a_tar(dump: Path) -> None:
    write_tar(dump, MOVIE, film(MOVIE))
    member = tarfile.TarInfo("shot_0003_img_0.jpg")
    member.size = HUGE
    with (dump / f"{MOVIE}.tar").open("r+b") as file:
        end = sum(512 + -(-len(data) // 512) * 512 for data in film(MOVIE).values())
        file.seek(end)
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.truncate(end + 512 + HUGE + 1024)


def a_huge_member_of_a_zip(dump: Path) -> None:
    path = put(dump / f"{MOVIE}.zip", zip_bytes(film(MOVIE)))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("shot_0003_img_0.jpg", bytes(65 * 1024**2), zipfile.ZIP_DEFLATED)


@pytest.mark.parametrize(
    "damage",
    [
        a_huge_file,
        a_huge_member_of_a_tar,
        a_huge_member_of_a_zip,
        a_link_to_nothing,
        a_link_to_itself,
        a_pipe,
        a_hard_link_without_its_target,
        an_unsafe_path,
    ],
)
def test_an_image_that_cannot_be_read_counts_as_bad(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    damage(tmp_path)
    with pytest.raises(DataError, match=r"got 1 bad of 7 images, want at most 1\.0%"):
        build_all(MemoryStorage(), tmp_path)
    assert build_all(MemoryStorage(), tmp_path, max_bad_fraction=0.2).samples == 6


def test_a_movie_of_which_no_image_can_be_read_is_not_left_out(tmp_path: Path) -> None:
    write_folder(tmp_path, "tt1", film("tt1"))
    (tmp_path / "tt2").mkdir()
    for name in film("tt2"):
        (tmp_path / "tt2" / name).symlink_to("missing")
    with pytest.raises(DataError, match=r"tt2: none of its 6 images can be read \(not a plain"):
        read_movies(tmp_path)


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", ".nfs000000000012ab"])
def test_a_file_that_is_no_image_does_not_change_a_folder(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path, MOVIE, film(MOVIE))
    (before,) = read_movies(tmp_path)
    (tmp_path / MOVIE / name).write_text("x")
    assert read_movies(tmp_path) == [before]


def test_of_two_members_of_one_name_in_a_tar_the_last_is_used(
    tmp_path: Path,
) -> None:
    write_tar(tmp_path, MOVIE, film(MOVIE))
    new = jpeg("new", 555)
    with tarfile.open(tmp_path / f"{MOVIE}.tar", "a") as archive:
        info = tarfile.TarInfo("shot_0000_img_0.jpg")
        info.size = len(new)
        archive.addfile(info, io.BytesIO(new))
    write_folder(tmp_path / "plain", MOVIE, film(MOVIE) | {"shot_0000_img_0.jpg": new})
    folder = shard_of(tmp_path / "plain")
    (tmp_path / "plain" / MOVIE).rename(tmp_path / "elsewhere")
    (tmp_path / "plain").rmdir()
    (tmp_path / "elsewhere").rename(tmp_path / ".elsewhere")
    assert shard_of(tmp_path) == folder


@pytest.mark.parametrize("write", [write_folder, write_tar])
def test_a_fingerprint_changes_with_the_modification_time_of_the_source(
    tmp_path: Path, write: Write
) -> None:
    fingerprints = set()
    for mtime in (10**18, 10**18 + 1):
        write(tmp_path, MOVIE, film(MOVIE), mtime=mtime)
        fingerprints.add(read_movies(tmp_path)[0].fingerprint)
    assert len(fingerprints) == 2


@pytest.mark.parametrize("write", [write_folder, write_tar])
def test_a_source_that_changes_while_it_is_read_is_an_error(tmp_path: Path, write: Write) -> None:
    write(tmp_path, MOVIE, film(MOVIE))
    (movie,) = read_movies(tmp_path)

    def read_while_it_changes() -> None:
        with open_source(tmp_path, movie.source) as source:
            write(tmp_path, MOVIE, film(MOVIE, size=10), mtime=10**18 + 1)
            for image in source.images:
                source.read_into(image, memoryview(bytearray(image.size)))

    with pytest.raises(DataError, match="changed while it was read"):
        read_while_it_changes()


@pytest.mark.slow
def test_an_unreadable_image_is_an_error_and_never_a_bad_image(tmp_path: Path) -> None:
    write_folder(tmp_path / "dump", MOVIE, film(MOVIE))
    image = tmp_path / "dump" / MOVIE / "shot_0000_img_0.jpg"
    image.chmod(0)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"version: 1\ndata: {{dump: {tmp_path}/dump, root: {tmp_path}/root}}\n"
        "sharding: {max_bad_fraction: 1}\nencoder: {name: x}\ntraining: {run_name: x}\n"
    )
    command = [sys.executable, "-m", "sharding", "build", "--config", str(config)]
    if os.geteuid() == 0:  # root may read everything without these capabilities removed
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        1,
        f"error: {image}: Permission denied",
    )
    assert not list((tmp_path / "root" / "frames").glob("frames-*"))


def test_unsafe_members_of_a_zip_are_listed_and_not_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = zip_of_images(tmp_path / "in", {"tt1": film("tt1")})
    image = jpeg("x")
    with zipfile.ZipFile(path, "a") as archive:
        for name in ("../../frames/tt1/shot_0007_img_0.jpg", "/frames/tt1/shot_0008_img_0.jpg"):
            archive.writestr(name, image)
        archive.writestr("frames/tt1/notes.txt", b"no image")
        archive.writestr("../../../etc/cron.d/evil", b"* * * * * root true")
        for name, kind in {"9": stat.S_IFLNK, "10": stat.S_IFCHR, "11": stat.S_IFIFO}.items():
            info = zipfile.ZipInfo(f"frames/tt1/shot_{name}_img_0.jpg")
            info.create_system, info.external_attr = 3, (kind | 0o777) << 16
            archive.writestr(info, b"/etc/passwd")
    before = sorted(tmp_path.rglob("*"))
    with caplog.at_level(logging.WARNING):
        reasons = rejected(path)
    assert reasons == {
        "../../frames/tt1/shot_0007_img_0.jpg": "unsafe path",
        "/frames/tt1/shot_0008_img_0.jpg": "unsafe path",
        "frames/tt1/notes.txt": "no image of a shot",
        "frames/tt1/shot_9_img_0.jpg": "not a plain file",
        "frames/tt1/shot_10_img_0.jpg": "not a plain file",
        "frames/tt1/shot_11_img_0.jpg": "not a plain file",
    }
    assert "belong to no movie are skipped: ../../../etc/cron.d/evil\n" in caplog.text
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_two_members_of_one_name_in_a_zip_the_last_is_used_and_the_first_listed(
    tmp_path: Path,
) -> None:
    name, new = "shot_0000_img_0.jpg", jpeg("new", 555)
    path = zip_of_images(tmp_path / "zip", {"tt1": film("tt1")})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"frames/tt1/{name}", new)
    expected = published(plain(tmp_path / "plain", {"tt1": film("tt1") | {name: new}}))
    assert published(path) == expected
    assert rejected(path) == {name: "stands there twice, the last one is taken"}


@pytest.mark.parametrize("method", [STORED, DEFLATED])
def test_a_corrupt_image_in_a_zip_is_rejected(tmp_path: Path, method: int) -> None:
    files = below("", {"tt1": film("tt1", size=3000)})
    path = put(tmp_path / "movies.zip", zip_bytes(files, method))
    data = bytearray(path.read_bytes())
    data[1000:1020] = bytes(20)  # inside the first image
    path.write_bytes(data)
    ((member, reason),) = rejected(path).items()
    assert member == "shot_0000_img_0.jpg"
    assert "check sum" in reason or "inflate" in reason
