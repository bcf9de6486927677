"""Tensors of a TorchScript archive, read without its code.

``torch.jit.load`` would run what the archive contains. Here its table of attributes is unpickled
with classes that only store values, and every other name is refused.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import DataError

_DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}


class _Module(dict[str, object]):
    """Attributes of a module, by name; its class in the archive is ignored."""

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.update(state)


def is_torchscript(path: Path) -> bool:
    """Return whether a file is an archive written by ``torch.jit.save``."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, object]:
    """Return the attributes of the module in an archive, as nested dicts of tensors and values.

    Raises:
        DataError: the archive refers to a function or class that is not part of TorchScript, or
            its attributes are compressed.
    """
    with zipfile.ZipFile(path) as archive:
        (table,) = (name for name in archive.namelist() if name.count("/") == 1 and _is_table(name))
        root = table.partition("/")[0]
        file = io.BytesIO(_read_stored(archive, table, path))
        return dict(_Unpickler(file, archive, root, path).load())


def _is_table(name: str) -> bool:
    return name.endswith("/data.pkl")


def _read_stored(archive: zipfile.ZipFile, name: str, path: Path) -> bytes:
    """Return a member, which TorchScript never compresses: it cannot be larger than the file."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise DataError(
            f"{path}: {name} is compressed, want an archive as torch.jit.save writes it"
        )
    return archive.read(name)


class _Unpickler(pickle.Unpickler):
    """Unpickler to which only modules, tensors and lists exist."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, root: str, path: Path) -> None:
        super().__init__(file)
        self._archive, self._root, self._path = archive, root, path
        self._storages: dict[str, bytearray] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return the function or class that replaces a name of the archive; nothing is imported."""
        if module.partition(".")[0] == "__torch__":
            return _Module
        if module == "torch.jit._pickle":  # marks the type of a list or dict
            return self._first
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("collections", "OrderedDict"): OrderedDict,
            **{("torch", storage): dtype for storage, dtype in _DTYPES.items()},
        }
        if (module, name) not in known:
            raise DataError(
                f"{self._path}: contains {module}.{name}, which could execute any code; want a "
                "TorchScript archive of tensors"
            )
        return known[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        """Return the values of a storage, as one axis; references to it share their memory."""
        _, dtype, key, _, _ = pid
        if key not in self._storages:
            name = f"{self._root}/data/{key}"
            self._storages[key] = bytearray(_read_stored(self._archive, name, self._path))
        data = self._storages[key]
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)

    def _tensor(self, storage: Tensor, offset: int, size: Any, stride: Any, *_: object) -> Tensor:
        return storage.as_strided(size, stride, offset)  # checks that it is inside the storage

    def _first(self, value: object, *_: object) -> object:
        return value
