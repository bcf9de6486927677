from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import DataError
from sharding.dump.multipart import pieces
from tests.sharding.dump.deliveries import MOVIES, below, expect_one_line, put_parts, zip_bytes


@pytest.mark.parametrize(
    ("suffixes", "missing", "match"),
    [
        (
            ["001", "002", "003"],
            "002",
            r"movies\.zip: got 2 parts, want 3 \(missing: movies\.zip\.002\)",
        ),
        (["00", "01", "02"], "01", r"got 2 parts, want 3 \(missing: movies\.zip\.01\)"),
        (["aa", "ab", "ac"], "ab", r"got 2 parts, want 3 \(missing: movies\.zip\.ab\)"),
        (["001", "002", "003"], "001", r"got 2 parts, want 3 \(missing: movies\.zip\.001\)"),
        (["001", "002", "003"], "003", r"movies\.zip in 2 parts: got \d+ bytes and no end record"),
    ],
)
def test_a_missing_part_is_named(
    tmp_path: Path, suffixes: list[str], missing: str, match: str
) -> None:
    put_parts(tmp_path / "movies.zip", zip_bytes(below("", MOVIES)), suffixes)
    (tmp_path / f"movies.zip.{missing}").unlink()
    expect_one_line(tmp_path, match)
    other = next(suffix for suffix in suffixes if suffix != missing)
    expect_one_line(tmp_path / f"movies.zip.{other}", match)


def test_two_parts_of_one_number_are_refused() -> None:
    with pytest.raises(DataError, match=r"d/x\.zip: got 3 parts, want 2 \(some have the same"):
        pieces("x.zip", ["x.zip.01", "x.zip.001", "x.zip.002"], "d")


def test_parts_are_ordered_by_number_even_with_more_digits() -> None:
    names = [f"x.zip.{k:02d}" for k in range(1, 100)] + ["x.zip.100", "x.zip.txt", "y.zip.01"]
    assert pieces("x.zip", reversed(names), "d")[-2:] == ("x.zip.99", "x.zip.100")
    assert pieces("x.tar", names, "d") == ()
