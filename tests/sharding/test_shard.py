"""A shard without its sidecar, or cut, counts as absent."""

from __future__ import annotations

from pathlib import Path

from sharding.shard import read_sidecar
from sharding.storage.memory import MemoryStorage
from tests.sharding.films import build_all, write_dump


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
