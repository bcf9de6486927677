from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import DataError, MachineError
from configs.schema import StorageConfig
from sharding.storage.local import DiskStorage
from sharding.storage.memory import MemoryStorage
from sharding.storage.object_store import ObjectStorage
from sharding.storage.space import FreeSpace, Space


@pytest.mark.parametrize(
    ("space", "line"),
    [
        (FreeSpace(Space(999, 5)), "got 999 B free, want 1 kB"),
        (FreeSpace(Space(1000, 4)), "got 4 files free, want 5"),
        (FreeSpace(Space(1000, 5), Space(1, None)), "got 1 B left of the user's quota, want"),
        (FreeSpace(Space(), Space(None, 1)), "got 1 files left of the user's quota, want 5"),
    ],
)
def test_too_little_space_is_a_one_line_error_with_location_purpose_and_remedy(
    space: FreeSpace, line: str
) -> None:
    with pytest.raises(
        MachineError, match=rf"^here: {line}.* for the rows; free some space, or move$"
    ):
        space.require(Space(1000, 5), "here", "the rows", "or move")


@pytest.mark.parametrize("one_more", [Space(1001, 5), Space(1000, 6)])
def test_exactly_enough_space_is_accepted_and_one_more_refused(one_more: Space) -> None:
    space = FreeSpace(Space(1000, 5), Space(1000, 5))
    space.require(Space(1000, 5), "here", "the rows", "or move")
    with pytest.raises(MachineError):
        space.require(one_more, "here", "the rows", "or move")


def test_only_what_is_known_limits_the_space() -> None:
    FreeSpace().require(Space(10**18, 10**9), "here", "the rows", "or move")
    only_bytes = FreeSpace(Space(1000, None))
    only_bytes.require(Space(1000, 10**9), "here", "the rows", "or move")
    with pytest.raises(MachineError):
        only_bytes.require(Space(1001, 5), "here", "the rows", "or move")


def test_only_a_local_folder_reports_its_space(tmp_path: Path) -> None:
    free = DiskStorage(tmp_path / "not" / "yet").space().free
    assert free.n_bytes
    assert MemoryStorage().space() == FreeSpace()
    assert ObjectStorage("s3://bucket/x", StorageConfig()).space() == FreeSpace()


def test_a_storage_that_is_not_writable_is_refused_in_advance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    DiskStorage(tmp_path / "new").check_writable()
    MemoryStorage().check_writable()
    ObjectStorage("s3://bucket/x", StorageConfig()).check_writable()
    with pytest.raises(DataError, match="an HTTP server is read-only"):
        ObjectStorage("http://host/x", StorageConfig()).check_writable()
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(MachineError, match=f"{tmp_path}: not writable; change its permissions"):
        DiskStorage(tmp_path / "new").check_writable()
