"""A full disk, an exceeded quota or a read-only folder ends a build with one line; a network disk
does not."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from configs.runtime import publish
from sharding.frames import read_plan
from sharding.pack import build_shard
from sharding.storage.local import DiskStorage
from tests.disks import network_disk, small_disk
from tests.sharding.conftest import Run, contents
from tests.sharding.films import film, write_tar

pytestmark = pytest.mark.slow


def test_a_full_disk_leaves_no_partial_file(
    run: Run, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    frames = tmp_path / "root" / "frames"
    with small_disk(frames, "4m"):
        assert run("plan")[0] == 0
        storage = DiskStorage(frames)
        plan = read_plan(storage)
        assert plan is not None
        # Another process fills the disk after the check.
        subprocess.run(["mount", "-o", "remount,size=48k", str(frames)], check=True)
        done: list[int] = []

        def build_one_by_one() -> None:
            for number in range(len(plan.shards)):
                build_shard(storage, tmp_path / "dump", plan, number, max_bad_fraction=0)
                done.append(number)

        with pytest.raises(OSError, match="No space left") as caught:
            build_one_by_one()
        assert caught.value.filename.startswith(str(frames))
        for name, data in contents(frames).items():
            assert data == expected[name]
        assert 0 < len(done) < len(plan.shards)
        subprocess.run(["mount", "-o", "remount,size=4m", str(frames)], check=True)
        assert run("build")[0] == 0
        assert contents(frames) == expected


@contextmanager
def small_quota(tmp_path: Path, limit: str) -> Iterator[Path]:
    """Yield a folder on btrfs, which supports quotas without kernel options."""
    image, disk = tmp_path / "disk.img", tmp_path / "disk"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(128 * 2**20)
    if shutil.which("mkfs.btrfs") is None:
        pytest.skip("no btrfs-progs")
    subprocess.run(["mkfs.btrfs", "-q", str(image)], check=True, capture_output=True)
    if subprocess.run(["mount", "-o", "loop", image, disk], check=False).returncode:
        pytest.skip("this user may not mount a small disk")
    try:
        subprocess.run(["btrfs", "-q", "quota", "enable", disk], check=True)
        subprocess.run(["btrfs", "-q", "subvolume", "create", disk / "mine"], check=True)
        subprocess.run(["btrfs", "-q", "qgroup", "limit", limit, disk / "mine"], check=True)
        yield disk / "mine"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_an_exceeded_quota_leaves_no_partial_file(tmp_path: Path, run: Run) -> None:
    for k in range(12):
        write_tar(tmp_path / "large", f"tt{k:07d}", film(f"tt{k:07d}", size=50_000))
    large = [f"data.dump={tmp_path}/large", "sharding.shard_bytes=300kB"]
    assert run("build", *large)[0] == 0
    expected = contents(tmp_path / "root" / "frames")
    with small_quota(tmp_path, "2M") as mine:
        code, _, err = run("build", *large, f"data.root={mine}")
        line = err.splitlines()[-1]
        assert code == 1
        assert re.fullmatch(rf"error: {mine}/frames/\S+: Disk quota exceeded", line), line
        left = contents(mine / "frames")
        assert 3 < len(left) < len(expected)
        assert all(data == expected[name] for name, data in left.items())
        subprocess.run(["btrfs", "-q", "qgroup", "limit", "none", mine], check=True)
        assert run("build", *large, f"data.root={mine}")[0] == 0
        assert contents(mine / "frames") == expected


def test_a_read_only_folder_is_reported_in_one_line(run: Run, tmp_path: Path) -> None:
    frames = tmp_path / "root" / "frames"
    with small_disk(frames, "4m"):
        assert run("plan")[0] == 0
        subprocess.run(["mount", "-o", "remount,ro", str(frames)], check=True)
        code, _, err = run("build")
        assert code == 1
        assert err.splitlines()[-1].startswith(f"error: {frames}: not writable")


def test_a_set_is_built_where_folders_cannot_be_flushed(
    run: Run, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "_unsynced", set())  # devices of earlier tests may come again
    with network_disk(tmp_path / "root"):
        code, _, log = run("build", "sharding.workers=2")
        assert code == 0, log
        assert "this file system cannot flush folders (Invalid argument)" in log
        assert run("verify")[0] == 0
        assert contents(tmp_path / "root" / "frames") == expected
