"""A film to predict: a video file, a folder of frames, or a movie of the dump."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import ConfigError, DataError
from configs.one_line import CONTROLS
from configs.runtime.progress import progress
from sharding.dump.archives import open_source
from sharding.dump.key_frames import VideoSource
from sharding.dump.scan import dump_of, find_sources, read_movies
from sharding.dump.sources import FolderSource, Image, MovieSource, is_image, is_regular_file
from sharding.dump.video import is_video
from sharding.format.names import movie_id

if TYPE_CHECKING:
    from configs.schema import Config
    from sharding.dump.shot_detection import DetectorName
    from sharding.plan import Movie

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True)
class Still:
    """One key frame of a film."""

    shot: int
    """Position of its shot in ``Film.shots``."""

    name: str
    """File name, e.g. ``shot_0003_img_1.jpg``."""

    time_s: float | None
    """Seconds since the begin; None if the film is not a video."""


@dataclass(frozen=True)
class Span:
    """One shot."""

    number: int
    """As in the names of the key frames."""

    begin_s: float | None
    end_s: float | None


class Film:
    """An open film: its shots and key frames in order."""

    def __init__(self, title: str, kind: str, source: MovieSource) -> None:
        # A name may contain control characters, which a terminal would obey.
        self.title = CONTROLS.sub("\ufffd", title)
        self.kind = kind
        self._source = source
        self._images = source.images
        numbers = list(dict.fromkeys(image.shot for image in source.images))
        place = {number: position for position, number in enumerate(numbers)}
        if isinstance(source, VideoSource):
            times: list[float | None] = list(source.times_s)
            self.shots = [Span(n, *source.spans[n]) for n in numbers]
        else:
            times = [None] * len(self._images)
            self.shots = [Span(number, None, None) for number in numbers]
        self.stills = [
            Still(place[image.shot], image.name, time_s)
            for image, time_s in zip(self._images, times, strict=True)
        ]

    @property
    def duration_s(self) -> float | None:
        """Duration of a video in seconds; None for frames."""
        return self.shots[-1].end_s if self.shots else None

    def read(self, still: int) -> bytes | None:
        """Return the bytes of a key frame; None if they are corrupt.

        Raises:
            DataError: the source changed while it was read.
            OSError: the source cannot be read.
        """
        image = self._images[still]
        buffer = bytearray(image.size)
        return None if self._source.read_into(image, memoryview(buffer)) else bytes(buffer)


@contextmanager
def open_film(
    film: str, config: Config, detector: DetectorName = "pyscenedetect"
) -> Iterator[Film]:
    """Open a film by its path, or by its id in ``data.dump``.

    Raises:
        ConfigError: there is neither such a file or folder, nor a dump.
        DataError: the film has no key frame, is corrupt, or is not in the dump.
        MachineError: the extra ``[video]`` is not installed.
        OSError: it cannot be read.
    """
    path = Path(film)
    if path.is_dir():
        with _closing(_frames(path)) as source:
            yield _film(path.resolve().name, "frames", source, film)
    elif path.exists():
        with _shots(path.stem) as on_shot:
            video = VideoSource(path, on_shot, detector)
        with _closing(video) as source:
            yield _film(path.stem, "video", source, film)
    else:
        if config.data.dump is None or path.name != film or is_video(film):
            raise ConfigError(
                f"{film}: no such file or folder; want a video, a folder of frames, or the id of a "
                "movie of data.dump (pass --config)"
            )
        dump, movie = dump_of(config), _movie(film, config)
        with ExitStack() as stack:
            with _shots(movie.original) if is_video(movie.source) else nullcontext() as on_shot:
                source = stack.enter_context(
                    open_source(dump, movie.source, on_shot=on_shot or (lambda: None))
                )
            yield _film(movie.original, "movie of the dump", source, film)


@contextmanager
def _shots(title: str) -> Iterator[Callable[[], None]]:
    """Show the number of shots, while a video is decoded."""
    with progress(None, label=f"shots of {title}", unit="shots") as bar:
        yield bar.advance


def _movie(film: str, config: Config) -> Movie:
    dump = dump_of(config)
    ids = {movie_id(name) for name in find_sources(dump).by_name}
    if movie_id(film) not in ids:
        near = difflib.get_close_matches(film, ids, n=1)
        raise DataError(
            f"{film}: not in the dump {dump}, which has {len(ids)} movies"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    (movie,) = read_movies(dump, (film,))
    return movie


@contextmanager
def _closing(source: MovieSource) -> Iterator[MovieSource]:
    try:
        yield source
    finally:
        source.close()


def _film(title: str, kind: str, source: MovieSource, where: str) -> Film:
    if not source.images:
        raise DataError(
            f"{where}: got no frame, want pictures such as shot_0000_img_0.jpg or 0001.jpg in the "
            "folder"
        )
    return Film(title, kind, source)


def _frames(folder: Path) -> FolderSource:
    """Open a folder of frames: of shots, as MovieNet names them, or any pictures by name."""
    source = FolderSource(folder)
    if source.images:
        return source
    with os.scandir(folder) as entries:
        pictures = sorted(
            (
                entry
                for entry in entries
                if entry.name.lower().endswith(_PICTURES)
                and not entry.name.startswith(".")
                and not is_image(entry.name)
                and is_regular_file(entry)
            ),
            key=lambda entry: entry.name,
        )
        stats = [(entry.name, entry.stat()) for entry in pictures]
    # Each picture is a shot of its own.
    source.images = tuple(
        Image(number, 0, name, stat.st_size, 0, stat.st_mtime_ns)
        for number, (name, stat) in enumerate(stats)
    )
    return source
