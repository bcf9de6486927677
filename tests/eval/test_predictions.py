from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from configs.errors import DataError
from eval.predictions import Predictions, read_predictions, write_predictions

PREDICTIONS = Predictions(
    movie_id=("tt1", "tt2"),
    split="test",
    genres=("Drama", "Sci-Fi, odd"),
    probabilities_MG=np.array([[0.75, 0.5], [0.25, 1.0]]),
    labels_MG=np.array([[1, 1], [0, 1]], np.uint8),
    thresholds_G=np.array([0.5, 0.6]),
)


def test_the_npz_contains_the_documented_arrays(tmp_path: Path) -> None:
    path = write_predictions(tmp_path, PREDICTIONS)["predictions.npz"]
    with np.load(path) as file:
        arrays = dict(file)
    described = {name: (array.dtype.kind, array.shape) for name, array in arrays.items()}
    assert described == {
        "movie": ("U", (2,)),
        "split": ("U", (2,)),
        "genre": ("U", (2,)),
        "probability": ("f", (2, 2)),
        "predicted": ("b", (2, 2)),
        "label": ("u", (2, 2)),
        "threshold": ("f", (2,)),
    }
    assert arrays["predicted"].tolist() == [[True, False], [False, True]]


def test_the_csv_has_one_row_per_movie(tmp_path: Path) -> None:
    path = write_predictions(tmp_path, PREDICTIONS)["predictions.csv"]
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {
            "movie": "tt1",
            "split": "test",
            "labels": "Drama|Sci-Fi, odd",
            "predicted": "Drama",
            "Drama": "0.750000",
            "Sci-Fi, odd": "0.500000",
        },
        {
            "movie": "tt2",
            "split": "test",
            "labels": "Sci-Fi, odd",
            "predicted": "Sci-Fi, odd",
            "Drama": "0.250000",
            "Sci-Fi, odd": "1.000000",
        },
    ]


def test_predictions_that_do_not_belong_to_the_report_are_one_line(tmp_path: Path) -> None:
    path = write_predictions(tmp_path, PREDICTIONS)["predictions.npz"]
    back = read_predictions(path, PREDICTIONS.digest)
    assert (back.movie_id, back.split, back.genres) == (("tt1", "tt2"), "test", PREDICTIONS.genres)
    assert (back.probabilities_MG == PREDICTIONS.probabilities_MG).all()
    with pytest.raises(DataError, match=r"npz: differs from the predictions of its report; run"):
        read_predictions(path, "0" * 64)
    with pytest.raises(DataError, match="no predictions next to the report; run"):
        read_predictions(tmp_path / "none.npz", "0" * 64)
