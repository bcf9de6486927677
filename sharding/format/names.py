"""Names of the files, shards, members and movies of a published dataset.

plan.json             which movie goes to which shard
NAME-00000.tar        a shard; NAME is ``frames`` or ``features``
NAME-00000.index.npz  byte range of each image of a frame shard
NAME-00000.json       sidecar: contents and input digest; marks the shard as complete
index.npz             byte range of each movie's rows in a feature dataset
labels.npz            genres and splits of a feature dataset
manifest.json         the sealed dataset; the sha256 of this file is the data digest
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from configs.errors import DataError
from sharding.format.encoding import sha256_hex

Kind = Literal["frames", "features"]
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ID_FORM = "1 to 64 letters, digits, '_' or '-'"
_UNESCAPED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-")


def shard_name(kind: Kind, number: int) -> str:
    """Return the name of a shard without suffix, e.g. ``frames-00007``."""
    return f"{kind}-{number:05d}"


def frame_name(shot: int, image: int) -> str:
    """Return the name of an image in its movie's folder: ``shot_0000_img_0.jpg``."""
    return f"shot_{shot:04d}_img_{image}.jpg"


def movie_id(name: str) -> str:
    """Return the id of the movie that the dump calls ``name``; most names are valid ids already.

    Any other name becomes ``x_`` and the name, with every byte outside ``[A-Za-z0-9-]`` written as
    ``_`` and two hexadecimal digits; ``movie_name`` reverses this.

    Raises:
        DataError: the name is empty or no text, or its id would be longer than 64 characters.
    """
    if _ID.fullmatch(name):
        return name
    try:
        raw = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half of a surrogate pair: JSON may contain it, no file name
        raw = b""
    written = "x_" + "".join(chr(b) if b in _UNESCAPED else f"_{b:02x}" for b in raw)
    if not raw or len(written) > 64:
        raise DataError(
            f"movie {name!r}: the name cannot become an id of {_ID_FORM}; rename its source"
        )
    return written


def movie_name(written: str) -> str:
    """Return the name whose ``movie_id`` is the escaped ``x_…``."""
    raw = re.sub(
        rb"_([0-9a-f]{2})", lambda m: bytes([int(m[1], 16)]), written.removeprefix("x_").encode()
    )
    return raw.decode("utf-8", "surrogateescape")


def array_list(numbers: Iterable[int]) -> str:
    """Return numbers as a Slurm array list: ``0-3,7``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def movies_digest(movies: Iterable[str]) -> str:
    """Return the sha256 of a list of movie ids; labels store it to detect a misalignment."""
    return sha256_hex("".join(f"{movie}\n" for movie in movies).encode("ascii"))


def checked_id(value: object, where: str) -> str:
    """Return ``value``; raise ``DataError`` unless it is a movie id."""
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise DataError(f"{where}: movie id: got {str(value)[:80]!r}, want {_ID_FORM}")
    return value


MANIFEST = "manifest.json"


def tar_name(kind: Kind, number: int) -> str:
    """Return the file name of a shard's tar."""
    return f"{shard_name(kind, number)}.tar"


def index_name(kind: Kind, number: int) -> str:
    """Return the file name of a shard's index."""
    return f"{shard_name(kind, number)}.index.npz"


def sidecar_name(kind: Kind, number: int) -> str:
    """Return the file name of a shard's sidecar."""
    return f"{shard_name(kind, number)}.json"


PLAN = "plan.json"
INDEX = "index.npz"
LABELS = "labels.npz"
FEATURES, SHOTS, INFO = ".features.npy", ".shots.npy", ".json"
