from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from configs.errors import DataError
from sharding.dump.zip import content_at, find_end, read_entries, read_names, text
from tests.sharding.dump.deliveries import (
    DEFLATED,
    MOVIES,
    below,
    expect_one_line,
    put,
    rejected,
    zip_bytes,
    zip_of_images,
)
from tests.sharding.films import film, is_silent_or_one_line, jpeg


class Buffer:
    """Bytes in memory, read like a file."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def pread(self, at: int, length: int) -> bytes:
        return self.data[at : at + length]

    def end(self) -> int:
        return len(self.data)


class Unseekable(io.RawIOBase):
    """A stream for which the standard library writes data descriptors, not sizes in headers."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: object, /) -> int:
        view = memoryview(data)  # type: ignore[arg-type]
        self.data += view
        return len(view)


names = st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40
).filter(lambda name: "PK" not in name)
members = st.lists(
    st.tuples(names, st.binary(max_size=300), st.sampled_from([0, 8]), st.booleans()), max_size=12
)


def plain(max_size: int) -> st.SearchStrategy[bytes]:
    """Bytes around a zip that the standard library does not take for a signature of the zip."""
    return st.binary(max_size=max_size).filter(lambda data: b"PK" not in data)


def written(
    content: list[tuple[str, bytes, int, bool]], comment: bytes = b"", *, descriptors: bool = False
) -> bytes:
    """Return a zip of the standard library; the flag of a member forces zip64."""
    seekable, stream = io.BytesIO(), Unseekable()
    with zipfile.ZipFile(stream if descriptors else seekable, "w") as archive:
        archive.comment = comment
        for name, data, method, wide in content:
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            with archive.open(info, "w", force_zip64=wide) as file:
                file.write(data)
    return bytes(stream.data) if descriptors else seekable.getvalue()


def read_back(data: bytes) -> list[tuple[str, bytes]]:
    buffer = Buffer(data)
    end = find_end(buffer, "x.zip")
    contents: list[tuple[str, bytes]] = []
    for entry in read_entries(buffer, end, end.begin, end.stop, "x.zip"):
        begin = content_at(buffer, entry, "x.zip")
        raw = data[begin : begin + entry.packed]
        inflated = zlib.decompress(raw, -15) if entry.method == DEFLATED else raw
        assert (len(inflated), zlib.crc32(inflated)) == (entry.size, entry.crc)
        contents.append((entry.name, inflated))
    assert len(contents) == end.entries
    return contents


@pytest.mark.filterwarnings("ignore:Duplicate name")
@given(members, plain(100), st.booleans(), plain(50))
def test_every_member_is_read_as_the_standard_library_reads_it(
    content: list[tuple[str, bytes, int, bool]], comment: bytes, descriptors: bool, before: bytes
) -> None:
    data = before + written(content, comment, descriptors=descriptors)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        expected = [(info.orig_filename, archive.read(info)) for info in archive.infolist()]
    assert read_back(data) == expected


def wide_zip(extra_first: bytes = b"") -> bytes:
    """Return a zip of one member with all its numbers in the zip64 field, and a zip64 end."""
    name, data = b"tt1/shot_0000_img_0.jpg", b"\xff\xd8\xff\xd9"
    local = struct.pack(
        "<4s5H3L2H", b"PK\3\4", 45, 0, 0, 0, 0, zlib.crc32(data), 4, 4, len(name), 0
    )
    extra = extra_first + struct.pack("<2H3Q", 1, 24, 4, 4, 0)
    most = 0xFFFFFFFF
    entry = struct.pack(
        "<4s6H3L5H2L", b"PK\1\2", 45, 45, 0, 0, 0, 0, zlib.crc32(data), most, most,
        len(name), len(extra), 0, 0, 0, 0, most,
    )  # fmt: skip
    begin = len(local) + len(name) + len(data)
    directory = entry + name + extra
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, len(directory), begin)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, begin + len(directory), 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, most, most, 0)
    return local + name + data + directory + end64 + locator + end


@pytest.mark.parametrize("extra", [b"", struct.pack("<2H4s", 0x5455, 4, b"time")])
def test_the_zip64_field_is_found_among_other_extra_fields(extra: bytes) -> None:
    data = wide_zip(extra)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert [archive.read(name) for name in archive.namelist()] == [b"\xff\xd8\xff\xd9"]
    assert read_back(data) == [("tt1/shot_0000_img_0.jpg", b"\xff\xd8\xff\xd9")]


@pytest.mark.slow
def test_more_members_than_fit_into_sixteen_bits_are_read() -> None:
    content = [(f"{k}", b"", 0, False) for k in range(65_600)]
    data = written(content)
    end = find_end(Buffer(data), "x.zip")
    assert end.entries == 65_600
    raw = [text(e.name, utf8=e.utf8) for e in read_names(Buffer(data), end.begin, end.stop, "x")]
    assert raw == [name for name, *_ in content]


