from __future__ import annotations

from pathlib import Path

import pytest

from sharding.dump.multipart import pieces
from tests.sharding.dump.deliveries import MOVIES, below, expect_one_line, put_parts, zip_bytes


@pytest.mark.parametrize(
    ("suffixes", "gone", "match"),
    [
        (
            ["001", "002", "003"],
            "002",
            r"movies\.zip: got 2 parts, want 3 \(without movies\.zip\.002\)",
        ),
        (["00", "01", "02"], "01", r"got 2 parts, want 3 \(without movies\.zip\.01\)"),
        (["aa", "ab", "ac"], "ab", r"got 2 parts, want 3 \(without movies\.zip\.ab\)"),
        (["001", "002", "003"], "001", r"got 2 parts, want 3 \(without movies\.zip\.001\)"),
        (["001", "002", "003"], "003", r"movies\.zip in 2 parts: got \d+ bytes and no end record"),
    ],
)
def test_a_part_that_is_missing_is_named(
    tmp_path: Path, suffixes: list[str], gone: str, match: str
) -> None:
    put_parts(tmp_path / "movies.zip", zip_bytes(below("", MOVIES)), suffixes)
    (tmp_path / f"movies.zip.{gone}").unlink()
    expect_one_line(tmp_path, match)
    left = next(name for name in suffixes if name != gone)
    expect_one_line(tmp_path / f"movies.zip.{left}", match)


def test_parts_are_read_in_order_of_number_beyond_the_digits() -> None:
    names = [f"x.zip.{k:02d}" for k in range(1, 100)] + ["x.zip.100", "x.zip.txt", "y.zip.01"]
    assert pieces("x.zip", reversed(names), "d")[-2:] == ("x.zip.99", "x.zip.100")
    assert pieces("x.tar", names, "d") == ()
