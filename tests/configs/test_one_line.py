"""Text of strangers is one line without control characters, with its remedy."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import DataError, error_text
from configs.one_line import LONGEST, one_line
from configs.runtime.logs import start_logging
from tests.hostile.guard import is_one_line


@given(st.text(st.characters(), max_size=300))
def test_a_message_is_one_line_that_utf8_can_encode(text: str) -> None:
    for line in (one_line(text), str(DataError(text)), error_text(OSError(5, "bad", text))):
        assert is_one_line(line)
        assert isinstance(line.encode(), bytes)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Am\u00e9lie … 千と千尋", "Am\u00e9lie … 千と千尋"),
        ("a\nb\r\nc", "a b c"),
        ("want:\n  one\n\n  two\n", "want: one two"),
        ("/a  b.yaml: no file ' c '", "/a  b.yaml: no file ' c '"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\u202egpj.exe", r"\u202egpj.exe"),
        ("a\u200e\u061c\u2066b", r"a\u200e\u061c\u2066b"),
        ("a\tb\u2028c\x85d", r"a\tb c d"),
        # French punctuation, Persian, Hindi, an ideographic space and a family as one emoji.
        ("\u00a0: \u202f!", "\u00a0: \u202f!"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("क्\u200dष", "क्\u200dष"),
        ("千\u3000尋", "千\u3000尋"),
        ("👩\u200d👧", "👩\u200d👧"),
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
