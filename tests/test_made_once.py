"""A shared folder is made once, or its maker's failure is what every worker sees."""

from __future__ import annotations

import pytest

from tests.made_once import made_once


def fail_to_make(tmp_path_factory: pytest.TempPathFactory) -> None:
    with made_once(tmp_path_factory, "made-once-failed") as (folder, missing):
        assert missing
        folder.mkdir()  # fails if an earlier worker left it
        (folder / "half").touch()
        raise RuntimeError("the cause")


def test_a_failure_is_the_same_for_each_worker(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the cause"):
            fail_to_make(tmp_path_factory)


def test_a_made_folder_remains_when_a_later_worker_fails(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with made_once(tmp_path_factory, "made-once") as (folder, missing):
        assert missing
        folder.mkdir()
    with (
        pytest.raises(RuntimeError),
        made_once(tmp_path_factory, "made-once") as (again, missing),
    ):
        raise RuntimeError
    assert not missing
    assert again.is_dir()
