from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from configs.errors import DataError
from sharding.dump.listing import Collector, Listing, place
from sharding.dump.zip import DEFLATED, content_at, find_end, read_entries, read_names, text
from tests.sharding.films import is_silent_or_one_line


class Buffer:
    """Bytes in memory, read like a file."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def pread(self, at: int, length: int) -> bytes:
        return self.data[at : at + length]

    def end(self) -> int:
        return len(self.data)


class Unseekable(io.RawIOBase):
    """Makes the standard library write data descriptors: it cannot go back to a header."""

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
    """Bytes beside a zip that hold no signature: those the standard library takes for its own."""
    return st.binary(max_size=max_size).filter(lambda data: b"PK" not in data)


def written(
    content: list[tuple[str, bytes, int, bool]], comment: bytes = b"", *, descriptors: bool = False
) -> bytes:
    """A zip as the standard library writes it; the flag of a member forces zip64 on it."""
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
    found: list[tuple[str, bytes]] = []
    for entry in read_entries(buffer, end, end.begin, end.stop, "x.zip"):
        begin = content_at(buffer, entry, "x.zip")
        raw = data[begin : begin + entry.packed]
        inflated = zlib.decompress(raw, -15) if entry.method == DEFLATED else raw
        assert (len(inflated), zlib.crc32(inflated)) == (entry.size, entry.crc)
        found.append((entry.name, inflated))
    assert len(found) == end.entries
    return found


@pytest.mark.filterwarnings("ignore:Duplicate name")
@given(members, plain(100), st.booleans(), plain(50))
def test_every_member_is_read_as_the_standard_library_reads_it(
    content: list[tuple[str, bytes, int, bool]], comment: bytes, descriptors: bool, before: bytes
) -> None:
    data = before + written(content, comment, descriptors=descriptors)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        wanted = [(info.orig_filename, archive.read(info)) for info in archive.infolist()]
    assert read_back(data) == wanted


def wide_zip(extra_first: bytes = b"") -> bytes:
    """A zip with one member whose every number stands in the zip64 field, and a zip64 end."""
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
def test_zip64_is_read_where_its_field_stands(extra: bytes) -> None:
    data = wide_zip(extra)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert [archive.read(name) for name in archive.namelist()] == [b"\xff\xd8\xff\xd9"]
    assert read_back(data) == [("tt1/shot_0000_img_0.jpg", b"\xff\xd8\xff\xd9")]


def test_more_members_than_sixteen_bits_tell_are_read() -> None:
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
@pytest.mark.parametrize("behind", [b"", b"PK\5\6" * 12, b"PK\6\7" * 12])
def test_signatures_around_a_zip_are_not_taken_for_its_own(before: bytes, behind: bytes) -> None:
    assert read_back(before + written([("a", b"b", 0, False)]) + behind) == [("a", b"b")]


def test_a_signature_within_an_image_is_not_taken_for_the_end_of_a_cut_zip() -> None:
    whole = written([("a", b"PK\5\6", 0, False), ("b", b"x" * 50, 0, False)])
    for n_bytes in range(len(whole)):
        with pytest.raises(DataError, match=rf"got {n_bytes} bytes and no end record"):
            find_end(Buffer(whole[:n_bytes]), "x.zip")


@given(members, st.data())
def test_a_cut_zip_is_one_line_with_the_bytes_it_has(
    content: list[tuple[str, bytes, int, bool]], data: st.DataObject
) -> None:
    assume(not any(b"PK\5\6" in member[1] for member in content))
    whole = written([(f"{k}", *rest) for k, (_, *rest) in enumerate(content)])  # type: ignore[misc]
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    with pytest.raises(DataError, match=rf"x\.zip: got {len(cut)} bytes.*want") as error:
        find_end(Buffer(cut), "x.zip")
    assert "\n" not in str(error.value)


@given(st.binary(max_size=400), st.integers(0, 3000), st.integers(0, 255))
def test_damage_is_one_line_or_nothing(tail: bytes, at: int, value: int) -> None:
    data = bytearray(written([(f"tt1/shot_{k}_img_0.jpg", tail, 8, False) for k in range(9)]))
    data[at % len(data)] = value
    buffer = Buffer(bytes(data))

    def read() -> None:
        end = find_end(buffer, "x.zip")
        for entry in read_entries(buffer, end, end.begin, end.stop, "x.zip"):
            if entry.flaw(end) is None:
                content_at(buffer, entry, "x.zip")

    assert is_silent_or_one_line(read)


def test_one_disk_of_several_is_told_how_to_join() -> None:
    data = bytearray(written([("a", b"b", 0, False)]))
    data[-18:-14] = struct.pack("<2H", 2, 2)
    with pytest.raises(
        DataError, match=r"last of 3 disks of a split zip.*zip -s 0 NAME\.zip --out"
    ):
        find_end(Buffer(bytes(data)), "x.zip")


def test_a_piece_missing_in_the_middle_is_counted() -> None:
    data = written([("a", b"b" * 100, 0, False)])
    with pytest.raises(DataError, match=rf"got {len(data) - 30} bytes, want {len(data)}"):
        find_end(Buffer(data[:40] + data[70:]), "x.zip")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("frames/tt1/a.jpg", ("frames/tt1", "a.jpg", True)),
        ("./tt1//a.jpg", ("tt1", "a.jpg", True)),
        ("../tt1/a.jpg", ("tt1", "a.jpg", False)),
        ("/tt1/a.jpg", ("tt1", "a.jpg", False)),
        ("tt1\\a.jpg", ("tt1", "a.jpg", True)),
        ("..\\tt1\\a.jpg", ("tt1", "a.jpg", False)),
        ("a.jpg", ("", "a.jpg", True)),
    ],
)
def test_a_name_gives_folder_and_base_and_whether_it_is_safe(
    name: str, wanted: tuple[str, str, bool]
) -> None:
    assert place(name) == wanted


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9))))
def test_a_listing_gives_back_each_groups_stretches(rows: list[tuple[int, int]]) -> None:
    collector, at = Collector("x"), 0
    wanted: dict[int, set[int]] = {k: set() for k in range(4)}
    for group, length in rows:
        number = collector.number(f"tt{group}", f"tt{group}/a")
        collector.want(number, folder=True)
        collector.add(number, at, length)
        wanted[group] |= set(range(at, at + length))
        at += length
    listing = Listing.from_bytes(collector.listing().to_bytes(), "listing")
    assert listing.members == len(rows)
    for group, places in wanted.items():
        runs = list(listing.runs(f"tt{group}"))
        assert {k for begin, stop in runs for k in range(begin, stop)} == places
        assert all(a < b for (_, a), (b, _) in pairwise(runs))


def test_a_stretch_beyond_four_gib_is_several_runs() -> None:
    collector = Collector("x")
    for k in range(3):
        collector.add(collector.number("tt1", "tt1/a"), k * 3 * 2**30, 3 * 2**30)
    collector.add(collector.number("tt1", "tt1/a"), 9 * 2**30, 5 * 2**30)
    begins = [begin // 2**30 for begin, _ in collector.listing().runs("tt1")]
    assert begins == [0, 3, 6, 9]


MEASURE = """
import re, sys
from pathlib import Path
from sharding.dump.archives import _list_zip, local_archive
from sharding.dump.zip import find_end

