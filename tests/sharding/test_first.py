"""What everything else stands on: the bytes of one movie, and that nothing half-made is done."""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import DataError
from sharding.format.index import FrameIndex
from sharding.format.names import MANIFEST
from sharding.frames import open_frame_storage
from sharding.shard import read_sidecar
from sharding.storage.local import DiskStorage
from sharding.storage.memory import MemoryStorage
from tests.sharding.films import (
    Killed,
    Mortal,
    build_all,
    check_golden,
    film,
    write_dump,
    write_folder,
    write_tar,
)

MOVIE = "tt0032138"
CHECKOUT = Path(__file__).parents[2]
STAMPED = ("plan.json", "frames-00000.json")


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
    for name in set(storage.names()) - set(STAMPED):
        check_golden(f"one-movie/{name}", storage.read(name))


def test_the_index_tells_where_the_bytes_of_the_dump_lie(tmp_path: Path) -> None:
    write_tar(tmp_path, MOVIE, film(MOVIE))
    storage = MemoryStorage()
    build_all(storage, tmp_path)
    data = storage.read("frames-00000.tar")
    index = FrameIndex.from_bytes(storage.read("frames-00000.index.npz"), "index")
    found = {
        f"shot_{shot:04d}_img_{image}.jpg": data[offset : offset + size]
        for offset, size, shot, image in zip(
            index.offset.tolist(),
            index.size.tolist(),
            index.shot.tolist(),
            index.image.tolist(),
            strict=True,
        )
    }
    assert found == film(MOVIE)


# --- killed ---------------------------------------------------------------------------------------


def steps_of_a_build(dump: Path, files: dict[str, bytes], *, replace: bool = False) -> int:
    long = 10_000
    storage = Mortal(dict(files), long)
    build_all(storage, dump, replace=replace)
    return long - storage.life


def check_nothing_half_made_is_done(files: dict[str, bytes], whole: dict[str, bytes]) -> None:
    storage = Mortal(files, 0)
    for number in range(10):
        sidecar = read_sidecar(storage, "frames", number)
        if sidecar is not None:
            assert hashlib.sha256(files[sidecar.name]).hexdigest() == sidecar.sha256
    if MANIFEST in files:
        assert files == whole
    else:
        with pytest.raises(DataError, match="not sealed"):
            open_frame_storage(storage)


def test_killed_between_any_two_steps_nothing_half_made_is_done_and_a_rerun_ends_in_the_same_bytes(
    tmp_path: Path,
) -> None:
    write_dump(tmp_path)
    whole = MemoryStorage()
    build_all(whole, tmp_path)
    steps = steps_of_a_build(tmp_path, {})
    assert steps > 3 * 3
    for life in range(steps):
        files: dict[str, bytes] = {}
        with pytest.raises(Killed):
            build_all(Mortal(files, life), tmp_path)
        check_nothing_half_made_is_done(files, whole.files)
        build_all(Mortal(files, steps), tmp_path)
        assert files == whole.files


@settings(max_examples=30, deadline=None)
@given(lives=st.lists(st.integers(0, 8), max_size=8))
def test_a_build_that_is_killed_again_and_again_ends_in_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, lives: list[int]
) -> None:
    dump = tmp_path_factory.mktemp("dump")
    write_dump(dump)
    whole = MemoryStorage()
    build_all(whole, dump)
    files: dict[str, bytes] = {}
    for life in lives:
        try:
            build_all(Mortal(files, life), dump)
        except Killed:
            check_nothing_half_made_is_done(files, whole.files)
    build_all(Mortal(files, 10_000), dump)
    assert files == whole.files


def test_killed_while_a_changed_dump_replaces_an_old_set_no_mixture_is_ever_done(
    tmp_path: Path,
) -> None:
    write_dump(tmp_path)
    old = MemoryStorage()
    build_all(old, tmp_path)
    changed = {name: data[:-2] + b"\x00\xff\xd9" for name, data in film("tt0000001", 3).items()}
    write_tar(tmp_path, "tt0000001", changed, mtime=10**18 + 1)
    new = MemoryStorage()
    build_all(new, tmp_path)
    assert new.files != old.files
    steps = steps_of_a_build(tmp_path, old.files, replace=True)
    for life in range(steps):
        files = dict(old.files)
        with pytest.raises(Killed):
            build_all(Mortal(files, life), tmp_path, replace=True)
        check_nothing_half_made_is_done(files, old.files if life == 0 else new.files)
        build_all(Mortal(files, steps), tmp_path, replace=True)
        assert files == new.files


def test_a_tar_without_a_sidecar_is_built_again(tmp_path: Path) -> None:
    write_dump(tmp_path)
    storage = MemoryStorage()
    build_all(storage, tmp_path)
    whole = dict(storage.files)
    storage.remove("frames-00001.json")
    storage.files["frames-00001.tar"] = b"rubbish"
    build_all(storage, tmp_path)
    assert storage.files == whole


def test_a_tar_that_was_cut_counts_as_absent(tmp_path: Path) -> None:
    write_dump(tmp_path)
    storage = MemoryStorage()
    build_all(storage, tmp_path)
    whole = dict(storage.files)
    storage.files["frames-00001.tar"] = whole["frames-00001.tar"][:-512]
    assert read_sidecar(storage, "frames", 1) is None
    build_all(storage, tmp_path)
    assert storage.files == whole


