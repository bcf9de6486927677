from __future__ import annotations

import os
from pathlib import Path

import pytest

from configs.errors import DataError
from configs.runtime.files import open_file


def test_a_file_is_opened_also_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"data")
    (tmp_path / "link").symlink_to("file")
    with open_file(tmp_path / "link") as file:
        assert file.read() == b"data"
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "absent")


@pytest.mark.parametrize("kind", ["pipe", "link to a device", "folder"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"/x: got a pipe, device or folder, want a file"):
        open_file(path)
