"""Whole sets: read by other people's tools, verified, relabelled, driven by commands."""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from configs.errors import DataError
from sharding.__main__ import main
from sharding.features import (
    FeatureSet,
    MovieFeatures,
    feature_shard_done,
    open_features,
    open_index,
    publish_feature_shard,
    seal_features,
)
from sharding.format.encoding import sha256_hex
from sharding.format.names import MANIFEST
from sharding.frames import open_frames
from sharding.labels import Labels, make_labels
from sharding.storage.base import Range, Storage
from sharding.storage.local import DiskStorage
from sharding.storage.memory import MemoryStorage
from sharding.verify import mark_missing, verify_features, verify_frames
from tests.sharding.films import (
    Killed,
    Mortal,
    build_all,
    check_golden,
    film,
    jpeg,
    write_dump,
    write_folder,
    write_tar,
)

DIM = 6
GENRES = ("Drama", "War")
CHECKOUT = Path(__file__).parents[2]
# webdataset leaves its files to the garbage collector.
UNCLOSED = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def movie_features(number: int) -> MovieFeatures:
    n = number % 4 + 1
    return MovieFeatures(
        movie=f"tt{number:07d}",
        features_ND=(np.arange(n * DIM).reshape(n, DIM) + number).astype(np.float16),
        shots_N=np.arange(n, dtype=np.int32),
        images=n + 1,
        rejected={"shot_0009_img_0.jpg": "not a picture"},
    )


def labels_for(movies: Sequence[str]) -> Labels:
    metadata = {movie: [GENRES[int(movie[-1]) % 2]] for movie in movies}
    return make_labels(movies, GENRES, metadata, dict.fromkeys(movies, "train"))[0]


