"""Predictions of a model for the movies of a split: ``predictions.npz`` and ``predictions.csv``.

``predictions.npz``, read by ``numpy.load`` without pickle:

    movie        ``[M]`` str, ids in the order of the feature index
    split        ``[M]`` str, the split that was scored
    genre        ``[G]`` str, names of the columns
    probability  ``[M, G]`` float64, 0 to 1
    predicted    ``[M, G]`` bool, probability >= threshold
    label        ``[M, G]`` uint8, 0 or 1
    threshold    ``[G]`` float64, the model's own: per genre if it has such, else one for all

``predictions.csv`` has one row per movie: ``movie``, ``split``, its genres as ``labels`` and
``predicted`` (separated by ``|``), and one column per genre with its probability.

M = movies, G = genres
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.corrupt import report_corrupt
from configs.errors import DataError
from configs.runtime.hints import hint
from configs.runtime.publish import publish_bytes
from sharding.format.encoding import npz_arrays, npz_bytes, sha256_hex

NPZ, CSV = "predictions.npz", "predictions.csv"

_ARRAYS = ("movie", "split", "genre", "probability", "predicted", "label", "threshold")


@dataclass(frozen=True, eq=False)
class Predictions:
    """Probabilities, decisions and labels of the scored movies."""

    movie_id: Sequence[str]
    genres: Sequence[str]
    labels_MG: NDArray[np.uint8]
    probabilities_MG: NDArray[np.float64]
    thresholds_G: NDArray[np.float64]
    """Probabilities at or above them count as predicted."""

    split: str

    @property
    def predicted_MG(self) -> NDArray[np.bool_]:  # noqa: N802  # axes, as in the fields
        """Whether a genre is predicted."""
        return self.probabilities_MG >= self.thresholds_G

    @property
    def digest(self) -> str:
        """The sha256 of ``predictions.npz``."""
        return sha256_hex(self.to_npz())

    def to_npz(self) -> bytes:
        """Return ``predictions.npz``."""
        return npz_bytes(
            {
                "movie": np.array(self.movie_id, np.str_),
                "split": np.array([self.split] * len(self.movie_id), np.str_),
                "genre": np.array(self.genres, np.str_),
                "probability": self.probabilities_MG,
                "predicted": self.predicted_MG,
                "label": self.labels_MG.astype(np.uint8),
                "threshold": self.thresholds_G,
            }
        )

    def to_csv(self) -> bytes:
        """Return ``predictions.csv`` in UTF-8, probabilities with six decimals."""
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["movie", "split", "labels", "predicted", *self.genres])
        rows = zip(
            self.movie_id, self.labels_MG, self.predicted_MG, self.probabilities_MG, strict=True
        )
        for movie, label_G, predicted_G, probability_G in rows:
            decided = [self._joined(label_G), self._joined(predicted_G)]
            values = [f"{value:.6f}" for value in probability_G]
            writer.writerow([movie, self.split, *decided, *values])
        return text.getvalue().encode()

    def _joined(self, hot_G: Iterable[np.generic]) -> str:
        return "|".join(genre for genre, hot in zip(self.genres, hot_G, strict=True) if hot)


def write_predictions(folder: Path, predictions: Predictions) -> dict[str, Path]:
    """Publish both files atomically; return their paths by file name.

    They are published before ``report.json``, which contains the digest of ``predictions.npz``.
    """
    paths = {NPZ: folder / NPZ, CSV: folder / CSV}
    publish_bytes(paths[NPZ], predictions.to_npz())
    publish_bytes(paths[CSV], predictions.to_csv())
    return paths


def read_predictions(path: Path, digest: str) -> Predictions:
    """Read the ``predictions.npz`` of a report.

    Args:
        path: The file.
        digest: Its sha256, as recorded in the report.

    Raises:
        DataError: the file is missing, corrupt, or does not belong to the report.
    """
    again = f"run {hint('movienet-eval report')} again"
    if not path.is_file():
        raise DataError(f"{path}: no predictions next to the report; {again}")
    data = path.read_bytes()
    if sha256_hex(data) != digest:
        raise DataError(f"{path}: differs from the predictions of its report; {again}")
    arrays = npz_arrays(data, str(path), _ARRAYS)
    with report_corrupt(path, again):
        return Predictions(
            movie_id=tuple(arrays["movie"].tolist()),
            split=str(arrays["split"][0]),
            genres=tuple(arrays["genre"].tolist()),
            probabilities_MG=arrays["probability"],
            labels_MG=arrays["label"],
            thresholds_G=arrays["threshold"],
        )