def test_an_end_record_within_a_comment_is_not_taken_for_the_end() -> None:
    data = written([("a", b"b", 0, False)], b"PK\5\6" + bytes(40))
    assert read_back(data) == [("a", b"b")]


@pytest.mark.parametrize("before", [b"PK\6\7", b"PK\6\7" + bytes(40), b"PK\5\6" + bytes(40)])
@pytest.mark.parametrize("after", [b"", b"PK\5\6" * 12, b"PK\6\7" * 12])
def test_signatures_around_a_zip_are_not_taken_for_its_own(before: bytes, after: bytes) -> None:
    assert read_back(before + written([("a", b"b", 0, False)]) + after) == [("a", b"b")]


def test_a_signature_in_an_image_is_not_taken_for_the_end_of_a_truncated_zip() -> None:
    complete = written([("a", b"PK\5\6", 0, False), ("b", b"x" * 50, 0, False)])
    for n_bytes in range(len(complete)):
        with pytest.raises(DataError, match=rf"got {n_bytes} bytes and no end record"):
            find_end(Buffer(complete[:n_bytes]), "x.zip")


@given(members, st.data())
def test_any_truncated_zip_is_a_one_line_error_with_its_size(
    content: list[tuple[str, bytes, int, bool]], data: st.DataObject
) -> None:
    assume(not any(b"PK\5\6" in member[1] for member in content))
    complete = written([(f"{k}", *rest) for k, (_, *rest) in enumerate(content)])  # type: ignore[misc]
    truncated = complete[: data.draw(st.integers(0, len(complete) - 1))]
    with pytest.raises(DataError, match=rf"x\.zip: got {len(truncated)} bytes.*want") as error:
        find_end(Buffer(truncated), "x.zip")
    assert "\n" not in str(error.value)


@given(st.binary(max_size=400), st.integers(0, 3000), st.integers(0, 255))
def test_a_corrupt_zip_is_read_or_a_one_line_error(tail: bytes, at: int, value: int) -> None:
    data = bytearray(written([(f"tt1/shot_{k}_img_0.jpg", tail, 8, False) for k in range(9)]))
    data[at % len(data)] = value
    buffer = Buffer(bytes(data))

    def read() -> None:
        end = find_end(buffer, "x.zip")
        for entry in read_entries(buffer, end, end.begin, end.stop, "x.zip"):
            if entry.defect(end) is None:
                content_at(buffer, entry, "x.zip")

    assert is_silent_or_one_line(read)


def test_the_error_for_one_disk_of_several_explains_how_to_join_them() -> None:
    data = bytearray(written([("a", b"b", 0, False)]))
    data[-18:-14] = struct.pack("<2H", 2, 2)
    with pytest.raises(
        DataError, match=r"last of 3 disks of a split zip.*zip -s 0 NAME\.zip --out"
    ):
        find_end(Buffer(bytes(data)), "x.zip")


def test_bytes_missing_in_the_middle_are_counted() -> None:
    data = written([("a", b"b" * 100, 0, False)])
    with pytest.raises(DataError, match=rf"got {len(data) - 30} bytes, want {len(data)}"):
        find_end(Buffer(data[:40] + data[70:]), "x.zip")


def test_a_truncated_zip_of_a_dump_is_reported_with_its_size(tmp_path: Path) -> None:
    path = zip_of_images(tmp_path, MOVIES)
    path.write_bytes(path.read_bytes()[:5000])
    expect_one_line(
        path, r"movies\.zip: got 5000 bytes and no end record, .*truncated; resume the download"
    )


@pytest.mark.parametrize(
    ("method", "reason"), [(12, "packed by bzip2 (method 12)"), (14, "method 14")]
)
def test_an_image_with_an_unsupported_compression_is_rejected(
    tmp_path: Path, method: int, reason: str
) -> None:
    path = zip_of_images(tmp_path, {"tt1": film("tt1")})
    with zipfile.ZipFile(path, "a", method) as archive:
        archive.writestr("frames/tt1/shot_0009_img_0.jpg", jpeg("x"))
    (rejection,) = rejected(path).values()
    assert reason in rejection


def test_an_image_of_impossible_size_is_rejected_without_allocating_it(tmp_path: Path) -> None:
    files = below("", {"tt1": film("tt1")})
    path = put(tmp_path / "movies.zip", zip_bytes(files, DEFLATED))
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\1\2") + 24
    data[at : at + 4] = (4_000_000_000).to_bytes(4, "little")
    path.write_bytes(data)
    assert list(rejected(path).values()) == ["impossible size"]


def test_zips_joined_by_cat_are_refused_since_only_the_last_can_be_read(tmp_path: Path) -> None:
    first, second = (zip_bytes(below("", {movie: film(movie)})) for movie in ("tt1", "tt2"))
    put(tmp_path / "movies.zip", first + second)
    expect_one_line(tmp_path, rf"movies\.zip: got {len(first)} bytes of another zip before it")
