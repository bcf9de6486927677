from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.dump.listing import Collector, Listing, place
from tests.damage import damaged, reads_or_reports


@pytest.mark.parametrize(
    ("name", "expected"),
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
def test_a_member_name_is_split_into_folder_and_base_and_checked(
    name: str, expected: tuple[str, str, bool]
) -> None:
    assert place(name) == expected


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9))))
def test_a_listing_returns_the_byte_ranges_of_each_group(rows: list[tuple[int, int]]) -> None:
    collector, at = Collector("x"), 0
    expected: dict[int, set[int]] = {k: set() for k in range(4)}
    for group, length in rows:
        number = collector.number(f"tt{group}", f"tt{group}/a")
        collector.mark_movie(number, folder=True)
        collector.add(number, at, length)
        expected[group] |= set(range(at, at + length))
        at += length
    listing = Listing.from_bytes(collector.listing().to_bytes(), "listing")
    assert listing.members == len(rows)
    for group, places in expected.items():
        runs = list(listing.runs(f"tt{group}"))
        assert {k for begin, stop in runs for k in range(begin, stop)} == places
        assert all(a < b for (_, a), (b, _) in pairwise(runs))


def test_a_range_beyond_four_gib_is_several_runs() -> None:
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

def peak():  # getrusage would include the parent process
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
    """Write a zip that has only its directory; the members are a hole in the file."""

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
def test_listing_a_million_members_needs_little_memory(tmp_path: Path, mixed: bool) -> None:
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
    # With 4.8 million members in the worst order, the process needs less than 150 MB.
    assert before + 4_800_000 * 16 < 150e6
    assert after < before + 16 * runs + 10e6


@given(st.data())
def test_a_damaged_listing_is_read_or_a_one_line_error(data: st.DataObject) -> None:
    collector = Collector("x.zip")
    number = collector.number("tt1", "tt1/a.jpg")
    collector.mark_movie(number, folder=True)
    collector.add(number, 0, 100)
    corrupt = data.draw(damaged(collector.listing().to_bytes()))
    assert reads_or_reports(lambda: list(Listing.from_bytes(corrupt, "l.npz").runs("tt1")))
