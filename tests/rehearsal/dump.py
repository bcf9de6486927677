"""Writes the rehearsal's dump from its plan: small JPEGs of the mini dump, each with own bytes."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from sharding.demo import make_movie
from tests.rehearsal.dump_plan import LINK, NOTES, Film, FilmDirt, Slot

FRAMES, METADATA, SPLIT, MARK = "240P", "meta", "split.json", "complete.json"
ABSENT = "tt0000001"
"""A movie of the split that the dump does not contain."""

GARBAGE = b"\xff\xd8\xff\xd9"
"""Both markers of a JPEG without any content."""

Named = tuple[str, bytes]
"""An image's or a member's name and bytes."""


def write_dump(folder: Path, films: Sequence[Film]) -> None:
    """Write dump, metadata and split, unless this dump is complete already."""
    mark = json.dumps([(film.name, film.shots, film.dirt, len(film.bad)) for film in films])
    if (folder / MARK).is_file() and (folder / MARK).read_text() == mark:
        return
    shutil.rmtree(folder, ignore_errors=True)
    for name in (FRAMES, METADATA):
        (folder / name).mkdir(parents=True)
    with ProcessPoolExecutor(2) as pool:
        for _ in pool.map(partial(write_film, folder), films):
            pass
    _write_split(folder, films)
    (folder / MARK).write_text(mark)


def write_film(folder: Path, film: Film) -> None:
    """Write the source and the metadata of one film."""
    look = make_movie(film.number)
    _write_metadata(folder / METADATA / f"{film.name}.json", film, look.genres)
    jpegs = [data for _, data in sorted(look.jpegs.items())]
    _write_source(folder / FRAMES, film, list(_images(film, jpegs)))


def _images(film: Film, jpegs: Sequence[bytes]) -> Iterator[Named]:
    for shot, image in film.images:
        data = with_comment(jpegs[(3 * shot + image) % len(jpegs)], f"{film.name} {shot} {image}")
        yield f"shot_{shot:04d}_img_{image}.jpg", _damaged(film, (shot, image), data)


def with_comment(jpeg: bytes, comment: str) -> bytes:
    """Return a JPEG with an added comment, so that its bytes are unique."""
    raw = comment.encode()
    return jpeg[:2] + b"\xff\xfe" + (len(raw) + 2).to_bytes(2, "big") + raw + jpeg[2:]


def _damaged(film: Film, slot: Slot, jpeg: bytes) -> bytes:
    kind = film.bad.get(slot)
    changed = {"empty": b"", "cut": jpeg[: len(jpeg) // 2], "garbage": GARBAGE}
    return jpeg if kind is None else changed[kind]


def _write_source(frames: Path, film: Film, images: list[Named]) -> None:
    path, dirt = frames / f"{film.name}.tar", film.dirt
    if dirt in ("folder", "twice"):
        _write_folder(frames / film.name, images if dirt == "folder" else images[:15])
    if dirt == "no_images":
        _write_folder(frames / film.name, [("frame1.jpg", GARBAGE)])
    elif dirt == "joined":
        half = len(images) // 2
        path.write_bytes(_tar(images[:half]) + _tar(images[half:]))
    elif dirt != "folder":
        _write_tar(path, film, images)


def _write_tar(path: Path, film: Film, images: list[Named]) -> None:
    prefixes: dict[FilmDirt, str] = {"subfolder": f"frames/all/{film.name}/"}
    junk = [(".DS_Store", b"x"), ("Thumbs.db", b"x"), ("._shot_0000_img_0.jpg", b"x")]
    more: dict[FilmDirt, list[Named]] = {"junk": junk, "odd_members": [(NOTES, b"odd")]}
    data = _tar(
        images + more.get(film.dirt, []),
        prefix=prefixes.get(film.dirt, f"{film.name}/"),
        link=film.dirt == "odd_members",
        mode="w:gz" if film.dirt == "gzip" else "w",
    )
    if film.dirt == "truncated":
        data = data[: len(data) // 2 + 100]
    path.with_suffix(".tar.gz" if film.dirt == "gzip" else ".tar").write_bytes(data)


def _tar(
    members: Iterable[Named], *, prefix: str = "", link: bool = False, mode: str = "w"
) -> bytes:
    buffer = io.BytesIO()
    # Written by the standard library, as a typical external tar: it is input, not a shard.
    options = {"compresslevel": 1} if mode == "w:gz" else {}
    with tarfile.open(fileobj=buffer, mode=mode, format=tarfile.GNU_FORMAT, **options) as tar:  # type: ignore[call-overload]
        for name, data in members:
            member = tarfile.TarInfo(prefix + name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        if link:
            member = tarfile.TarInfo(prefix + LINK)
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(member)
    return buffer.getvalue()


def _write_folder(folder: Path, images: Iterable[Named]) -> None:
    folder.mkdir()
    for name, data in images:
        (folder / name).write_bytes(data)


def _write_metadata(path: Path, film: Film, genres: Sequence[str]) -> None:
    if film.dirt == "no_metadata":
        return
    content: dict[FilmDirt, object] = {"null_genres": None, "unknown_genre": ["Noir"]}
    text = json.dumps({"title": film.name, "genres": content.get(film.dirt, list(genres))})
    path.write_text(text[:-4] if film.dirt == "broken_metadata" else text)


def _write_split(folder: Path, films: Iterable[Film]) -> None:
    split: dict[str, list[str]] = {"train": [], "val": [], "test": [ABSENT]}
    for film in films:
        if name := film.split():
            split[name].append(film.name)
    (folder / SPLIT).write_text(json.dumps(split))
