"""Pickles of plain containers, text, numbers and numpy arrays. Reading them executes no code.

Neither pickle's C code nor numpy's own functions read the bytes: damaged ones crash them.
"""

from __future__ import annotations

import io
import pickle  # only its interpreter; ``_plain_globals`` lists all that it may call
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from configs.corrupt import report_corrupt

_DTYPE = re.compile(r"[<>|=]?[?biufSU][0-9]{0,6}")


def load_pickle(data: bytes, where: str) -> Any:
    """Return the content of a pickle; numpy's arrays become flat lists, its scalars numbers.

    Raises:
        DataError: the pickle is corrupt, or contains any other type.
    """
    with report_corrupt(where, "copy it again, or write it as JSON", problem="not a valid pickle"):
        return _PlainUnpickler(io.BytesIO(data)).load()


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


def _plain_globals() -> dict[tuple[str, str], Callable[..., Any]]:
    allowed: dict[tuple[str, str], Callable[..., Any]] = {
        ("builtins", kind.__name__): kind
        for kind in (list, dict, tuple, set, frozenset, str, bytes, bytearray, int, float, bool)
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


class _PlainUnpickler(pickle._Unpickler):
    """Unpickler that loads only the types of plain data."""

    def find_class(self, module: str, name: str) -> Any:
        plain = _ALLOWED.get((module, name))
        if plain is None:
            raise pickle.UnpicklingError(
                f"contains {module}.{name}, want only lists, text, numbers and numpy arrays, since "
                "other types could run code"
            )
        return plain
