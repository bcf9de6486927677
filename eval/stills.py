"""Thumbnails of the rows of a feature set, read from the frame shards that it was encoded from."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from configs.errors import DataError
from configs.schema import Config
from encoders.decode import PILLOW_ERRORS
from sharding.dump.jpeg import BadImage, open_image
from sharding.features import FeatureSet
from sharding.format.index import FrameIndex
from sharding.format.names import frame_name
from sharding.frames import FrameSet, open_frames
from sharding.shard import read_sidecar
from sharding.storage.base import Range

WIDTH = 320
"""Largest width and height of a thumbnail in pixels."""


@dataclass(frozen=True)
class Still:
    """The image of a row."""

    name: str
    """Name of the image in its movie's folder, e.g. ``shot_0004_img_1.jpg``."""

    jpeg: bytes
    """Thumbnail."""


class Stills:
    """Reader of the images of a feature set's rows.

    Raises:
        DataError: the frame shards are not stored, or the rows were made from other ones.
    """

    def __init__(self, config: Config, features: FeatureSet) -> None:
        self._features, self._frames = features, _open_frames(config, features.manifest.provenance)
        self._shard = lru_cache(maxsize=4)(self._read_shard)

    def read(self, movie: int, row: int) -> Still:
        """Return the image of a row.

        Args:
            movie: Position of the movie in the index.
            row: Row within the movie.

        Raises:
            DataError: the image is missing or damaged.
        """
        shard = self._shard(int(self._features.index.shard[movie]))
        frames = shard.frames_of(self._features.movie_ids[movie])
        where = f"{self._frames.storage.location}: movie {self._features.movie_ids[movie]}"
        n_rows = int(self._features.index.rows[movie])
        if len(frames) != n_rows:
            raise DataError(f"{where}: got {len(frames)} images with a row, want {n_rows}")
        frame = frames[row]
        data = bytearray(int(shard.index.size[frame]))
        place = Range(self._frames.tar_name(shard.number), int(shard.index.offset[frame]))
        self._frames.storage.read_into([place], [memoryview(data)])
        return Still(shard.name(frame), _thumbnail(data, f"{where}: {shard.name(frame)}"))

    def _read_shard(self, number: int) -> _Shard:
        sidecar = read_sidecar(self._features.storage, "features", number)
        return _Shard(
            number,
            self._frames.frame_index(number),
            self._frames.shard_movies(number),
            {(each.movie, each.member) for each in (sidecar.rejected if sidecar else ())},
        )


@dataclass(frozen=True, eq=False)
class _Shard:
    """A frame shard, and which of its images have no row."""

    number: int
    index: FrameIndex
    movies: tuple[str, ...]
    rejected: Collection[tuple[str, str]]
    """Movie and name of images that could not be encoded."""

    def frames_of(self, movie: str) -> list[int]:
        """Return the images of a movie that have a row, in order; none of an unknown movie."""
        position = self.movies.index(movie) if movie in self.movies else -1
        frames = np.flatnonzero(self.index.movie == position).tolist()
        return [frame for frame in frames if (movie, self.name(frame)) not in self.rejected]

    def name(self, frame: int) -> str:
        """Return the name of an image in its movie's folder."""
        return frame_name(int(self.index.shot[frame]), int(self.index.image[frame]))


def _open_frames(config: Config, provenance: Mapping[str, Any]) -> FrameSet:
    if "frames" not in provenance:
        raise DataError("imported features have no frame shards")
    if config.encoder.frame_storage == "temporary":
        raise DataError("the frame shards were temporary (encoder.frame_storage) and are deleted")
    frames = open_frames(config.frames_url, config.storage)
    if frames.digest != provenance["frames"]:
        raise DataError(
            f"{frames.storage.location}: got frames {frames.digest[:12]}, want "
            f"{str(provenance['frames'])[:12]}, from which the features were made"
        )
    return frames


def _thumbnail(image: bytearray, where: str) -> bytes:
    try:
        with open_image(image) as opened:
            small = opened.convert("RGB")
            small.thumbnail((WIDTH, WIDTH))
    except (BadImage, *PILLOW_ERRORS) as error:
        raise DataError(f"{where}: cannot be decoded: {error}") from error
    jpeg = io.BytesIO()
    small.save(jpeg, "JPEG", quality=80)
    return jpeg.getvalue()
