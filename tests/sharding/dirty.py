"""A dump that contains every known kind of defect at least once."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sharding.check_report import Report
from tests.sharding.films import write_folder, write_tar

# 8 x 8 grey pixels, encoded once by Pillow; constant, so independent of library versions.
_GREY = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAFA3PEY8MlBGQUZaVVBfeMiCeG5uePWvuZHI////////////////////////"
    "////////////////////////////wAALCAAIAAgBAREA/8QAFAABAAAAAAAAAAAAAAAAAAAAAf/EABQQAQAAAAAAAAAA"
    "AAAAAAAAAAD/2gAIAQEAAD8AH//Z"
)

TRUNCATED_TAR, NO_IMAGE = "tt0000005", "tt0000008"
"""Movies excluded from the build: a truncated tar, and a movie without an image."""

MOVIES = tuple(f"tt{number:07d}" for number in range(1, 15))

REJECTED = [
    ("tt0000003", "shot_0002_img_1.jpg", "empty"),
    ("tt0000004", "shot_0003_img_2.jpg", "no JPEG end marker, cut"),
    ("tt0000009", "../shot_0009_img_0.jpg", "unsafe path"),
    ("tt0000009", "notes.txt", "no image of a shot"),
    ("tt0000009", "shot_0008_img_0.jpg", "not a plain file"),
]
"""Images and members that a build rejects: movie, member, reason."""

UNDECODABLE = [("tt0000004", "shot_0000_img_1.jpg", "not decodable")]
"""Images that a build rejects in addition if it decodes every image."""

CONFIG = {
    "version": 1,
    "data": {
        "dump": "dump",
        "metadata": "meta",
        "split": "split.json",
        "genres": ["Drama", "Comedy", "War"],
        "root": "root",
    },
    "sharding": {"max_bad_fraction": 0.1},
    "encoder": {"name": "tower"},
    "training": {"run_name": "run"},
}


def real_jpeg(key: object) -> bytes:
    """Return a decodable JPEG whose bytes depend on ``key``."""
    comment = repr(key).encode()
    return _GREY[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + _GREY[2:]


def real_film(movie: str, shots: int = 4) -> dict[str, bytes]:
    """Return the images of a movie by file name; three per shot, all decodable."""
    return {
        f"shot_{shot:04d}_img_{image}.jpg": real_jpeg((movie, shot, image))
        for shot in range(shots)
        for image in range(3)
    }


def write_clean_dump(folder: Path) -> None:
    """Write dump, metadata, split and ``config.yaml`` without any defect."""
    (folder / "meta").mkdir(parents=True)
    for movie in MOVIES:
        write_tar(folder / "dump", movie, real_film(movie))
        write_genres(folder, movie, ["Drama"])
    _write_split(folder, {"train": MOVIES[:8], "val": MOVIES[8:11], "test": MOVIES[11:]})
    (folder / "config.yaml").write_text(json.dumps(CONFIG))


def write_genres(folder: Path, movie: str, genres: list[str] | None) -> None:
    """Write the metadata of a movie."""
    (folder / "meta" / f"{movie}.json").write_text(json.dumps({"genres": genres}))


def write_dirty_dump(folder: Path) -> None:
    """Write the clean dump, then add the defects."""
    write_clean_dump(folder)
    _damage_images(folder / "dump")
    _damage_sources(folder / "dump")
    _damage_metadata(folder)
    # tt0000013 is in no split, tt0000099 is in one and not in the dump.
    in_split = [movie for movie in MOVIES if movie != "tt0000013"]
    _write_split(folder, {"train": in_split[:8], "val": in_split[8:], "test": ["tt0000099"]})


def _damage_images(dump: Path) -> None:
    images = {movie: real_film(movie) for movie in MOVIES}
    del images["tt0000002"]["shot_0001_img_2.jpg"]
    images["tt0000003"]["shot_0002_img_1.jpg"] = b""
    images["tt0000004"]["shot_0000_img_1.jpg"] = (
        b"\xff\xd8\xff\xd9"  # both markers without any content
    )
    images["tt0000004"]["shot_0003_img_2.jpg"] = real_jpeg("cut")[:-20]
    for movie in ("tt0000002", "tt0000003", "tt0000004"):
        write_tar(dump, movie, images[movie])


def _damage_sources(dump: Path) -> None:
    path = dump / f"{TRUNCATED_TAR}.tar"
    path.write_bytes(path.read_bytes()[:3000])
    first, second = (real_film("tt0000001", shots=shots) for shots in (2, 4))
    write_tar(dump, "tt0000001", first)
    joined = (dump / "tt0000001.tar").read_bytes()
    write_tar(dump, "tt0000001", {n: d for n, d in second.items() if n not in first})
    (dump / "tt0000001.tar").write_bytes(joined + (dump / "tt0000001.tar").read_bytes())
    (dump / "tt0000015.tar.xz").write_bytes(b"not read")
    write_folder(dump, "tt0000006", real_film("tt0000006", shots=5))
    write_tar(dump, "tt0000007", real_film("tt0000007", shots=1))
    (dump / f"{NO_IMAGE}.tar").unlink()
    write_folder(dump, NO_IMAGE, {"frame1.jpg": real_jpeg(1)})
    with tarfile.open(dump / "tt0000009.tar", "a") as archive:
        for name in ("../shot_0009_img_0.jpg", "notes.txt"):
            archive.addfile(_member(name, 3), io.BytesIO(b"odd"))
        link = _member("shot_0008_img_0.jpg", 0)
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)


def _damage_metadata(folder: Path) -> None:
    write_genres(folder, "tt0000010", None)
    (folder / "meta" / "tt0000011.json").unlink()
    write_genres(folder, "tt0000012", ["Noir"])
    write_genres(folder, "tt0000013", ["Drama", "Noir", "Short"])
    (folder / "meta" / "tt0000014.json").write_text('{"genres": ["Dra')


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size
    return member


def _write_split(folder: Path, split: Mapping[str, object]) -> None:
    (folder / "split.json").write_text(json.dumps(split))


def findings_of(report: Report) -> dict[str, Any]:
    """Return the names of each finding by its key; empty findings are omitted."""
    tree = json.loads(report.to_bytes())["findings"]
    return {key: items for key, items in tree.items() if items}
