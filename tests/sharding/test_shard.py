"""A shard without a sidecar, or with a truncated tar, counts as missing."""

from __future__ import annotations

from pathlib import Path

from sharding.shard import read_sidecar
from sharding.storage.memory import MemoryStorage
from tests.sharding.films import build_all, write_dump


def test_a_tar_without_a_sidecar_is_rebuilt(tmp_path: Path) -> None:
    write_dump(tmp_path)
    storage = MemoryStorage()
    build_all(storage, tmp_path)
    complete = dict(storage.files)
    storage.remove("frames-00001.json")
    storage.files["frames-00001.tar"] = b"rubbish"
    build_all(storage, tmp_path)
    assert storage.files == complete


def test_a_truncated_tar_counts_as_missing(tmp_path: Path) -> None:
    write_dump(tmp_path)
    storage = MemoryStorage()
    build_all(storage, tmp_path)
    complete = dict(storage.files)
    storage.files["frames-00001.tar"] = complete["frames-00001.tar"][:-512]
    assert read_sidecar(storage, "frames", 1) is None
    build_all(storage, tmp_path)
    assert storage.files == complete
