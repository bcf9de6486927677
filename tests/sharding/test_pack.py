"""The bytes of a frame shard, and its rejected images."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import DataError
from sharding.__main__ import main
from sharding.format import tar
from sharding.format.index import FrameIndex
from sharding.shard import read_sidecar
from sharding.storage.memory import MemoryStorage
from tests.sharding.conftest import contents, write_config
from tests.sharding.films import (
    build_all,
    check_golden,
    film,
    jpeg,
    shard_of,
    write_folder,
    write_tar,
)

pytestmark = pytest.mark.slow

MOVIE = "tt0032138"
UNSTABLE = ("plan.json", "frames-00000.json")
CHECKOUT = Path(__file__).parents[2]


def test_an_image_larger_than_the_buffer_is_copied(tmp_path: Path) -> None:
    big = jpeg("big", 9_000_000)
    files = film(MOVIE) | {"shot_0001_img_0.jpg": big}
    write_tar(tmp_path, MOVIE, files)
    shard = shard_of(tmp_path)
    with tarfile.open(fileobj=io.BytesIO(shard)) as archive:
        members = {m.name: archive.extractfile(m).read() for m in archive}  # type: ignore[union-attr]
    assert members == {f"{MOVIE}/{name}": data for name, data in files.items()}


@pytest.mark.parametrize("write", [write_folder, write_tar])
def test_golden_bytes_of_one_movie_are_the_same_from_a_folder_and_from_a_tar(
    tmp_path: Path, write: Callable[[Path, str, dict[str, bytes]], None]
) -> None:
    write(tmp_path, MOVIE, film(MOVIE))
    storage = MemoryStorage()
    build_all(storage, tmp_path)
    assert storage.names() == [
        "frames-00000.index.npz",
        "frames-00000.json",
        "frames-00000.tar",
        "manifest.json",
        "plan.json",
        "rejected.jsonl",
    ]
    for name in set(storage.names()) - set(UNSTABLE):
        check_golden(f"one-movie/{name}", storage.read(name))


def test_the_index_locates_the_bytes_of_the_dump(tmp_path: Path) -> None:
    write_tar(tmp_path, MOVIE, film(MOVIE))
    storage = MemoryStorage()
    build_all(storage, tmp_path)
    data = storage.read("frames-00000.tar")
    index = FrameIndex.from_bytes(storage.read("frames-00000.index.npz"), "index")
    images = {
        f"shot_{shot:04d}_img_{image}.jpg": data[offset : offset + size]
        for offset, size, shot, image in zip(
            index.offset.tolist(),
            index.size.tolist(),
            index.shot.tolist(),
            index.image.tolist(),
            strict=True,
        )
    }
    assert images == film(MOVIE)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (b"", "empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(200), "no JPEG start marker"),
        (b"\xff\xd8\xff\xe0" + bytes(200), "no JPEG end marker, cut"),
    ],
)
@pytest.mark.parametrize("write", [write_folder, write_tar])
def test_a_bad_image_is_rejected_and_listed_and_a_rerun_changes_nothing(
    tmp_path: Path,
    broken: bytes,
    reason: str,
    write: Callable[[Path, str, dict[str, bytes]], None],
) -> None:
    write(tmp_path, MOVIE, film(MOVIE) | {"shot_0001_img_1.jpg": broken})
    storage = MemoryStorage()
    manifest = build_all(storage, tmp_path, max_bad_fraction=0.5)
    before = dict(storage.files)
    assert manifest.samples == 5
    assert b"shot_0001_img_1" not in storage.read("frames-00000.tar")
    line = f'{{"member":"shot_0001_img_1.jpg","movie":"{MOVIE}","reason":"{reason}"}}\n'
    assert storage.read("rejected.jsonl").decode() == line
    build_all(storage, tmp_path, max_bad_fraction=0.5)
    assert storage.files == before


def test_too_many_bad_images_of_a_movie_stop_the_build(tmp_path: Path) -> None:
    write_folder(tmp_path, MOVIE, film(MOVIE) | {"shot_0001_img_1.jpg": b"x"})
    storage = MemoryStorage()
    with pytest.raises(DataError, match=f"{MOVIE}: got 1 bad of 6 images, want at most 1.0%"):
        build_all(storage, tmp_path)
    assert read_sidecar(storage, "frames", 0) is None
    assert "frames-00000.tar" not in storage.names()


@pytest.mark.parametrize("bad", [(), (0,), (1, 2), (5,), (0, 1, 2, 3, 4, 5)])
def test_a_tar_read_in_long_runs_gives_the_bytes_of_a_folder(
    tmp_path: Path, bad: tuple[int, ...]
) -> None:
    images = film("tt1", shots=2, size=5_000)
    for position, name in enumerate(images):
        if position in bad:
            images[name] = images[name][:-2]
    for form, write in (("tars", write_tar), ("folders", write_folder)):
        write(tmp_path / form, "tt1", images)
        write(tmp_path / form, "tt2", film("tt2"))
        write_config(tmp_path, root=f"set-{form}", dump=form)
        config = str(tmp_path / f"set-{form}.yaml")
        assert main(["build", "--config", config, "sharding.max_bad_fraction=1"]) == 0
    tars, folders = (contents(tmp_path / f"set-{form}" / "frames") for form in ("tars", "folders"))
    for name in ("frames-00000.tar", "frames-00000.index.npz", "manifest.json", "rejected.jsonl"):
        assert tars[name] == folders[name]
    assert tars["rejected.jsonl"].count(b"\n") == len(bad)


MANY = 20_000
BUILD_AND_MEASURE = """
import re, sys
from pathlib import Path
from sharding.__main__ import main
code = main(["build", "--config", sys.argv[1]])
loaded = {"torch", "webdataset", "open_clip"} & set(sys.modules)
# Not getrusage: its peak includes that of the parent process before exec.
peak = re.search("VmHWM:[^0-9]*([0-9]+)", Path("/proc/self/status").read_text())
print(code, int(peak[1]) // 1024, sorted(loaded))
"""


@pytest.mark.parametrize("write", [write_tar, write_folder])
def test_a_shard_of_20_000_images_is_built_within_150_mb_and_without_torch(
    tmp_path: Path, write: Callable[..., None]
) -> None:
    write(tmp_path / "dump", "tt1", film("tt1", shots=MANY // 10, images=10, size=400))
    config = write_config(tmp_path)
    config.write_text(config.read_text().replace("6000", "64MiB"))
    command = [sys.executable, "-c", BUILD_AND_MEASURE, str(config)]
    done = subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True, text=True)
    sealed, *_, measured = done.stdout.splitlines()
    assert sealed.startswith("sealed: movies 1   images 20,000 ")
    code, peak_mb, loaded = measured.split(maxsplit=2)
    assert (code, loaded) == ("0", "[]")
    assert int(peak_mb) < 150


def test_300_000_tiny_images_are_sharded_within_the_same_memory(tmp_path: Path) -> None:
    image = jpeg("tiny", 64)
    (tmp_path / "dump").mkdir()
    for movie in range(30):
        with (tmp_path / "dump" / f"tt{movie:07d}.tar").open("wb") as file:
            for shot in range(10_000):
                file.write(tar.header(f"shot_{shot:04d}_img_0.jpg", len(image)) + image)
                file.write(bytes(tar.padding(len(image))))
            file.write(tar.end(file.tell()))
    config = write_config(tmp_path)
    config.write_text(config.read_text().replace("6000", "16MiB"))
    command = [sys.executable, "-c", BUILD_AND_MEASURE, str(config)]
    done = subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True, text=True)
    sealed, *_, measured = done.stdout.splitlines()
    assert sealed.startswith("sealed: movies 30   images 300,000   shards 2 ")
    assert int(measured.split()[1]) < 150
