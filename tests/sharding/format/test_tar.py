from __future__ import annotations

import io
import subprocess
import tarfile
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import DataError
from sharding.format import tar
from tests.sharding.films import is_silent_or_one_line

names = st.from_regex(r"[A-Za-z0-9_./-]{0,99}[A-Za-z0-9_.-]", fullmatch=True)
sizes = st.integers(0, tar.MAX_SIZE)


@given(names, sizes)
def test_pythons_tarfile_reads_our_header(name: str, size: int) -> None:
    info = tarfile.TarInfo.frombuf(tar.header(name, size), "ascii", "strict")
    assert (info.name, info.size) == (name, size)
    assert (info.mode, info.uid, info.gid, info.mtime) == (0o644, 0, 0, 0)
    assert (info.uname, info.gname, info.linkname) == ("", "", "")
    assert info.isreg()


@given(names, sizes)
def test_our_header_equals_that_of_tarfile_byte_for_byte_except_for_device_numbers(
    name: str, size: int
) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    theirs = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    ours = bytearray(tar.header(name, size))
    for block in (ours, theirs):  # device numbers: zeros or empty; then the checksum
        block[329:345] = bytes(16)
        block[148:156] = bytes(8)
    assert ours == theirs


@pytest.mark.parametrize(
    ("name", "size"), [("", 0), ("a" * 101, 0), ("a", -1), ("a", tar.MAX_SIZE + 1), ("é", 1)]
)
def test_a_member_that_does_not_fit_into_a_plain_header_is_refused(name: str, size: int) -> None:
    with pytest.raises(ValueError, match=r"tar member|ascii"):
        tar.header(name, size)


@given(st.integers(0, 10**6))
def test_a_tar_ends_with_two_zero_blocks_at_a_multiple_of_a_record(blocks: int) -> None:
    end = tar.end(blocks * tar.BLOCK)
    assert len(end) >= 2 * tar.BLOCK
    assert (blocks * tar.BLOCK + len(end)) % tar.RECORD == 0
    assert len(end) < 2 * tar.BLOCK + tar.RECORD
    assert not any(end)


contents = st.dictionaries(
    st.text("abc/é_.", min_size=1, max_size=130).filter(lambda name: name.strip("/.")),
    st.binary(max_size=1500),
    max_size=5,
)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@given(files=contents)
def test_we_read_the_tars_of_pythons_tarfile(form: int, files: dict[str, bytes]) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            try:
                archive.addfile(info, io.BytesIO(data))
            except ValueError:
                return  # ustar cannot hold every name
    data = buffer.getvalue()
    contents_read = {
        member.name: data[member.offset : member.offset + member.size]
        for member in tar.members(buffer, "t")
    }
    assert {name.rstrip("/"): data for name, data in contents_read.items()} == {
        name.rstrip("/"): data for name, data in files.items()
    }


def test_we_read_the_tars_of_gnu_tar_and_distinguish_folders_and_links(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a.jpg").write_bytes(b"1" * 700)
    (tmp_path / "m" / "b.jpg").symlink_to("a.jpg")
    (tmp_path / "m" / "c.jpg").hardlink_to(tmp_path / "m" / "a.jpg")
    names = ["m", "m/a.jpg", "m/b.jpg", "m/c.jpg"]
    subprocess.run(
        ["tar", "-C", tmp_path, "--no-recursion", "-cf", tmp_path / "t.tar", *names], check=True
    )
    with (tmp_path / "t.tar").open("rb") as file:
        listed = [(member.name, member.kind, member.size) for member in tar.members(file, "t")]
    assert listed == [
        ("m/", "folder", 0),
        ("m/a.jpg", "file", 700),
        ("m/b.jpg", "other", 0),
        ("m/c.jpg", "hard link", 0),
    ]


def one(size: int = 700) -> bytes:
    data = tar.header("a", size) + bytes([1]) * size + bytes(tar.padding(size))
    return data + tar.end(len(data))


def members_of(data: bytes) -> list[tar.Member]:
    return list(tar.members(io.BytesIO(data), "t.tar"))


@pytest.mark.parametrize("length", [0, 100, 512, 1000, 1536])
def test_a_truncated_tar_is_refused(length: int) -> None:
    with pytest.raises(DataError, match=r"t.tar: got .* truncated"):
        members_of(one()[:length])


def test_a_file_that_is_not_a_tar_is_refused() -> None:
    with pytest.raises(DataError, match="damaged header at byte 0"):
        members_of(b"\xff\xd8" * 5120)


def test_tars_joined_by_cat_are_read_one_after_the_other() -> None:
    first, second = members_of(one(700) + one(10))
    assert (first.size, second.size) == (700, 10)
    assert (first.end, second.start) == (1536, len(one(700)))
    # Some programs fill the rest of a large block.
    assert len(members_of(one() + bytes(3 << 20) + one())) == 2


@pytest.mark.parametrize("tail", [b"x", b"\xff\xd8" * 300, one()[:148]])
def test_bytes_after_a_tar_that_are_not_another_tar_are_refused(tail: bytes) -> None:
    with pytest.raises(DataError, match=rf"t.tar: got {len(tail)} bytes after the end.*truncate"):
        members_of(one() + tail)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_hard_link_has_the_content_of_the_member_it_refers_to(form: int) -> None:
    long = "a" if form == tarfile.USTAR_FORMAT else "a" * 200
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        file, link, lost = (tarfile.TarInfo(name) for name in (f"./{long}", "link", "lost"))
        file.size = 5
        link.type, link.linkname = tarfile.LNKTYPE, long
        lost.type, lost.linkname = tarfile.LNKTYPE, "elsewhere"
        archive.addfile(file, io.BytesIO(b"image"))
        archive.addfile(link)
        archive.addfile(lost)
    files = tar.by_name(tar.members(buffer, "t"))
    members = list(tar.follow_links(tar.members(buffer, "t"), lambda _: files))
    assert [(m.name, m.kind) for m in members[1:]] == [("link", "file"), ("lost", "hard link")]
    assert members[1].offset == members[0].offset
    assert members[1].size == 5


def test_a_hard_link_refers_to_the_file_that_was_there_before_it() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for kind in (tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.REGTYPE):
            info = tarfile.TarInfo("link" if kind == tarfile.LNKTYPE else "a")
            info.type, info.linkname = kind, "a"
            archive.addfile(info)
    files = tar.by_name(tar.members(buffer, "t"))
    old, link, _ = tar.follow_links(tar.members(buffer, "t"), lambda _: files)
    assert (link.kind, link.offset) == ("file", old.offset)


@given(st.binary(max_size=2000), st.binary(max_size=1024))
def test_hostile_bytes_give_members_or_a_one_line_error(start: bytes, tail: bytes) -> None:
    for data in (start, one(10)[:512] + start + tail, one()[:148] + start + one()):
        assert is_silent_or_one_line(partial(members_of, data))


def test_a_pax_size_of_digits_that_are_no_number_is_a_damaged_header() -> None:
    record = "11 size=²\n".encode()
    head = bytearray(tar.header("x", len(record)))
    head[156:157] = b"x"
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    with pytest.raises(DataError, match="damaged header at byte 0"):
        members_of(bytes(head) + record.ljust(512, b"\0") + one())


@given(st.binary(max_size=600))
def test_hostile_pax_headers_give_members_or_a_one_line_error(body: bytes) -> None:
    head = bytearray(tar.header("x", len(body)))
    head[156:157] = b"x"
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    data = bytes(head) + body + bytes(tar.padding(len(body))) + one()
    assert is_silent_or_one_line(partial(members_of, data))
