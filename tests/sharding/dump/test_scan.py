from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import ConfigError, DataError, MachineError
from sharding.dump.archives import open_source
from sharding.dump.jpeg import flaw
from sharding.dump.scan import find_sources, read_movies
from sharding.format.index import FrameIndex
from sharding.format.plan import PlannedMovie
from sharding.frame_space import check_space
from sharding.storage.memory import MemoryStorage
from sharding.storage.space import FreeSpace, Space
from tests.sharding.films import build_all, film, jpeg, write_folder, write_tar

MOVIE = "tt0032138"
Write = Callable[..., None]


@pytest.mark.parametrize("level", ["", "240P", "240P/all"])
def test_tars_and_folders_are_found_on_every_level(tmp_path: Path, level: str) -> None:
    write_tar(tmp_path / level, "tt2", film("tt2"))
    write_folder(tmp_path / level, "tt1", film("tt1"))
    (tmp_path / level / "README.txt").write_text("not a movie")
    (tmp_path / level / ".hidden").mkdir()
    prefix = f"{level}/" if level else ""
    assert find_sources(tmp_path) == {"tt1": (f"{prefix}tt1",), "tt2": (f"{prefix}tt2.tar",)}
    movies = read_movies(tmp_path)
    assert [(m.movie, m.images, m.n_bytes) for m in movies] == [("tt1", 6, 1803), ("tt2", 6, 1803)]


def shard_of(dump: Path) -> bytes:
    storage = MemoryStorage()
    build_all(storage, dump, shard_bytes=10**9)
    return storage.read("frames-00000.tar")


@pytest.mark.parametrize("prefix", ["", f"{MOVIE}/", "./", f"./{MOVIE}/", f"240P/{MOVIE}/"])
def test_members_may_lie_in_a_folder(tmp_path: Path, prefix: str) -> None:
    write_folder(tmp_path / "plain", MOVIE, film(MOVIE))
    write_tar(tmp_path / "tar", MOVIE, film(MOVIE), prefix=prefix)
    assert shard_of(tmp_path / "tar") == shard_of(tmp_path / "plain")


def test_images_are_ordered_by_number_and_not_by_listing(tmp_path: Path) -> None:
    names = ["shot_10000_img_0.jpg", "shot_0002_img_10.jpg", "shot_0002_img_9.jpg"]
    write_tar(tmp_path, MOVIE, {name: jpeg(name) for name in names})
    storage = MemoryStorage()
    build_all(storage, tmp_path)
    index = FrameIndex.from_bytes(storage.read("frames-00000.index.npz"), "index")
    assert index.shot.tolist() == [2, 2, 10_000]
    assert index.image.tolist() == [9, 10, 0]


def test_a_movie_that_is_there_twice_is_taken_where_it_has_more_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(tmp_path, "tt1", film("tt1", shots=2))
    write_folder(tmp_path, "tt1", film("tt1", shots=3))
    write_tar(tmp_path, "tt2", film("tt2"))
    write_folder(tmp_path / "240P", "tt2", film("tt2"))
    movies = read_movies(tmp_path)
    assert [movie.source for movie in movies] == ["tt1", "tt2.tar"]
    assert "tt1 is there twice: taking tt1 (9 images), not tt1.tar (6)" in caplog.text