def make_features(storage: Storage, n_movies: int = 7) -> None:
    for number, first in enumerate(range(0, n_movies, 3)):
        if not feature_shard_done(storage, number, f"source {number}"):
            movies = (movie_features(k) for k in range(first, min(first + 3, n_movies)))
            publish_feature_shard(storage, number, movies, made_from=f"source {number}")
    n_shards = -(-n_movies // 3)
    seal_features(
        storage, n_shards=n_shards, provenance={"import": {}, "dim": DIM}, labels_for=labels_for
    )


def rows_of(features: FeatureSet, movie: int) -> np.ndarray:
    rows_ND = np.empty((int(features.index.rows[movie]), features.dim), np.float16)
    place = Range(features.shard_file(movie), int(features.index.offset[movie]))
    features.storage.read_into([place], [rows_ND.reshape(-1).view(np.uint8).data])
    return rows_ND


# --- features -------------------------------------------------------------------------------------


def test_golden_bytes_of_a_feature_set() -> None:
    storage = MemoryStorage()
    make_features(storage, 4)
    for name in ("features-00001.tar", "index.npz", "labels.npz", "manifest.json"):
        check_golden(f"features/{name}", storage.read(name))


def test_the_index_leads_to_the_rows_of_every_movie(tmp_path: Path) -> None:
    make_features(DiskStorage(tmp_path))
    features = open_features(str(tmp_path))
    assert features.movie_ids == tuple(f"tt{k:07d}" for k in range(7))
    assert features.dim == DIM
    assert features.digest == sha256_hex((tmp_path / MANIFEST).read_bytes())
    assert features.labels.movies("train").tolist() == list(range(7))
    for movie in range(7):
        np.testing.assert_array_equal(rows_of(features, movie), movie_features(movie).features_ND)


def test_a_feature_build_killed_between_any_two_steps_is_never_mistaken_for_done() -> None:
    whole = Mortal({}, 10_000)
    make_features(whole)
    for life in range(10_000 - whole.life):
        files: dict[str, bytes] = {}
        with pytest.raises(Killed):
            make_features(Mortal(files, life))
        with pytest.raises(DataError, match="not sealed"):
            open_index(Mortal(files, 0))
        make_features(Mortal(files, 10_000))
        assert files == whole.files


def test_a_feature_shard_made_from_something_else_is_refused_and_replaced_on_request() -> None:
    storage = MemoryStorage()
    publish_feature_shard(storage, 0, [movie_features(1)], made_from="a")
    assert feature_shard_done(storage, 0, "a")
    assert not feature_shard_done(storage, 1, "a")
    with pytest.raises(DataError, match="say --replace"):
        feature_shard_done(storage, 0, "b")
    assert not feature_shard_done(storage, 0, "b", replace=True)


def seal(storage: Storage, n_shards: int, dim: int = DIM) -> None:
    seal_features(storage, n_shards=n_shards, provenance={"dim": dim}, labels_for=labels_for)


def test_an_incomplete_or_damaged_feature_set_is_not_sealed() -> None:
    storage = MemoryStorage()
    for number in (1, 2, 4):
        publish_feature_shard(storage, number, [movie_features(number)], made_from="a")
    with pytest.raises(DataError, match=r"2 of 5 feature shards are missing; .*--array=0,3"):
        seal(storage, 5)
    tar = bytearray(storage.files["features-00001.tar"])
    tar[700] ^= 1
    storage.files["features-00001.tar"] = bytes(tar)
    with pytest.raises(DataError, match="--array=0-1,3"):
        seal(storage, 5)
    assert MANIFEST not in storage.files
    assert not feature_shard_done(storage, 1, "a"), "so that a rerun makes it again"
    assert feature_shard_done(storage, 2, "a")


def test_rows_of_another_dimension_and_movies_in_two_shards_are_refused() -> None:
    storage = MemoryStorage()
    publish_feature_shard(storage, 0, [movie_features(1)], made_from="a")
    with pytest.raises(DataError, match="tt0000001: got rows of 6 numbers, want 9"):
        seal(storage, 1, dim=9)
    publish_feature_shard(storage, 1, [movie_features(1)], made_from="a")
    with pytest.raises(DataError, match="movie tt0000001 stands in two places"):
        seal(storage, 2)


@pytest.mark.parametrize(
    "movies",
    [
        [movie_features(2), movie_features(1)],
        [MovieFeatures("a", np.zeros((2, 3), np.float16), np.zeros(1, np.int32), 2)],
        [MovieFeatures("a", np.zeros((2, 3), np.float32), np.zeros(2, np.int32), 2)],
    ],
)
def test_arrays_that_do_not_fit_publish_nothing(movies: list[MovieFeatures]) -> None:
    storage = MemoryStorage()
    with pytest.raises(ValueError, match="want"):
        publish_feature_shard(storage, 0, movies, made_from="a")
    assert storage.names() == []


def test_a_movie_without_rows_is_kept() -> None:
    storage = MemoryStorage()
    empty = MovieFeatures("a", np.zeros((0, DIM), np.float16), np.zeros(0, np.int32), 3)
    publish_feature_shard(storage, 0, [empty], made_from="a")
    manifest = seal_features(
        storage,
        n_shards=1,
        provenance={"dim": DIM},
        labels_for=lambda movies: make_labels(movies, GENRES, {}, {})[0],
    )
    assert (manifest.samples, verify_features(storage)) == (1, [])


def test_labels_of_other_movies_are_caught(tmp_path: Path) -> None:
    storage = DiskStorage(tmp_path)
    make_features(storage)
    other = labels_for([f"tt{k:07d}" for k in range(1, 8)])
    storage.publish("labels.npz", other.to_bytes(), replace=True)
    with pytest.raises(DataError, match="made for other movies; run `python -m sharding relabel`"):
        open_features(str(tmp_path))


# --- other people's tools -------------------------------------------------------------------------


def photo(key: int) -> bytes:
    pixels = np.random.default_rng(key).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@UNCLOSED
def test_webdataset_reads_every_sample_and_field_of_frame_shards(tmp_path: Path) -> None:
    webdataset: Any = importlib.import_module("webdataset")
    films: dict[str, dict[str, bytes]] = {}
    writers: list[Callable[..., None]] = [write_folder, write_tar, write_tar]
    for k, write in enumerate(writers):
        movie = f"tt{k:07d}"
        names = film(movie, shots=3)
        films[movie] = {name: photo(100 * k + j) for j, name in enumerate(names)}
        write(tmp_path / "dump", movie, films[movie])
    build_all(DiskStorage(tmp_path / "set"), tmp_path / "dump", shard_bytes=10_000)
    shards = sorted(str(path) for path in (tmp_path / "set").glob("*.tar"))
    assert len(shards) > 1
    found: dict[str, Any] = {
        sample["__key__"]: sample for sample in webdataset.WebDataset(shards, shardshuffle=False)
    }
    wanted = {
        f"{movie}/{name.removesuffix('.jpg')}": data
        for movie, images in films.items()
        for name, data in images.items()
    }
    assert {key: sample["jpg"] for key, sample in found.items()} == wanted
    assert list(found) == sorted(wanted)
    for sample in webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8"):
        assert sample["jpg"].shape == (6, 8, 3)


@UNCLOSED
def test_webdataset_reads_every_sample_and_field_of_feature_shards(tmp_path: Path) -> None:
    webdataset: Any = importlib.import_module("webdataset")
    make_features(DiskStorage(tmp_path))
    shards = sorted(str(path) for path in tmp_path.glob("*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    assert len(samples) == 7
    for k, sample in enumerate(samples):
        movie = movie_features(k)
        fields = {name for name in sample if not name.startswith("__")}
        assert (sample["__key__"], fields) == (movie.movie, {"features.npy", "shots.npy", "json"})
        np.testing.assert_array_equal(sample["features.npy"], movie.features_ND, strict=True)
        np.testing.assert_array_equal(sample["shots.npy"], movie.shots_N, strict=True)
        rejected = ["shot_0009_img_0.jpg"]
        assert sample["json"] == {"id": movie.movie, "images": movie.images, "rejected": rejected}


def test_gnu_tar_lists_and_unpacks_frame_shards_to_the_bytes_of_the_dump(tmp_path: Path) -> None:
    write_tar(tmp_path / "dump", "tt0032138", film("tt0032138"))
    build_all(DiskStorage(tmp_path), tmp_path / "dump")
    shard = tmp_path / "frames-00000.tar"
    listing = subprocess.run(
        ["tar", "-tvf", shard],
        env=os.environ | {"TZ": "UTC", "LC_ALL": "C"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert listing.stderr == ""
    lines = [line.split() for line in listing.stdout.splitlines()]
    assert [line[5] for line in lines] == [f"tt0032138/{name}" for name in film("tt0032138")]
    assert {tuple(line[:2] + line[3:5]) for line in lines} == {
        ("-rw-r--r--", "0/0", "1970-01-01", "00:00")
    }
    subprocess.run(["tar", "-C", tmp_path, "-xf", shard], check=True)
    for name, data in film("tt0032138").items():
        assert (tmp_path / "tt0032138" / name).read_bytes() == data


# --- verify ---------------------------------------------------------------------------------------


@pytest.fixture
def frames(tmp_path: Path) -> DiskStorage:
    write_dump(tmp_path / "dump")
    storage = DiskStorage(tmp_path / "frames")
    build_all(storage, tmp_path / "dump")
    return storage


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_a_whole_set_has_no_problems(frames: DiskStorage) -> None:
    shards = []
    assert verify_frames(frames, on_shard=lambda: shards.append(1)) == []
    assert len(shards) == 3
    features = MemoryStorage()
    make_features(features)
    assert verify_features(features) == []


@pytest.mark.parametrize("at", [0, 600, 5000, -1])
def test_one_flipped_bit_of_a_tar_is_found(frames: DiskStorage, at: int) -> None:
    name = "frames-00001.tar"
    data = frames.read(name)
    frames.publish(name, flip(data, at % len(data)), replace=True)
    (problem,) = (found.text for found in verify_frames(frames))
    assert "frames-00001.tar: got " in problem
    assert "delete it and make it again" in problem


def test_missing_cut_and_foreign_files_are_found(frames: DiskStorage) -> None:
    frames.remove("frames-00000.json")
    frames.publish("frames-00001.tar", frames.read("frames-00001.tar")[:-1], replace=True)
    frames.publish("frames-00002.index.npz", b"x", replace=True)
    frames.publish("frames-00099.tar", b"")
    problems = "\n".join(problem.text for problem in verify_frames(frames))
    assert "frames-00099.tar: belongs to no shard" in problems
    assert "frames-00000.tar: the tar is missing or cut" in problems
    assert "frames-00001.tar: the tar is missing or cut" in problems
    assert "frames-00002.index.npz: does not match manifest.json" in problems
    assert len(problems.splitlines()) == 4


def test_a_set_that_is_consistently_wrong_is_found_out_by_its_headers(tmp_path: Path) -> None:
    from dataclasses import replace

    from sharding.format.index import FrameIndex
    from sharding.format.manifest import Manifest, ManifestShard
    from sharding.shard import read_sidecar

    write_tar(tmp_path, "a", film("a"))
    storage = MemoryStorage()
    build_all(storage, tmp_path)
    good = dict(storage.files)

    def problems_with(tar: bytes, index: FrameIndex) -> list[str]:
        sidecar = read_sidecar(Mortal(good, 0), "frames", 0)
        assert sidecar is not None
        files = {"frames-00000.tar": tar, "frames-00000.index.npz": index.to_bytes()}
        wrong = replace(
            sidecar,
            n_bytes=len(tar),
            sha256=sha256_hex(tar),
            index=sha256_hex(files["frames-00000.index.npz"]),
        )
        manifest = Manifest("frames", {}, (ManifestShard.of(wrong),))
        files |= {"frames-00000.json": wrong.to_bytes(), MANIFEST: manifest.to_bytes()}
        return [problem.text for problem in verify_frames(Mortal(good | files, 0))]

    tar = good["frames-00000.tar"]
    index = FrameIndex.from_bytes(good["frames-00000.index.npz"], "index")
    assert problems_with(tar, index) == []
    moved = replace(index, offset=index.offset + np.uint64(1))
    assert "tells other places" in problems_with(tar, moved)[0]
    other = replace(index, shot=index.shot[::-1].copy())
    assert "members are not those of its index" in problems_with(tar, other)[0]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in film("a").items():
            info = tarfile.TarInfo(f"a/{name}")
            info.size, info.mtime = len(data), 5
            archive.addfile(info, io.BytesIO(data))
    assert "its header is not normalised" in problems_with(buffer.getvalue(), index)[0]


@pytest.mark.parametrize("life", range(4))
def test_a_repair_that_was_killed_is_finished_by_the_same_command(life: int) -> None:
    files: dict[str, bytes] = {}
    make_features(Mortal(files, 99))
    whole = dict(files)
    for name in ("features-00000.tar", "features-00001.tar"):
        files[name] = flip(files[name], 700)
    mortal = Mortal(files, life)
    with suppress(Killed):
        mark_missing(mortal, "features", verify_features(mortal))
    survivor = Mortal(files, 99)
    if MANIFEST in files:
        assert mark_missing(survivor, "features", verify_features(survivor)) == (0, 1)
    removed = {MANIFEST, "features-00000.json", "features-00001.json"}
    assert set(whole) - set(files) == removed
    make_features(survivor)
    assert files == whole


def test_problems_that_belong_to_no_shard_leave_a_set_sealed(frames: DiskStorage) -> None:
    frames.publish("frames-00099.tar", b"")
    assert mark_missing(frames, "frames", verify_frames(frames)) == ()
    assert frames.size(MANIFEST) is not None


# --- commands -------------------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    write_dump(tmp_path / "dump")
    (tmp_path / "meta.json").write_text(json.dumps({f"tt{k:07d}": ["War"] for k in range(5)}))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"version: 1\ndata:\n  dump: {tmp_path}/dump\n  root: {tmp_path}/root\n"
        f"  metadata: {tmp_path}/meta.json\n  genres: [Drama, War]\n"
        "sharding: {shard_bytes: 6000}\nencoder: {name: x}\ntraining: {run: x}\n"
        "tracking: {wandb: 'off'}\n"
    )

    def call(*args: str) -> tuple[int, str, str]:
        code = main([*args, "--config", str(config)])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def test_build_alone_plans_builds_and_seals(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("build")
    assert (code, out[:42]) == (0, "sealed: movies 5   images 42   shards 3   ")
    assert open_frames(str(tmp_path / "root" / "frames")).n_shards == 3
    assert run("verify")[:2] == (0, f"{tmp_path}/root/frames: ok\n")
    assert run("status")[1].splitlines()[1].startswith("shards 3 of 3 done   sealed")


def test_shares_build_the_set_together_and_the_last_one_seals(run: Run, tmp_path: Path) -> None:
    assert "shards 1 of 3 done" in run("build", "--share", "0/2")[1] + run("status")[1]
    code, _, err = run("seal")
    assert code == 1
    assert "of 3 frame shards are missing; build them with --array=" in err
    assert run("build", "--share", "1/2")[1].startswith("sealed: ")
    alone = DiskStorage(tmp_path / "alone")
    build_all(alone, tmp_path / "dump")
    shared = DiskStorage(tmp_path / "root" / "frames")
    assert all(shared.read(name) == alone.read(name) for name in alone.names())


def test_one_shard_is_built_by_name_or_number(run: Run) -> None:
    assert run("build", "--only", "frames-00001")[1] == "shards 1 of 3 done\n"
    assert run("build", "--only", "2")[1] == "shards 2 of 3 done\n"
    code, _, err = run("build", "--only", "frames-00007")
    assert (code, err.splitlines()[-1]) == (
        2,
        "error: --only: no shard 'frames-00007'; the set has frames-00000 to frames-00002",
    )


def test_another_shard_size_is_refused_until_the_plan_is_replaced(run: Run) -> None:
    run("build")
    for command in ("build", "plan"):
        code, _, err = run(command, "sharding.shard_bytes=9000")
        assert code == 1
        assert "plan --replace" in err.splitlines()[-1]
    assert run("plan", "--replace", "sharding.shard_bytes=9000")[0] == 0
    code, _, err = run("build", "sharding.shard_bytes=9000")
    assert code == 1
    assert "say --replace to build it again" in err
    assert run("build", "--replace", "sharding.shard_bytes=9000")[0] == 0
    assert run("verify", "sharding.shard_bytes=9000")[0] == 0  # the third shard is gone


def test_shards_that_are_not_in_the_plan_are_refused_or_with_replace_removed(
    run: Run, tmp_path: Path
) -> None:
    run("build")
    data = {path.name: path.read_bytes() for path in (tmp_path / "root" / "frames").iterdir()}
    for suffix in ("tar", "json", "index.npz"):
        old = tmp_path / "root" / "frames" / f"frames-00002.{suffix}"
        old.with_name(f"frames-00003.{suffix}").write_bytes(old.read_bytes())
    code, _, err = run("build")
    assert (code, "got frames-00003.json, want 3 shards" in err.splitlines()[-1]) == (1, True)
    assert run("build", "--replace")[0] == 0
    assert data == {p.name: p.read_bytes() for p in (tmp_path / "root" / "frames").iterdir()}


def test_status_does_not_count_shards_of_an_older_plan(run: Run, tmp_path: Path) -> None:
    run("build")
    write_folder(tmp_path / "dump", "tt0000004", {"shot_0009_img_0.jpg": jpeg("new")})
    assert run("plan", "--replace")[0] == 0
    code, out, _ = run("status")
    assert (code, out.splitlines()[-1].startswith("shards 2 of 3 done   not sealed")) == (1, True)


def test_status_exits_with_0_once_all_shards_are_done_and_the_set_is_sealed(
    run: Run, tmp_path: Path
) -> None:
    assert run("status")[0] == 1, "there is no plan"
    run("build", "--share", "0/2")
    assert run("status")[0] == 1
    run("build", "--share", "1/2")
    assert run("status")[0] == 0
    (tmp_path / "root" / "frames" / MANIFEST).unlink()
    code, out, _ = run("status")
    assert (code, "shards 3 of 3 done   not sealed" in out) == (1, True)
    run("seal")
    (tmp_path / "root" / "frames" / "frames-00001.json").unlink()
    code, out, _ = run("status")
    assert (code, "shards 2 of 3 done   sealed" in out) == (1, True)


def test_verify_tells_what_is_wrong_and_exits_1(run: Run, tmp_path: Path) -> None:
    run("build")
    path = tmp_path / "root" / "frames" / "frames-00001.tar"
    path.write_bytes(flip(path.read_bytes(), 700))
    code, out, _ = run("verify")
    assert code == 1
    assert out.splitlines()[-1].endswith("frames: 1 problems")


def test_relabel_writes_labels_and_touches_nothing_else(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    make_features(DiskStorage(folder), 5)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    split = tmp_path / "split.json"
    split.write_text('{"val": ["tt0000001", "tt0000003"]}')
    code, out, _ = run("relabel", "--features", str(folder), "--split", str(split))
    assert (code, out[:41]) == (0, "train 0   val 2   test 0   in none 3   la")
    changed = [path.name for path in folder.iterdir() if before[path.name] != path.read_bytes()]
    assert changed == ["labels.npz"]
    features = open_features(str(folder))
    assert features.labels.movies("val").tolist() == [1, 3]
    assert features.labels.hot_MG.tolist() == [[0, 1]] * 5
    (folder / "labels.npz").unlink()
    assert run("relabel", "--features", str(folder))[0] == 0
    assert verify_features(DiskStorage(folder)) == []
    assert run("verify", "--features", str(folder))[0] == 0


def test_a_shard_that_the_system_does_not_take_ends_in_one_line_and_leaves_nothing(
    run: Run, tmp_path: Path
) -> None:
    write_tar(tmp_path / "dump", "tt9", film("tt9", shots=40, size=3_000))
    command = f"{sys.executable} -m sharding build --config {tmp_path}/config.yaml"
    limited = ["bash", "-c", f"ulimit -f 100; exec {command}"]  # files of at most 100 KiB
    done = subprocess.run(limited, cwd=CHECKOUT, check=False, capture_output=True, text=True)
    frames = tmp_path / "root" / "frames"
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"error: {frames}/frames-00003.tar: File too large"
    assert not [path.name for path in frames.iterdir() if "00003" in path.name]
    assert run("build")[1].startswith("sealed: movies 6")


def test_nothing_is_sealed_or_verified_before_it_is_built(run: Run) -> None:
    for command in ("seal", "status", "verify"):
        code, _, err = run(command)
        assert code == 1
        assert err.splitlines()[-1].startswith("error: ")


def test_the_whole_set_may_move_to_another_folder(run: Run, tmp_path: Path) -> None:
    run("build")
    shutil.move(tmp_path / "root" / "frames", tmp_path / "moved")
    assert verify_frames(DiskStorage(tmp_path / "moved")) == []


def test_no_module_of_the_room_imports_torch() -> None:
    code = (
        "import importlib, pkgutil, sys, sharding\n"
        "for module in pkgutil.walk_packages(sharding.__path__, 'sharding.'):\n"
        "    importlib.import_module(module.name)\n"
        "print({'torch', 'webdataset', 'open_clip'} & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, check=True, capture_output=True, text=True
    )
    assert done.stdout == "set()\n"