def peak():  # getrusage tells what the parent had, too
    return int(re.search("VmHWM:\\\\s+([0-9]+)", Path("/proc/self/status").read_text())[1]) * 1024

file = local_archive(Path(sys.argv[1]))
before = peak()
listing = _list_zip(file, find_end(file, "x.zip"))
after = peak()
arrays = (listing.group, listing.begin, listing.length)
n_bytes = sum(array.nbytes for array in arrays)
print(listing.members, len(listing.folders), len(listing.group), n_bytes, before, after)
"""


def directory_alone(path: Path, n_entries: int, movies: int, *, mixed: bool) -> None:
    """A zip of which only the directory is there: its members are a hole before it."""

    def entries() -> Iterator[bytes]:
        most = 0xFFFFFFFF
        for k in range(n_entries):
            movie = k % movies if mixed else k * movies // n_entries
            name = b"240P/all/tt%07d/shot_%04d_img_%d.jpg" % (movie, k // 3 % 2000, k % 3)
            extra = struct.pack("<2HQ", 1, 8, k * 32_000)
            head = struct.pack(
                "<4s6H3L5H2L", b"PK\1\2", 45, 45, 0, 0, 0, 0, k, 32_000, 32_000,
                len(name), len(extra), 0, 0, 0, 0, most,
            )  # fmt: skip
            yield head + name + extra

    begin = n_entries * 33_000
    with path.open("wb") as file:
        file.seek(begin)
        length = sum(file.write(entry) for entry in entries())
        file.write(
            struct.pack(
                "<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, n_entries, n_entries, length, begin
            )
            + struct.pack("<4sLQL", b"PK\6\7", 0, begin + length, 1)
            + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, *([0xFFFFFFFF] * 2), 0)
        )


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [False, True])
def test_a_million_members_are_listed_in_little_memory(tmp_path: Path, mixed: bool) -> None:
    path = tmp_path / "movies.zip"
    directory_alone(path, 1_000_000, 1100, mixed=mixed)
    assert path.stat().st_size > 33 * 10**9
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)],
        check=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."},
    ).stdout  # fmt: skip
    members, folders, runs, n_bytes, before, after = map(int, out.split())
    assert (members, folders) == (1_000_000, 1100)
    assert runs == (1_000_000 if mixed else 1100)
    assert n_bytes == 16 * runs
    # 4.8 million members in the worst order, with the whole process, stay under 150 MB.
    assert before + 4_800_000 * 16 < 150e6
    assert after < before + 16 * runs + 10e6
