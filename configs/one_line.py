"""Text from files and names of strangers, as one line that no terminal or log interprets. Pure."""

from __future__ import annotations

import re

LONGEST = 4_000
"""Characters of a message. A longer one quotes the input, so its middle is left out."""

_END = 1_000
"""Characters kept at the end, where a message states the remedy."""

CONTROLS = re.compile(
    r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028-\u202e\u2066-\u2069\u061c\u200e\u200f]"
)
"""Control codes, surrogates, line separators, and what changes the direction of text.

Others that are invisible are part of ordinary text: no-break spaces, the joiners of Persian, Hindi
and emoji.
"""


def one_line(text: str) -> str:
    r"""Return a message on one line: at most ``LONGEST`` characters, no control characters.

    A line break, with the spaces around it, becomes a space; other spaces are kept, since they may
    be those of a file's name. Other control characters, among them those that move the cursor of a
    terminal or reverse the direction of text, are written as escapes such as ``\\x1b``.
    """
    lines = text.splitlines()
    if len(lines) > 1:
        lines = [stripped for each in lines if (stripped := each.strip(" \t"))]
    line = printable(" ".join(lines))
    if len(line) <= LONGEST:
        return line
    return f"{line[: LONGEST - _END - 1]}…{line[-_END:]}"


def printable(text: str, keep: str = "") -> str:
    """Return a text with its control characters, except those in ``keep``, written as escapes."""
    return CONTROLS.sub(lambda c: c[0] if c[0] in keep else _escape(c[0]), text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()
