from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from configs.runtime.publish import (
    TEMPORARY_PREFIX,
    clear_leftovers,
    current_folder,
    publish_bytes,
    publishing,
    publishing_folder,
    sync_folder,
    unused_name,
)
from tests.disks import small_disk


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_published_file_is_complete_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    publish_bytes(tmp_path / "deep" / "a.json", b"one")
    publish_bytes(tmp_path / "deep" / "a.json", b"two")
    assert (tmp_path / "deep" / "a.json").read_bytes() == b"two"
    assert names(tmp_path / "deep") == ["a.json"]


def test_the_final_name_does_not_exist_before_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "a.tar"
    with publishing(target) as file:
        file.write(b"half")
        file.flush()
        assert not target.exists()
    assert target.read_bytes() == b"half"


def test_a_failure_leaves_the_old_content_and_no_temporary_file(tmp_path: Path) -> None:
    target = tmp_path / "a.tar"
    publish_bytes(target, b"old")
    with pytest.raises(ZeroDivisionError), publishing(target) as file:
        file.write(bytes([1 // (len(b"new") - 3)]))
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a.tar"]


def test_a_published_folder_replaces_the_complete_old_one(tmp_path: Path) -> None:
    target = tmp_path / "last"
    for text in ("one", "two"):
        with publishing_folder(target) as folder:
            (folder / "state.json").write_text(text)
    assert (target / "state.json").read_text() == "two"
    assert names(tmp_path) == ["last"]


def test_a_failure_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "last"
    with publishing_folder(target) as folder:
        (folder / "state.json").write_text("one")
    with pytest.raises(FileNotFoundError), publishing_folder(target) as folder:
        (folder / "absent").read_bytes()
    assert (target / "state.json").read_text() == "one"
    assert names(tmp_path) == ["last"]


def test_between_the_two_renames_the_old_folder_is_the_current_one(tmp_path: Path) -> None:
    assert current_folder(tmp_path / "last") is None
    older, old = (tmp_path / f"last.old-{time:019}-0123abcd" for time in (8, 9))
    older.mkdir()
    old.mkdir()
    assert current_folder(tmp_path / "last") == old
    clear_leftovers(tmp_path, "last")
    assert current_folder(tmp_path / "last") == old
    with publishing_folder(tmp_path / "last"):
        pass
    assert current_folder(tmp_path / "last") == tmp_path / "last"
    clear_leftovers(tmp_path, "last")
    assert names(tmp_path) == ["last"]


def test_folders_of_the_user_with_similar_names_are_neither_used_nor_deleted(
    tmp_path: Path,
) -> None:
    mine = [".tmp-last-try", "last-good", "last.old", "last.old-2", "last.old-copy"]
    for name in mine:
        (tmp_path / name).mkdir()
    assert current_folder(tmp_path / "last") is None
    for _ in range(2):
        with publishing_folder(tmp_path / "last"):
            pass
    clear_leftovers(tmp_path, "last")
    assert names(tmp_path) == sorted([*mine, "last"])


def test_a_folder_that_cannot_be_deleted_does_not_stop_the_next_version(tmp_path: Path) -> None:
    target = tmp_path / "last"
    with publishing_folder(target):
        pass
    # As on NFS, where a file that a process has open stays in its folder.
    with small_disk(target / "open", "64k"):
        for text in ("one", "two", "three"):
            with publishing_folder(target) as folder:
                (folder / "state.json").write_text(text)
        assert (target / "state.json").read_text() == "three"
        leftover, last = names(tmp_path)
        assert (leftover[: len(".tmp-last.old-")], last) == (".tmp-last.old-", "last")


def test_a_folder_is_set_aside_even_if_the_folder_of_that_name_cannot_be_deleted(
    tmp_path: Path,
) -> None:
    target, aside = tmp_path / "last", tmp_path / "step-1"
    aside.mkdir()
    with small_disk(aside / "open", "64k"):
        for text in ("one", "two"):
            with publishing_folder(target, aside=aside) as folder:
                (folder / "state.json").write_text(text)
        assert (aside / "state.json").read_text() == "one"
        assert (target / "state.json").read_text() == "two"


def test_a_file_system_that_cannot_flush_folders_is_used_and_named_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for _ in range(2):
        sync_folder(Path("/proc"))  # it refuses, as old CIFS and some FUSE do
    assert caplog.messages == [
        "/proc: this file system cannot flush folders (Invalid argument); after a power cut the "
        "newest files may be missing there, then rerun the command"
    ]


def test_a_name_next_to_a_file_is_free_if_not_even_a_broken_link_has_it(tmp_path: Path) -> None:
    (tmp_path / "a-1.json").symlink_to("nowhere")
    (tmp_path / "a-2.json").touch()
    assert unused_name(tmp_path / "a.json") == tmp_path / "a-3.json"


WRITER = """
import sys
from pathlib import Path
from configs.runtime.publish import publishing
with publishing(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_a_killed_writer_leaves_the_old_content(tmp_path: Path) -> None:
    target = tmp_path / "a.tar"
    publish_bytes(target, b"old")
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(target)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
        os.kill(writer.pid, signal.SIGKILL)
    assert target.read_bytes() == b"old"
    leftovers = [name for name in names(tmp_path) if name != "a.tar"]
    assert len(leftovers) == 1
    assert leftovers[0].startswith(TEMPORARY_PREFIX)
