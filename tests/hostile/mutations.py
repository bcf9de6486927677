"""Hostile variants of valid files: cut, flipped, spliced, nested, and with impossible numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

from sharding.format import tar

TEXTS = (
    b"../../../../etc/passwd", b"/etc/passwd", b"~root", b"$HOME", b"CON", b"NUL.tar", b"a\0b",
    b"\n", b"\r\n\t", b"\x1b[2J", b"\xff\xfe", b"\xed\xa0\x80", "\u202efdp".encode(), b"{0..9}",
    b"A" * 300, b"\xe2\x80\xa8", b"%s%n", b"file:///etc/passwd", b"", b"-1", b"1e999", b"NaN",
    b"9" * 5000, b"[" * 3000, b"\0" * 1024, b"\xff" * 64,
)  # fmt: skip
"""Names, text and tokens that parsers are known to mistreat."""

NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**63, 2**64, 2**200, 1e308, 0.5, float("nan"), float("inf"), "", "\ud800",
    "\n", "\x1b[2J", "\0", "../x", "/etc/passwd", "x" * 5000, [], {}, [None], {"": None}, [[[]]],
)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, corpus: Sequence[bytes], tokens: Sequence[bytes] = ()) -> bytes:
    """Return a file of the corpus after one to four changes."""
    data = draw(st.sampled_from(corpus))
    for _ in range(draw(st.integers(1, 4))):
        data = draw(st.sampled_from(_CHANGES))(draw, data, corpus, (*TEXTS, *tokens))
    return data


def _place(draw: st.DrawFn, data: bytes) -> int:
    return draw(st.integers(0, len(data)))


def _cut(draw: st.DrawFn, data: bytes, _corpus: Sequence[bytes], _: Sequence[bytes]) -> bytes:
    return data[: _place(draw, data)]


def _flip(draw: st.DrawFn, data: bytes, _corpus: Sequence[bytes], _: Sequence[bytes]) -> bytes:
    at = _place(draw, data)
    return data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]


def _number(draw: st.DrawFn, data: bytes, _corpus: Sequence[bytes], _: Sequence[bytes]) -> bytes:
    at, width = _place(draw, data), draw(st.sampled_from([1, 2, 4, 8]))
    number: int = draw(st.sampled_from(NUMBERS)) % 256**width
    replaced = number.to_bytes(width, "little")
    if draw(st.booleans()):
        replaced = replaced[::-1]
    return data[:at] + replaced + data[at + width :]


def _digits(draw: st.DrawFn, data: bytes, _corpus: Sequence[bytes], _: Sequence[bytes]) -> bytes:
    """Replace a decimal number of a text."""
    found = list(re.finditer(rb"\d+", data))
    if not found:
        return data
    match = draw(st.sampled_from(found))
    number = draw(st.sampled_from([b"0", b"-1", b"1e9", b"4294967296", b"9" * 19, b"9" * 40]))
    return data[: match.start()] + number + data[match.end() :]


def _token(draw: st.DrawFn, data: bytes, _: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    at, token = _place(draw, data), draw(st.sampled_from(tokens))
    replaced = draw(st.sampled_from([0, len(token)]))
    return data[:at] + token + data[at + replaced :]


def _splice(draw: st.DrawFn, data: bytes, corpus: Sequence[bytes], _: Sequence[bytes]) -> bytes:
    other = draw(st.sampled_from(corpus))
    return data[: _place(draw, data)] + other[_place(draw, other) :]


def _drop(draw: st.DrawFn, data: bytes, _corpus: Sequence[bytes], _: Sequence[bytes]) -> bytes:
    at = _place(draw, data)
    return data[:at] + data[at + draw(st.integers(1, 64)) :]


def _repeat(draw: st.DrawFn, data: bytes, _corpus: Sequence[bytes], _: Sequence[bytes]) -> bytes:
    at, length = _place(draw, data), draw(st.integers(1, 600))
    return data[:at] + data[at : at + length] * draw(st.integers(2, 20)) + data[at + length :]


_CHANGES: tuple[Callable[[st.DrawFn, bytes, Sequence[bytes], Sequence[bytes]], bytes], ...] = (
    _cut, _flip, _number, _digits, _token, _splice, _drop, _repeat,
)  # fmt: skip


@st.composite
def mutated_json(draw: st.DrawFn, corpus: Sequence[bytes]) -> bytes:
    """Return a JSON file of the corpus with other values, or with other bytes."""
    if draw(st.booleans()):
        return draw(mutated(corpus))
    tree = json.loads(draw(st.sampled_from(corpus)))
    for _ in range(draw(st.integers(1, 3))):
        tree = _changed(draw, tree)
    # As the product writes it: a file in another form is refused before its values are read.
    return (json.dumps(tree, sort_keys=True, separators=(",", ":")) + "\n").encode("ascii")


def _changed(draw: st.DrawFn, tree: Any) -> Any:
    if isinstance(tree, dict) and tree and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(tree)))
        rest = {name: value for name, value in tree.items() if name != key}
        if not draw(st.integers(0, 4)):
            return {**rest, draw(st.text(max_size=5)): tree[key]}
        return {**rest, key: _changed(draw, tree[key])}
    if isinstance(tree, list) and tree and draw(st.integers(0, 4)):
        k = draw(st.integers(0, len(tree) - 1))
        return [
            *tree[:k],
            _changed(draw, tree[k]),
            *tree[k + 1 :],
            *tree[: draw(st.integers(0, 1))],
        ]
    nested: Any = draw(st.sampled_from(VALUES))
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 90, 400]))):
        nested = [nested]
    return nested


def with_checksums(data: bytes) -> bytes:
    """Return a tar whose headers have the right check sums, so that their other fields are read."""
    blocks = bytearray(data)
    for at in range(0, len(blocks) - tar.BLOCK + 1, tar.BLOCK):
        if blocks[at + 257 : at + 262] == b"ustar":
            blocks[at + 148 : at + 156] = b" " * 8
            blocks[at + 148 : at + 156] = b"%06o\0 " % sum(blocks[at : at + tar.BLOCK])
    return bytes(blocks)
