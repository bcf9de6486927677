from __future__ import annotations

import gzip
import io
import json
import logging
import os
import shutil
import stat
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError, DataError
from sharding.dump import archives as dump_module
from sharding.dump.archives import open_source
from sharding.dump.multipart import pieces
from sharding.dump.readers import GZIP, Inflated, LocalFile
from sharding.dump.scan import find_sources, read_movies
from sharding.storage.memory import MemoryStorage
from tests.sharding.films import build_all, film, jpeg, write_folder, write_tar

Movies = Mapping[str, Mapping[str, bytes]]
MOVIES = {f"tt{k}": film(f"tt{k}", shots=2 + k % 3) for k in range(5)}
STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
MTIME = (10**18, 10**18)


def tar_bytes(files: Mapping[str, bytes], prefix: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zip_bytes(files: Mapping[str, bytes], method: int = STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def below(prefix: str, movies: Movies) -> dict[str, bytes]:
    return {
        f"{prefix}{m}/{name}": data for m, files in movies.items() for name, data in files.items()
    }


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, ns=MTIME)
    return path


def put_parts(path: Path, data: bytes, suffixes: list[str]) -> None:
    size = -(-len(data) // len(suffixes))
    for k, suffix in enumerate(suffixes):
        put(path.with_name(f"{path.name}.{suffix}"), data[k * size : (k + 1) * size])


def plain(root: Path, movies: Movies) -> Path:
    for movie, files in movies.items():
        write_folder(root, movie, files)
    return root


def doubled(root: Path, movies: Movies) -> Path:
    for movie, files in movies.items():
        write_folder(root / movie, movie, files)
    return root


def all_levels(root: Path, movies: Movies) -> Path:
    plain(root / "240P" / "all", movies)
    return root


def tars(root: Path, movies: Movies) -> Path:
    for movie, files in movies.items():
        write_tar(root, movie, files)
    return root


def gzipped_tars(root: Path, movies: Movies) -> Path:
    for movie, files in movies.items():
        put(root / f"{movie}.tar.gz", gzip.compress(tar_bytes(files, f"{movie}/")))
    return root


def gzips_in_parts(root: Path, movies: Movies) -> Path:
    for movie, files in movies.items():
        put_parts(root / f"{movie}.tar.gz", gzip.compress(tar_bytes(files)), ["00", "01", "02"])
    return root


def mixture(root: Path, movies: Movies) -> Path:
    makers = [plain, tars, gzipped_tars, doubled, all_levels, zip_in_folder]
    for k, (movie, files) in enumerate(movies.items()):
        makers[k % len(makers)](root, {movie: files})
    return root


def zip_in_folder(root: Path, movies: Movies) -> Path:
    put(root / "extra.zip", zip_bytes(below("", movies)))
    return root


def several_zips(root: Path, movies: Movies) -> Path:
    for movie, files in movies.items():
        put(root / "zips" / f"{movie}.zip", zip_bytes(files))
    return root


def zip_of_images(root: Path, movies: Movies) -> Path:
    return put(root / "movies.zip", zip_bytes(below("frames/", movies)))


def zip_of_doubled(root: Path, movies: Movies) -> Path:
    files = {f"{m}/{m}/{n}": data for m, files in movies.items() for n, data in files.items()}
    return put(root / "movies.zip", zip_bytes(files))


def deflated_zip(root: Path, movies: Movies) -> Path:
    return put(root / "movies.zip", zip_bytes(below("240P/all/", movies), DEFLATED))


def mixed_up_zip(root: Path, movies: Movies) -> Path:
    files = below("", movies)
    order = sorted(files, key=lambda name: (name.rpartition("/")[2], name))
    return put(root / "movies.zip", zip_bytes({name: files[name] for name in order}))


def zip_of_tars(root: Path, movies: Movies) -> Path:
    files = {f"240P/{m}.tar": tar_bytes(files) for m, files in movies.items()}
    return put(root / "movies.zip", zip_bytes(files))


def zip_of_deflated_tars(root: Path, movies: Movies) -> Path:
    files = {f"240P/{m}.tar": tar_bytes(files, f"{m}/") for m, files in movies.items()}
    return put(root / "movies.zip", zip_bytes(files, DEFLATED))


def zip_of_gzipped_tars(root: Path, movies: Movies) -> Path:
    files = {f"{m}.tar.gz": gzip.compress(tar_bytes(files)) for m, files in movies.items()}
    return put(root / "movies.zip", zip_bytes(files))


def zip_in_parts(root: Path, movies: Movies) -> Path:
    put_parts(root / "movies.zip", zip_bytes(below("", movies)), ["001", "002", "003", "004"])
    return root / "movies.zip.001"


def folder_of_zip_parts(root: Path, movies: Movies) -> Path:
    put_parts(root / "movies.zip", zip_bytes(below("", movies)), ["aa", "ab", "ac"])
    return root


def one_tar(root: Path, movies: Movies) -> Path:
    return put(root / "movies.tar", tar_bytes(below("./240P/", movies)))


def tar_in_parts(root: Path, movies: Movies) -> Path:
    put_parts(root / "movies.tar", tar_bytes(below("", movies)), ["00", "01"])
    return root / "movies.tar"


FORMS: list[Callable[[Path, Movies], Path]] = [
    plain, doubled, all_levels, tars, gzipped_tars, gzips_in_parts, mixture, zip_in_folder,
    several_zips, zip_of_images, zip_of_doubled, deflated_zip, mixed_up_zip, zip_of_tars,
    zip_of_deflated_tars, zip_of_gzipped_tars, zip_in_parts, folder_of_zip_parts, one_tar,
    tar_in_parts,
]  # fmt: skip


def published(dump: Path, shard_bytes: int = 5_000) -> dict[str, bytes]:
    """Tars, indices and manifest; plan and sidecars name the source, so they differ."""
    storage = MemoryStorage()
    build_all(storage, dump, shard_bytes=shard_bytes)
    kept = (".tar", ".index.npz", "manifest.json")
    return {name: storage.read(name) for name in storage.names() if name.endswith(kept)}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_movies_gives_the_same_bytes(
    tmp_path: Path, form: Callable[[Path, Movies], Path]
) -> None:
    before = published(plain(tmp_path / "plain", MOVIES))
    assert len(before) > 5
    dump = form(tmp_path / "form", MOVIES)
    files = sorted(tmp_path.rglob("*"))
    assert published(dump) == before
    assert sorted(tmp_path.rglob("*")) == files, "something was unpacked"


@settings(max_examples=12)
@given(
    st.dictionaries(
        st.from_regex(r"tt[0-9]{1,3}", fullmatch=True),
        st.dictionaries(
            st.tuples(st.integers(0, 12), st.integers(0, 3)), st.integers(10, 900), min_size=1
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([zip_of_images, deflated_zip, zip_of_tars, zip_of_deflated_tars, one_tar]),
    st.integers(1, 4_000),
)
def test_the_form_never_matters(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: dict[str, dict[tuple[int, int], int]],
    form: Callable[[Path, Movies], Path],
    shard_bytes: int,
) -> None:
    movies = {
        movie: {f"shot_{s:04d}_img_{i}.jpg": jpeg((s, i), size) for (s, i), size in rows.items()}
        for movie, rows in sizes.items()
    }
    root = tmp_path_factory.mktemp("form")
    wanted = published(tars(root / "tars", movies), shard_bytes)
    assert published(form(root / "form", movies), shard_bytes) == wanted
    assert published(plain(root / "plain", movies), shard_bytes) == wanted


def test_a_movie_in_a_zip_and_in_a_folder_is_taken_where_it_has_more_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain(tmp_path, {"tt1": film("tt1", shots=3)})
    put(tmp_path / "a.zip", zip_bytes(below("frames/", {"tt1": film("tt1", shots=2)})))
    (movie,) = read_movies(tmp_path)
    assert (movie.source, movie.images) == ("tt1", 9)
    assert "tt1 is there twice: taking tt1 (9 images), not a.zip::frames/tt1 (6)" in caplog.text


# --- cut, split and damaged -----------------------------------------------------------------------


def expect_one_line(dump: Path, match: str) -> None:
    with pytest.raises((DataError, ConfigError), match=match) as error:
        published(dump)
    assert "\n" not in str(error.value)


def test_a_cut_zip_is_told_with_its_bytes(tmp_path: Path) -> None:
    path = zip_of_images(tmp_path, MOVIES)
    path.write_bytes(path.read_bytes()[:5000])
    expect_one_line(
        path, r"movies\.zip: got 5000 bytes and no end record, .*cut; go on with the download"
    )


def test_a_cut_tar_is_told_with_its_bytes(tmp_path: Path) -> None:
    path = one_tar(tmp_path, MOVIES)
    path.write_bytes(path.read_bytes()[:5000])
    expect_one_line(path, r"movies\.tar: got 5000 bytes, want at least \d+; the tar is cut")


def test_a_cut_gzip_is_told_with_its_bytes(tmp_path: Path) -> None:
    gzipped_tars(tmp_path, {"tt1": MOVIES["tt1"]})
    path = tmp_path / "tt1.tar.gz"
    path.write_bytes(path.read_bytes()[:1000])
    expect_one_line(tmp_path, r"tt1\.tar\.gz: got 1000 packed bytes, and the stream goes on; .*cut")


def test_a_tar_that_is_cut_inside_a_zip_names_both(tmp_path: Path) -> None:
    cut = tar_bytes(MOVIES["tt1"])[:1400]
    path = put(tmp_path / "movies.zip", zip_bytes({"tt1.tar": cut}))
    expect_one_line(
        path, r"movies\.zip::tt1\.tar: got 1400 bytes, want at least \d+; the tar is cut"
    )


def test_damage_in_a_gzip_is_told(tmp_path: Path) -> None:
    gzipped_tars(tmp_path, {"tt1": MOVIES["tt1"]})
    path = tmp_path / "tt1.tar.gz"
    data = bytearray(path.read_bytes())
    data[600:700] = bytes(100)
    path.write_bytes(data)
    expect_one_line(tmp_path, r"tt1\.tar\.gz: damaged at packed byte \d+")


@pytest.mark.parametrize(
    ("suffixes", "gone", "match"),
    [
        (
            ["001", "002", "003"],
            "002",
            r"movies\.zip: got 2 parts, want 3 \(without movies\.zip\.002\)",
        ),
        (["00", "01", "02"], "01", r"got 2 parts, want 3 \(without movies\.zip\.01\)"),
        (["aa", "ab", "ac"], "ab", r"got 2 parts, want 3 \(without movies\.zip\.ab\)"),
        (["001", "002", "003"], "001", r"got 2 parts, want 3 \(without movies\.zip\.001\)"),
        (["001", "002", "003"], "003", r"movies\.zip in 2 parts: got \d+ bytes and no end record"),
    ],
)
def test_a_part_that_is_missing_is_named(
    tmp_path: Path, suffixes: list[str], gone: str, match: str
) -> None:
    put_parts(tmp_path / "movies.zip", zip_bytes(below("", MOVIES)), suffixes)
    (tmp_path / f"movies.zip.{gone}").unlink()
    expect_one_line(tmp_path, match)
    left = next(name for name in suffixes if name != gone)
    expect_one_line(tmp_path / f"movies.zip.{left}", match)


def test_parts_are_read_in_order_of_number_beyond_the_digits() -> None:
    names = [f"x.zip.{k:02d}" for k in range(1, 100)] + ["x.zip.100", "x.zip.txt", "y.zip.01"]
    assert pieces("x.zip", reversed(names), "d")[-2:] == ("x.zip.99", "x.zip.100")
    assert pieces("x.tar", names, "d") == ()


@pytest.mark.skipif(shutil.which("zip") is None, reason="no zip program")
def test_a_zip_of_several_disks_is_told_how_to_join_and_works_joined(tmp_path: Path) -> None:
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


def test_a_gzip_of_several_movies_is_told_how_to_go_on(tmp_path: Path) -> None:
    data = tar_bytes(below("", MOVIES))
    put_parts(tmp_path / "movies.tar.gz", gzip.compress(data), ["00", "01"])
    expect_one_line(
        tmp_path, rf"gzip of 5 movies can only be read from its start.*{len(data)} bytes"
    )


def test_a_zip_that_changes_after_the_plan_is_refused(tmp_path: Path) -> None:
    path = zip_of_images(tmp_path, MOVIES)
    (movie, *_) = read_movies(path)
    os.utime(path, ns=(10**18, 10**18 + 1))
    with open_source(path, movie.source) as source:
        assert source.stamp != movie.stamp


def test_a_source_that_is_gone_from_a_dump_is_told(tmp_path: Path) -> None:
    path = zip_of_tars(tmp_path, MOVIES)
    with (
        pytest.raises(DataError, match="no 240P/tt9 in it any more; run plan --replace"),
        open_source(path, "::240P/tt9"),
    ):
        pass
    path.unlink()
    with (
        pytest.raises(DataError, match="gone since it was planned; run plan --replace"),
        open_source(path, "::240P/tt1.tar"),
    ):
        pass


# --- dirt and malice ------------------------------------------------------------------------------


def rejected(dump: Path) -> dict[str, str]:
    storage = MemoryStorage()
    build_all(storage, dump, max_bad_fraction=0.5)
    rows = map(json.loads, storage.read("rejected.jsonl").splitlines())
    return {row["member"]: row["reason"] for row in rows}


def test_unsafe_and_odd_members_of_a_zip_are_listed_and_reach_no_path(
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
        found = rejected(path)
    assert found == {
        "../../frames/tt1/shot_0007_img_0.jpg": "unsafe path",
        "/frames/tt1/shot_0008_img_0.jpg": "unsafe path",
        "frames/tt1/notes.txt": "no image of a shot",
        "frames/tt1/shot_9_img_0.jpg": "not a plain file",
        "frames/tt1/shot_10_img_0.jpg": "not a plain file",
        "frames/tt1/shot_11_img_0.jpg": "not a plain file",
    }
    assert "1 members of the dump's archives belong to no movie" in caplog.text
    assert "../../../etc/cron.d/evil" in caplog.text
    assert sorted(tmp_path.rglob("*")) == before


def test_a_tar_in_a_zip_that_is_a_link_or_leads_outside_is_no_movie(
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
    assert "members of the dump's archives belong to no movie" in caplog.text


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_two_members_of_one_name_in_a_zip_the_last_is_taken_and_the_first_listed(
    tmp_path: Path,
) -> None:
    name, new = "shot_0000_img_0.jpg", jpeg("new", 555)
    path = zip_of_images(tmp_path / "zip", {"tt1": film("tt1")})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"frames/tt1/{name}", new)
    wanted = published(plain(tmp_path / "plain", {"tt1": film("tt1") | {name: new}}))
    assert published(path) == wanted
    assert rejected(path) == {name: "stands there twice, the last one is taken"}


@pytest.mark.parametrize("method", [STORED, DEFLATED])
def test_a_damaged_image_in_a_zip_is_quarantined(tmp_path: Path, method: int) -> None:
    files = below("", {"tt1": film("tt1", size=3000)})
    path = put(tmp_path / "movies.zip", zip_bytes(files, method))
    data = bytearray(path.read_bytes())
    data[1000:1020] = bytes(20)  # inside the first image
    path.write_bytes(data)
    ((member, reason),) = rejected(path).items()
    assert member == "shot_0000_img_0.jpg"
    assert "check sum" in reason or "inflate" in reason


@pytest.mark.parametrize(("method", "reason"), [(12, "packed by method 12"), (14, "method 14")])
def test_an_image_packed_by_a_rare_method_is_listed(
    tmp_path: Path, method: int, reason: str
) -> None:
    path = zip_of_images(tmp_path, {"tt1": film("tt1")})
    with zipfile.ZipFile(path, "a", method) as archive:
        archive.writestr("frames/tt1/shot_0009_img_0.jpg", jpeg("x"))
    (found,) = rejected(path).values()
    assert reason in found


def test_an_impossible_size_is_listed_and_never_made_room_for(tmp_path: Path) -> None:
    files = below("", {"tt1": film("tt1")})
    path = put(tmp_path / "movies.zip", zip_bytes(files, DEFLATED))
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\1\2") + 24
    data[at : at + 4] = (4_000_000_000).to_bytes(4, "little")
    path.write_bytes(data)
    assert list(rejected(path).values()) == ["impossible size"]


# --- streams and listings -------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=30)
def test_a_stream_gives_the_bytes_of_any_place_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = os.urandom(40_000) * 500  # 20 MB: beyond two marks
    middle = 12_345_678
    packed = gzip.compress(content[:middle], 1) + gzip.compress(content[middle:], 1)
    path = put(tmp_path_factory.mktemp("stream") / "x.gz", packed)
    stream = Inflated("x.gz", LocalFile("x.gz", [path]), GZIP)
    places = st.tuples(st.integers(0, len(content) + 10), st.integers(0, 3_000_000))
    for at, length in data.draw(st.lists(places, min_size=1, max_size=6)):
        assert stream.pread(at, length) == content[at : at + length]
    assert stream.end() == len(content)
    stream.close()


def test_the_listing_of_a_large_archive_is_kept_beside_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {f"shot_{k:04d}_img_0.jpg": b"" for k in range(10_000)}
    path = put(tmp_path / "movies.zip", zip_bytes(below("", {"tt1": film("tt1"), "tt2": small})))
    cache = MemoryStorage()
    found = find_sources(path, cache)
    (name,) = cache.names()
    assert name.startswith("listing-")
    assert cache.size(name) < 5000  # type: ignore[operator]

    dump_module._listings.clear()
    monkeypatch.setattr(dump_module, "_list_zip", None)
    assert find_sources(path, cache) == found
    with open_source(path, "::tt1", cache) as source:
        assert len(source.images) == 6


def test_a_small_archive_leaves_no_listing_behind(tmp_path: Path) -> None:
    cache = MemoryStorage()
    read_movies(zip_of_images(tmp_path, MOVIES), cache=cache)
    assert cache.names() == []
