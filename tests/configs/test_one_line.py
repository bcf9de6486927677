"""Text of strangers is one line of printable characters, with its remedy."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import DataError, error_text
from configs.one_line import LONGEST, one_line
from configs.runtime.logs import start_logging


@given(st.text(st.characters(), max_size=300))
def test_a_message_is_one_printable_line_that_utf8_can_encode(text: str) -> None:
    for line in (one_line(text), str(DataError(text)), error_text(OSError(5, "bad", text))):
        assert line.isprintable()
        assert isinstance(line.encode(), bytes)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Am\u00e9lie … 千と千尋", "Am\u00e9lie … 千と千尋"),
        ("a\nb\r\nc", "a b c"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\u202egpj.exe", r"\u202egpj.exe"),
        ("\udcff", r"\udcff"),
    ],
)
def test_only_characters_that_change_the_line_are_escaped(name: str, shown: str) -> None:
    assert one_line(name) == shown


def test_a_long_message_keeps_its_start_and_its_remedy() -> None:
    message = str(DataError(f"x.json: {'a' * 100_000}: copy it again"))
    assert len(message) == LONGEST
    assert message.startswith("x.json: a")
    assert message.endswith("a: copy it again")


def test_a_log_record_is_one_line_and_a_traceback_keeps_its_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    start_logging()
    logger = logging.getLogger("sharding")
    logger.warning("skipped %s", "a\n2026-01-01 all is well\x1b[2J")
    try:
        raise ValueError("inner\nline")
    except ValueError:
        logger.exception("failed")
    first, second, *rest = capsys.readouterr().err.splitlines()
    assert first.endswith(r"skipped a 2026-01-01 all is well\x1b[2J")
    assert second.endswith("failed")
    assert rest[0].startswith("Traceback")