@pytest.mark.slow
def test_a_build_process_killed_by_signal_9_leaves_nothing_that_a_rerun_does_not_mend(
    tmp_path: Path,
) -> None:
    dump, root = tmp_path / "dump", tmp_path / "root"
    for k in range(40):
        write_tar(dump, f"tt{k:07d}", film(f"tt{k:07d}", shots=40, size=4_000))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"version: 1\ndata: {{dump: {dump}, root: {root}}}\nsharding: {{shard_bytes: 500kB}}\n"
        "encoder: {name: x}\ntraining: {run: x}\n"
    )
    command = [sys.executable, "-m", "sharding", "build", "--config", str(config)]
    frames = root / "frames"
    kills = 0
    for wanted in itertools.count(2, 6):
        process = subprocess.Popen(command, cwd=CHECKOUT, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(frames.glob("*.json"))) < wanted:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
        assert not (frames / MANIFEST).exists()
        storage = DiskStorage(frames)
        for number in range(40):
            sidecar = read_sidecar(storage, "frames", number)
            if sidecar is not None:
                assert hashlib.sha256(storage.read(sidecar.name)).hexdigest() == sidecar.sha256
    assert kills >= 2
    whole = DiskStorage(tmp_path / "whole")
    build_all(whole, dump, shard_bytes=500_000)
    rebuilt = DiskStorage(frames)
    assert rebuilt.names() == whole.names()
    assert all(rebuilt.read(name) == whole.read(name) for name in whole.names())


# --- rejected -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (b"", "empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(200), "no JPEG start marker"),
        (b"\xff\xd8\xff\xe0" + bytes(200), "no JPEG end marker, cut"),
    ],
)
@pytest.mark.parametrize("write", [write_folder, write_tar])
def test_a_bad_image_is_left_out_and_listed_and_a_rerun_does_not_mistake_it_for_missing(
    tmp_path: Path,
    broken: bytes,
    reason: str,
    write: Callable[[Path, str, dict[str, bytes]], None],
) -> None:
    write(tmp_path, MOVIE, film(MOVIE) | {"shot_0001_img_1.jpg": broken})
    storage = MemoryStorage()
    manifest = build_all(storage, tmp_path, max_bad_fraction=0.5)
    whole = dict(storage.files)
    assert manifest.samples == 5
    assert b"shot_0001_img_1" not in storage.read("frames-00000.tar")
    line = f'{{"member":"shot_0001_img_1.jpg","movie":"{MOVIE}","reason":"{reason}"}}\n'
    assert storage.read("rejected.jsonl").decode() == line
    build_all(storage, tmp_path, max_bad_fraction=0.5)
    assert storage.files == whole


def test_too_many_bad_images_of_a_movie_stop_the_build_in_one_line(tmp_path: Path) -> None:
    write_folder(tmp_path, MOVIE, film(MOVIE) | {"shot_0001_img_1.jpg": b"x"})
    storage = MemoryStorage()
    with pytest.raises(DataError, match=f"{MOVIE}: got 1 bad of 6 images, want at most 1.0%"):
        build_all(storage, tmp_path)
    assert read_sidecar(storage, "frames", 0) is None
    assert "frames-00000.tar" not in storage.names()


def test_an_image_that_may_not_be_read_is_an_error_and_never_a_bad_image(tmp_path: Path) -> None:
    write_folder(tmp_path / "dump", MOVIE, film(MOVIE))
    image = tmp_path / "dump" / MOVIE / "shot_0000_img_0.jpg"
    image.chmod(0)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"version: 1\ndata: {{dump: {tmp_path}/dump, root: {tmp_path}/root}}\n"
        "sharding: {max_bad_fraction: 1}\nencoder: {name: x}\ntraining: {run: x}\n"
    )
    command = [sys.executable, "-m", "sharding", "build", "--config", str(config)]
    if os.geteuid() == 0:  # who may read everything, unless this is taken away
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        1,
        f"error: {image}: Permission denied",
    )
    assert not list((tmp_path / "root" / "frames").glob("frames-*"))


def test_a_read_error_in_a_tar_is_an_error_and_never_a_bad_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path, MOVIE, film(MOVIE))

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match=rf"Input/output error: .*{MOVIE}\.tar"):
        build_all(MemoryStorage(), tmp_path, max_bad_fraction=1.0)


# --- changed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_folder, write_tar])
def test_a_source_that_changed_after_the_plan_is_refused_and_planned_again(
    tmp_path: Path, write: Callable[..., None]
) -> None:
    write(tmp_path, MOVIE, film(MOVIE))
    storage = MemoryStorage()
    build_all(storage, tmp_path)
    write(tmp_path, MOVIE, film(MOVIE, shots=3), mtime=10**18 + 1)
    with pytest.raises(DataError, match=r"1 changed \(tt0032138\); say plan --replace"):
        build_all(storage, tmp_path)
    fresh = MemoryStorage()
    fresh.files["plan.json"] = storage.read("plan.json")
    with pytest.raises(DataError, match=r"changed since it was planned .9 images now, 6 then"):
        build_planned_of(fresh, tmp_path)
    assert build_all(storage, tmp_path, replace=True).samples == 9


def build_planned_of(storage: MemoryStorage, dump: Path) -> None:
    from sharding.frames import read_plan
    from tests.sharding.films import build_planned

    plan = read_plan(storage)
    assert plan is not None
    build_planned(storage, dump, plan)


def test_a_shard_made_from_something_else_is_refused_in_one_line_that_names_replace(
    tmp_path: Path,
) -> None:
    from sharding.build import publish_plan
    from sharding.dump.scan import read_movies
    from sharding.plan import make_plan

    write_tar(tmp_path, MOVIE, film(MOVIE))
    storage = MemoryStorage()
    build_all(storage, tmp_path)
    write_tar(tmp_path, MOVIE, film(MOVIE, shots=3), mtime=10**18 + 1)
    publish_plan(storage, make_plan(read_movies(tmp_path), shard_bytes=4_000), replace=True)
    with pytest.raises(DataError, match="--replace"):
        build_planned_of(storage, tmp_path)
