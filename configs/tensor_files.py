"""Tensors of a file as other trainers save them; reading executes no code of the file.

Read are safetensors, what ``torch.save`` writes, and TorchScript archives. Wrappers (DDP, FSDP,
``torch.compile``) and the containers of trainers (``state_dict``, ``model``) remain in the names
until ``matching_tensors`` removes them.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import pickle
import re
import shlex
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from configs.corrupt import report_corrupt
from configs.errors import DataError
from configs.torchscript import is_torchscript, read_torchscript

_WRAPPERS = re.compile(
    r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
"""Parts of a name that DDP, ``torch.compile``, FSDP and activation checkpointing insert."""

_LFS = b"version https://git-lfs"

_MOST_ENTRIES = 1_000_000
"""Nested entries of a file. A small file can contain one container under any number of names."""

_LONGEST_NAME = 1_000

_DAMAGED = "want weights in safetensors or as torch.save writes them; copy the file again"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a file by name, e.g. ``model.visual.proj``, on the CPU.

    Of a training checkpoint with a ``state_dict`` only that is returned, without its optimizer.

    Raises:
        DataError: the file is damaged, contains no tensors, too many entries, or objects that only
            its own code can load; these are refused, not executed.
        OSError: the file cannot be opened.
    """
    with report_corrupt(path, _DAMAGED, problem="not a file of weights"):
        tree = _read(path)
        if isinstance(tree, Mapping) and isinstance(tree.get("state_dict"), Mapping):
            tree = tree["state_dict"]
        tensors = _named_tensors(tree, path)
    if not tensors:
        raise DataError(f"{path}: got no named tensors, want weights")
    return tensors


def matching_tensors(
    tensors: Mapping[str, Tensor], names: Collection[str], where: object
) -> dict[str, Tensor]:
    """Return the tensors of one model, without wrappers and the prefix that its names have.

    Args:
        tensors: As ``read_tensors`` returns them.
        names: Names in the model. The prefix is the one with which most of them are present.
        where: File, for error messages.

    Raises:
        DataError: several models of the file match equally well.
    """
    plain = {_WRAPPERS.sub("", name): value for name, value in tensors.items()}
    known = set(names)
    counts = Counter(prefix for name in plain for prefix, end in _splits(name) if end in known)
    most = max(counts.values(), default=0)
    best = sorted(prefix for prefix, count in counts.items() if count == most) or [""]
    if len(best) > 1 and best[0]:
        raise DataError(
            f"{where}: got several models, {', '.join(best)}, want one; save the tensors of one of "
            "them in a file"
        )
    prefix = best[0]
    return {
        name.removeprefix(prefix): value for name, value in plain.items() if name.startswith(prefix)
    }


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Yield ``("", "a.b")`` and ``("a.", "b")`` for ``a.b``."""
    yield "", name
    for dot in re.finditer(r"\.", name):
        yield name[: dot.end()], name[dot.end() :]


def _read(path: Path) -> object:
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise DataError(
                f"{path}: a pointer of Git LFS, not the weights; run `git lfs pull` in its folder"
            )
    if path.suffix == ".safetensors":
        return load_file(path)
    _check_stored(path)
    if is_torchscript(path):
        return read_torchscript(path)
    with torch.serialization.safe_globals(_harmless()):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise _refused(path, str(error)) from error


def _check_stored(path: Path) -> None:
    """Raise ``DataError`` if the members of an archive are together larger than the file.

    torch stores members uncompressed, except for the code of TorchScript, which is not read.
    Compressed ones, and several that share their bytes, would fill the memory.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        total = sum(
            member.file_size
            for member in archive.infolist()
            if member.filename.split("/")[1:2] != ["code"]
        )
    if total > (size := path.stat().st_size):
        raise DataError(
            f"{path}: got {total:,} bytes of members in a file of {size:,}, want weights as "
            "torch.save stores them, not compressed"
        )


def _harmless() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Return the types besides tensors that trainers save: calling them only stores values."""
    codes = np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?SU"  # not O: any object
    number: Any = np.float64(0)
    array: Any = np.zeros(0)
    scalar, empty = number.__reduce__()[0], array.__reduce__()[0]
    return [
        argparse.Namespace,
        (pathlib.PosixPath, "pathlib.PosixPath"),
        (pathlib.PosixPath, "pathlib._local.PosixPath"),
        np.ndarray,
        np.dtype,
        *{type(np.dtype(code)) for code in codes},
        # numpy 2 renamed the module, and files contain either name.
        *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
        *((empty, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    ]


def _refused(path: Path, reason: str) -> Exception:
    """Return an error that names what only code of the file can load, or the damage."""
    named = re.search(r"GLOBAL (\S+)", reason)
    if named is None:
        # Before it torch advises to load the file without any check.
        return ValueError(reason.rpartition("WeightsUnpickler error: ")[2].strip().split("\n")[0])
    return DataError(
        f"{path}: contains {named[1]}, which could execute any code, so it is not loaded; want "
        "tensors, numbers and text. If you trust the file, convert it: "
        f"python -c {shlex.quote(_conversion(path))}"
    )


def _conversion(path: Path) -> str:
    """Return a program without single quotes, which a shell would need to escape."""
    name = json.dumps(str(path), ensure_ascii=False)
    return (
        f'import torch; c = torch.load({name}, "cpu", weights_only=False); '
        'm = c if hasattr(c, "state_dict") else c.get("state_dict", c.get("model", c)); '
        'torch.save(m.state_dict() if hasattr(m, "state_dict") else m, "weights.pt")'
    )


def _named_tensors(tree: object, path: Path) -> dict[str, Tensor]:
    tensors = {}
    for number, (name, value) in enumerate(_entries(tree, "")):
        if number > _MOST_ENTRIES or len(name) > _LONGEST_NAME:
            raise DataError(
                f"{path}: got more than {_MOST_ENTRIES:,} nested entries, or a name of more than "
                f"{_LONGEST_NAME:,} characters, want the weights of one model"
            )
        if isinstance(value, Tensor):
            tensors[name] = value
    return tensors


def _entries(tree: object, name: str) -> Iterator[tuple[str, object]]:
    """Yield nested mappings and all that they contain, by name; without names below other keys."""
    yield name, tree
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if isinstance(key, str):
                yield from _entries(value, f"{name}.{key}" if name else key)
            else:
                yield name, None
