from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.units import format_bytes, format_seconds, parse_bytes, parse_seconds


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("512MiB", 536_870_912), ("2GB", 2_000_000_000), ("1.5 kB", 1500), (7, 7), ("0", 0)],
)
def test_sizes_are_parsed_with_their_units(text: object, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("5min", 300), ("2h", 7200), (1.5, 1.5)]
)
def test_durations_are_parsed_with_their_units(text: object, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "MiB", "-3", -3, True, None, "3 parsecs", "1e3MB", float("inf")]
)
def test_any_other_value_is_refused_with_the_value(text: object) -> None:
    with pytest.raises(ValueError, match=r"got .*, want"):
        parse_bytes(text)


@given(st.integers(0, 10**18))
def test_a_formatted_size_is_exact_to_half_a_percent(n_bytes: int) -> None:
    number, unit = format_bytes(n_bytes).split()
    factor = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert float(number) * factor == pytest.approx(n_bytes, rel=0.005)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (725, "12 min 05 s"),
        (3599.6, "1 h 00 min"),
        (12_000, "3 h 20 min"),
        (100_000, "1 d 03 h"),
    ],
)
def test_a_duration_is_formatted_in_two_units(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
