"""Damage to a set is detected, and repaired with the same bytes."""

from __future__ import annotations

import io
import os
import tarfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from configs.errors import DataError
from sharding.build import build_shards
from sharding.features import publish_feature_shard, seal_features
from sharding.format.encoding import sha256_hex
from sharding.format.names import MANIFEST
from sharding.frames import read_plan
from sharding.storage.local import DiskStorage
from sharding.storage.memory import MemoryStorage
from sharding.verify import mark_missing, verify_features, verify_frames
from tests.sharding.conftest import Run, contents
from tests.sharding.external_films import config_of, indexed, make_rows
from tests.sharding.external_films import write as write_external
from tests.sharding.feature_sets import DIM, labels_for, make_features, movie_features
from tests.sharding.films import Killed, Mortal, build_all, film, flip, write_dump, write_tar


@pytest.fixture
def frames(tmp_path: Path) -> DiskStorage:
    write_dump(tmp_path / "dump")
    storage = DiskStorage(tmp_path / "frames")
    build_all(storage, tmp_path / "dump")
    return storage


def test_an_intact_set_has_no_problems(frames: DiskStorage) -> None:
    shards = []
    assert verify_frames(frames, on_shard=lambda: shards.append(1)) == []
    assert len(shards) == 3
    features = MemoryStorage()
    make_features(features)
    assert verify_features(features) == []


@pytest.mark.parametrize("at", [0, 600, 5000, -1])
def test_one_flipped_bit_of_a_tar_is_detected(frames: DiskStorage, at: int) -> None:
    name = "frames-00001.tar"
    data = frames.read(name)
    frames.publish(name, flip(data, at % len(data)), replace=True)
    (problem,) = (one.text for one in verify_frames(frames))
    assert "frames-00001.tar: got " in problem
    assert problem.endswith("; rebuild it")


def test_missing_truncated_and_surplus_files_are_detected(frames: DiskStorage) -> None:
    frames.remove("frames-00000.json")
    frames.publish("frames-00001.tar", frames.read("frames-00001.tar")[:-1], replace=True)
    frames.publish("frames-00002.index.npz", b"x", replace=True)
    frames.publish("frames-00099.tar", b"")
    problems = "\n".join(problem.text for problem in verify_frames(frames))
    assert "frames-00099.tar: belongs to no shard" in problems
    assert "frames-00000.tar: the tar is missing or truncated" in problems
    assert "frames-00001.tar: the tar is missing or truncated" in problems
    assert "frames-00002.index.npz: does not match manifest.json" in problems
    assert len(problems.splitlines()) == 4


def test_a_set_with_consistent_digests_but_wrong_content_is_detected(tmp_path: Path) -> None:
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
    assert "the byte ranges of its index differ" in problems_with(tar, moved)[0]
    other = replace(index, shot=index.shot[::-1].copy())
    assert "the members of the tar differ from its index" in problems_with(tar, other)[0]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in film("a").items():
            info = tarfile.TarInfo(f"a/{name}")
            info.size, info.mtime = len(data), 5
            archive.addfile(info, io.BytesIO(data))
    assert "its header is not canonical" in problems_with(buffer.getvalue(), index)[0]


def test_numbers_that_are_not_finite_are_named_by_movie_and_shard() -> None:
    features = MemoryStorage()
    rows = movie_features(1)
    rows.features_ND[1, 2] = np.nan
    publish_feature_shard(features, 0, [movie_features(0), rows], input_digest="x")
    seal_features(
        features, n_shards=1, provenance={"import": {}, "dim": DIM}, labels_for=labels_for
    )
    (problem,) = verify_features(features)
    assert (
        "features-00000.tar: movie tt0000001: got NaN or infinite numbers in 1 of 2" in problem.text
    )
    assert problem.shard == 0


@pytest.mark.slow
def test_numbers_of_external_tars_that_rotted_are_named_and_nothing_is_repaired(
    tmp_path: Path,
) -> None:
    write_external(tmp_path / "tars", make_rows())
    config = config_of(tmp_path, str(tmp_path / "tars"))
    features = indexed(config)
    storage = DiskStorage(Path(config.features_dir))
    assert verify_features(storage, workers=2) == []
    tar = tmp_path / "tars" / "clip-001.tar"
    mtime = tar.stat().st_mtime_ns
    with tar.open("r+b") as file:
        file.seek(int(features.index.offset[5]))
        file.write(np.full(6, np.inf, "<f2").tobytes())
    os.utime(tar, ns=(mtime, mtime))
    for workers in (1, 2):
        (problem,) = verify_features(storage, workers=workers)
        assert "clip-001.tar: movie tt0000005: got NaN or infinite numbers in 1 of" in problem.text
        assert mark_missing(storage, "features", [problem]) == ()


@pytest.mark.parametrize("life", range(4))
def test_a_killed_repair_is_completed_by_a_rerun(life: int) -> None:
    files: dict[str, bytes] = {}
    make_features(Mortal(files, 99))
    intact = dict(files)
    for name in ("features-00000.tar", "features-00001.tar"):
        files[name] = flip(files[name], 700)
    mortal = Mortal(files, life)
    with suppress(Killed):
        mark_missing(mortal, "features", verify_features(mortal))
    survivor = Mortal(files, 99)
    if MANIFEST in files:
        assert mark_missing(survivor, "features", verify_features(survivor)) == (0, 1)
    removed = {MANIFEST, "features-00000.json", "features-00001.json"}
    assert set(intact) - set(files) == removed
    make_features(survivor)
    assert files == intact


def test_a_repair_of_problems_outside_the_shards_leaves_the_set_sealed(frames: DiskStorage) -> None:
    frames.publish("frames-00099.tar", b"")
    assert mark_missing(frames, "frames", verify_frames(frames)) == ()
    assert frames.size(MANIFEST) is not None


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "3"])
def test_repair_marks_damaged_shards_as_missing_and_build_restores_the_same_bytes(
    run: Run, tmp_path: Path, expected: dict[str, bytes], workers: str
) -> None:
    frames = tmp_path / "root" / "frames"
    assert run("build")[0] == 0
    damaged = bytearray((frames / "frames-00001.tar").read_bytes())
    damaged[700] ^= 1
    (frames / "frames-00001.tar").write_bytes(damaged)
    (frames / "frames-00003.json").unlink()
    (frames / "frames-00004.index.npz").write_bytes(b"x")
    code, out, _ = run("verify", f"sharding.workers={workers}")
    assert (code, len(out.splitlines())) == (1, 4)
    code, out, _ = run("verify", "--repair", f"sharding.workers={workers}")
    command = f"movienet-shard build --config {tmp_path}/root.yaml sharding.workers={workers}"
    marked = f"marked 3 shards as missing (1,3-4); next: `{command}`"
    assert (code, out.splitlines()[-1]) == (1, marked)
    assert run("status")[0] == 1
    assert run("build", f"sharding.workers={workers}")[0] == 0
    assert contents(frames) == expected
    assert run("status")[0] == run("verify")[0] == 0


def test_a_missing_shard_of_a_changed_source_is_not_rebuilt(run: Run, tmp_path: Path) -> None:
    assert run("build")[0] == 0
    write_tar(tmp_path / "dump", "tt0000001", film("other"), mtime=10**18 + 1)
    storage = DiskStorage(tmp_path / "root" / "frames")
    plan = read_plan(storage)
    assert plan is not None
    storage.remove("frames-00000.json")
    with pytest.raises(DataError, match="changed since it was planned"):
        build_shards(storage, tmp_path / "dump", plan, range(len(plan.shards)), max_bad_fraction=0)