def test_unsafe_and_odd_members_are_listed_and_reach_no_path(tmp_path: Path) -> None:
    odd = {
        "../shot_0005_img_0.jpg": "unsafe path",
        "/etc/shot_0006_img_0.jpg": "unsafe path",
        "._shot_0000_img_0.jpg": "no image of a shot",
        "notes.txt": "no image of a shot",
        "shot_٣_img_0.jpg": "no image of a shot",
    }
    dump = tmp_path / "dump"
    write_tar(dump, MOVIE, film(MOVIE))
    with tarfile.open(dump / f"{MOVIE}.tar", "a") as archive:
        for name in odd:
            info = tarfile.TarInfo(name)
            info.size = 400
            archive.addfile(info, io.BytesIO(bytes(400)))
        link = tarfile.TarInfo("shot_0007_img_0.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    storage = MemoryStorage()
    manifest = build_all(storage, dump)
    assert manifest.samples == 6
    with open_source(dump, f"{MOVIE}.tar") as source:
        found = {member.member: member.reason for member in source.odd}
    assert found == odd | {"shot_0007_img_0.jpg": "not a plain file"}
    assert storage.read("rejected.jsonl").count(b"\n") == len(found)
    assert sorted(tmp_path.rglob("*")) == before


def test_of_two_members_of_one_name_the_last_one_is_taken_as_unpacking_would(
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


@pytest.mark.parametrize("name", ["a.b", "Amélie 2001", "tt 1"])
@pytest.mark.parametrize("write", [write_folder, write_tar])
def test_a_name_that_is_no_id_is_mapped_and_kept_in_the_manifest(
    tmp_path: Path, write: Write, name: str
) -> None:
    write(tmp_path, name, film(name))
    storage = MemoryStorage()
    manifest = build_all(storage, tmp_path)
    (movie,) = manifest.renamed
    assert manifest.renamed == {movie: name}
    assert f"{movie}/shot_0000_img_0.jpg".encode() in storage.read("frames-00000.tar")


def test_a_limit_takes_the_first_movies_with_images_or_those_named(tmp_path: Path) -> None:
    (tmp_path / "tt0").mkdir()
    for movie in ("tt1", "tt2", "tt3"):
        write_tar(tmp_path, movie, film(movie))
    assert [movie.movie for movie in read_movies(tmp_path, 2)] == ["tt1", "tt2"]
    assert [movie.movie for movie in read_movies(tmp_path, ("tt3", "tt1"))] == ["tt1", "tt3"]
    with pytest.raises(DataError, match="no movie 'tt4' in the dump; did you mean tt"):
        read_movies(tmp_path, ("tt4",))


def test_a_cut_tar_is_left_out_by_name_and_no_other(tmp_path: Path) -> None:
    for movie in ("tt1", "tt2", "tt3"):
        write_tar(tmp_path, movie, film(movie))
    whole = (tmp_path / "tt2.tar").read_bytes()
    (tmp_path / "tt2.tar").write_bytes(whole[:1400])
    with pytest.raises(
        DataError, match=r"copy it again, or go on without it: data\.exclude=\[tt2\]"
    ):
        read_movies(tmp_path)
    left = read_movies(tmp_path, exclude=("tt2",))
    assert [movie.movie for movie in left] == ["tt1", "tt3"]
    assert [m.movie for m in read_movies(tmp_path, 2, exclude=("tt2",))] == ["tt1", "tt3"]
    with pytest.raises(DataError, match=r"data\.exclude: no movie 'tt4' in the dump"):
        read_movies(tmp_path, exclude=("tt4",))


def test_a_dump_without_movies_or_images_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.dump: no folder"):
        read_movies(tmp_path / "absent")
    with pytest.raises(DataError, match="no movie, want"):
        read_movies(tmp_path)
    write_folder(tmp_path, "tt1", {"frame1.jpg": jpeg(1)})
    with pytest.raises(DataError, match="no image of the name"):
        read_movies(tmp_path)


def test_packed_files_are_told_and_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(tmp_path, "tt1", film("tt1"))
    (tmp_path / "tt2.tar.xz").write_bytes(b"")
    assert len(read_movies(tmp_path)) == 1
    assert "1 packed files of the dump are not read (tt2.tar.xz, …)" in caplog.text


def test_a_cut_tar_of_the_dump_is_one_line(tmp_path: Path) -> None:
    write_tar(tmp_path, MOVIE, film(MOVIE))
    path = tmp_path / f"{MOVIE}.tar"
    path.write_bytes(path.read_bytes()[:1400])
    with pytest.raises(DataError, match=rf"{MOVIE}\.tar: got 1400 bytes, want at least .* cut"):
        read_movies(tmp_path)


def test_a_scan_reads_headers_and_no_contents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path, MOVIE, film(MOVIE, size=100_000))

    def fail(*_: object) -> int:
        raise AssertionError("an image was read")

    monkeypatch.setattr(os, "preadv", fail)
    assert read_movies(tmp_path)[0].n_bytes > 600_000


@pytest.mark.parametrize("write", [write_folder, write_tar])
def test_a_stamp_changes_with_the_time_of_the_source(tmp_path: Path, write: Write) -> None:
    stamps = set()
    for mtime in (10**18, 10**18 + 1):
        write(tmp_path, MOVIE, film(MOVIE), mtime=mtime)
        stamps.add(read_movies(tmp_path)[0].stamp)
    assert len(stamps) == 2


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


@pytest.mark.parametrize("write", [write_folder, write_tar])
def test_a_source_that_is_gone_is_told(tmp_path: Path, write: Write) -> None:
    write(tmp_path, MOVIE, film(MOVIE))
    (movie,) = read_movies(tmp_path)
    (tmp_path / movie.source).rename(tmp_path / ".gone")
    with (
        pytest.raises(DataError, match="gone since it was planned; run plan --replace"),
        open_source(tmp_path, movie.source),
    ):
        pass


def test_an_image_larger_than_the_buffer_is_copied(tmp_path: Path) -> None:
    big = jpeg("big", 9_000_000)
    files = film(MOVIE) | {"shot_0001_img_0.jpg": big}
    write_tar(tmp_path, MOVIE, files)
    shard = shard_of(tmp_path)
    with tarfile.open(fileobj=io.BytesIO(shard)) as archive:
        found = {m.name: archive.extractfile(m).read() for m in archive}  # type: ignore[union-attr]
    assert found == {f"{MOVIE}/{name}": data for name, data in files.items()}


@pytest.mark.parametrize(
    ("data", "bad"),
    [
        (jpeg(1), False),
        (jpeg(1) + bytes(200), False),
        (b"", True),
        (b"\xff\xd8", True),
        (jpeg(1)[:-2], True),
        (jpeg(1) + bytes(5000), True),
    ],
)
def test_a_jpeg_has_a_start_and_an_end(data: bytes, bad: bool) -> None:
    assert (flaw(memoryview(data)) is not None) == bad


def test_too_little_space_is_told_before_the_first_byte() -> None:
    class Full(MemoryStorage):
        def space(self) -> FreeSpace:
            return FreeSpace(Space(10**6))

    movies = [PlannedMovie("a", "a", "a", "", 1000, 10**9, 0)]
    with pytest.raises(MachineError, match=r"got 1 MB free, want 1 GB for the frame shards"):
        check_space(Full(), movies)
    check_space(MemoryStorage(), movies)
