"""Text from files and names of strangers, as one line that no terminal or log interprets. Pure."""

from __future__ import annotations

LONGEST = 4_000
"""Characters of a message. A longer one quotes the input, so its middle is left out."""

_END = 1_000
"""Characters kept at the end, where a message states the remedy."""


def one_line(text: str) -> str:
    r"""Return a message on one line: at most ``LONGEST`` characters, all of them printable.

    Line breaks become spaces. Other control characters, among them those that move the cursor of a
    terminal or reverse the direction of text, are written as escapes such as ``\\x1b``.
    """
    line = printable(" ".join(text.splitlines()))
    if len(line) <= LONGEST:
        return line
    return f"{line[: LONGEST - _END - 1]}…{line[-_END:]}"


def printable(text: str) -> str:
    """Return a text with the characters that are not printable written as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
