from __future__ import annotations

import os
from pathlib import Path

import pytest

from configs.errors import DataError
from configs.runtime.files import open_regular
from sharding.storage.open_files import OpenFiles


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OpenFiles:
    """One handle for two files."""
    monkeypatch.setattr("sharding.storage.open_files.MAX_OPEN_FILES", 1)
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode())
    return OpenFiles(tmp_path, lambda name: open_regular(tmp_path / name))


def use(files: OpenFiles, name: str) -> bytes:
    file = files.take(name)
    try:
        return os.pread(file.handle, 9, 0)
    finally:
        files.release(file)


def test_an_evicted_handle_stays_open_while_it_is_in_use(files: OpenFiles) -> None:
    a, b = files.take("a"), files.take("b")
    assert (os.pread(a.handle, 1, 0), os.pread(b.handle, 1, 0)) == (b"a", b"b")
    files.release(b)
    assert os.pread(a.handle, 1, 0) == b"a"
    files.release(a)
    with pytest.raises(OSError, match="Bad file"):
        os.pread(a.handle, 1, 0)


def test_a_file_that_is_replaced_between_two_reads_is_never_mixed_with_the_first(
    files: OpenFiles, tmp_path: Path
) -> None:
    assert use(files, "a") == b"a"
    (tmp_path / "new").write_bytes(b"A")
    os.utime(tmp_path / "new", ns=(0, 7))  # as large as the first, at another time
    (tmp_path / "new").replace(tmp_path / "a")
    assert use(files, "a") == b"a"  # the first file is still open
    use(files, "b")
    with pytest.raises(DataError, match=r"/a: was replaced while this command reads it; rerun it"):
        files.take("a")
    files.forget("a")  # as after this process has replaced it
    assert use(files, "a") == b"A"
