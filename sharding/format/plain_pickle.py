"""Pickles of plain containers, text, numbers and numpy arrays. Reading them executes no code.

Neither pickle's C code nor numpy's own functions read the bytes: damaged ones crash them. Memory
grows with the size of the pickle, whatever lengths it states and however often it refers to a list.
"""

from __future__ import annotations

import io
import pickle  # only its interpreter; ``_plain_globals`` lists all that it may call
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import IO, Any, ClassVar

import numpy as np

from configs.corrupt import report_corrupt
from configs.errors import DataError

_MOST_VALUES = 10_000_000
"""Values of a pickle, a list counted each time that it is referred to."""

_CONTAINERS = (dict, list, tuple, set, frozenset)
_DTYPE = re.compile(r"[<>|=]?[?biufSU][0-9]{0,6}")


def load_pickle(data: bytes, where: str) -> Any:
    """Return the content of a pickle; numpy's arrays become flat lists, its scalars numbers.

    Raises:
        DataError: the pickle is corrupt, has too many values, or contains any other type.
    """
    with report_corrupt(where, "copy it again, or write it as JSON", problem="not a valid pickle"):
        content = _PlainUnpickler(io.BytesIO(data), where).load()
        _count_values(content, where)
        return content


def _count_values(content: object, where: str) -> int:
    """Return the number of values, a list counted each time that it is referred to.

    A list is counted after those that it contains, and only once, so this takes no longer for
    lists that are referred to often.

    Raises:
        DataError: there are too many, or a list contains itself.
    """
    root = (content,)
    counts, begun, stack = dict[int, int](), set[int](), list[Any]([root])
    while stack:
        value = stack.pop()
        if id(value) in counts:
            continue
        nested = _nested(value)
        missing = [part for part in nested if id(part) not in counts]
        if not missing:
            counts[id(value)] = len(value) + sum(counts[id(part)] for part in nested)
            _reject_many(counts[id(value)], where)
            continue
        # Its parts were all counted before it is seen again, unless one of them contains it.
        if id(value) in begun:
            raise DataError(f"{where}: contains a list that contains itself; write plain data")
        begun.add(id(value))
        stack += [value, *missing]
    return counts[id(root)]


def _nested(value: Any) -> list[Any]:
    """Return the parts of a container that are containers."""
    parts = (*value, *value.values()) if isinstance(value, dict) else value
    return [part for part in parts if isinstance(part, _CONTAINERS)]


def _reject_many(n_values: int, where: str) -> None:
    if n_values > _MOST_VALUES:
        raise DataError(
            f"{where}: contains more than {_MOST_VALUES:,} values, a list counted each time that "
            "it is referred to; write only the genres of each movie"
        )


class _Dtype:
    """Stand-in for ``numpy.dtype``."""

    def __init__(self, name: str, *_flags: object) -> None:
        if not _DTYPE.fullmatch(name):
            raise pickle.UnpicklingError(f"contains an array of {name!r}, want numbers or text")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Sequence[Any]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])

    def values(self, raw: bytes | str) -> list[Any]:
        data = raw.encode("latin1") if isinstance(raw, str) else raw  # protocols 0 and 1
        values: list[Any] = np.frombuffer(data, self.dtype).tolist()
        return values


class _Array(list[Any]):
    """Stand-in for ``numpy.ndarray``: its values."""

    def __setstate__(self, state: Sequence[Any]) -> None:
        _version, _shape, dtype, _fortran, raw = state
        self[:] = raw if isinstance(raw, list) else dtype.values(raw)


def _latin1(text: str, encoding: str) -> bytes:
    # Protocol 2 writes bytes this way; the original function would give access to every codec.
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"contains text encoded as {encoding!r}, want plain data")
    return text.encode("latin1")


def _bytes(data: object = b"") -> bytes:
    # Given a number, the type itself would return that many bytes.
    if not isinstance(data, bytes):
        raise pickle.UnpicklingError("contains bytes made of other than bytes, want plain data")
    return data


def _plain_globals() -> dict[tuple[str, str], Callable[..., Any]]:
    allowed: dict[tuple[str, str], Callable[..., Any]] = {
        ("builtins", "bytes"): _bytes,
        ("builtins", "bytearray"): lambda *data: bytearray(_bytes(*data)),
        ("builtins", "set"): set,
        ("builtins", "frozenset"): frozenset,
    }
    allowed |= {("__builtin__", name): kind for (_, name), kind in allowed.items()}
    allowed["_codecs", "encode"] = _latin1
    allowed["numpy", "ndarray"], allowed["numpy", "dtype"] = _Array, _Dtype
    # Functions that numpy writes into pickles, under the module names of versions 1 and 2.
    for core in ("numpy.core", "numpy._core"):
        allowed[f"{core}.multiarray", "_reconstruct"] = lambda *_: _Array()
        allowed[f"{core}.multiarray", "scalar"] = lambda dtype, raw: dtype.values(raw)[0]
        allowed[f"{core}.numeric", "_frombuffer"] = lambda raw, dtype, *_: dtype.values(raw)
    return allowed


_ALLOWED = _plain_globals()


def _load_bytearray(unpickler: Any) -> None:
    """Read the bytes before they are copied: the original allocates the stated length."""
    unpickler.load_binbytes8()
    unpickler.stack[-1] = bytearray(unpickler.stack[-1])


def _load_shared(load: Callable[[Any], None], unpickler: Any) -> None:
    """Refer to an earlier value again."""
    load(unpickler)
    if isinstance(unpickler.stack[-1], tuple):
        unpickler.count_hashed(unpickler.stack[-1])


class _PlainUnpickler(pickle._Unpickler):
    """Unpickler that loads only the types of plain data."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    dispatch[pickle.BYTEARRAY8[0]] = _load_bytearray
    for _code in (pickle.GET, pickle.BINGET, pickle.LONG_BINGET, pickle.DUP):
        dispatch[_code[0]] = partial(_load_shared, dispatch[_code[0]])

    def __init__(self, file: IO[bytes], where: str) -> None:
        super().__init__(file)
        self._where, self._n_hashed = where, 0

    def count_hashed(self, value: Any) -> Any:
        """Return a value whose parts may be hashed again; their number limits the time."""
        self._n_hashed += _count_values(value, self._where)
        _reject_many(self._n_hashed, self._where)
        return value

    def find_class(self, module: str, name: str) -> Any:
        plain = _ALLOWED.get((module, name))
        if plain is None:
            raise pickle.UnpicklingError(
                f"contains {module}.{name}, want only lists, text, numbers and numpy arrays, since "
                "other types could run code"
            )
        if plain in (set, frozenset):
            return lambda *values: plain(*map(self.count_hashed, values))
        return plain
