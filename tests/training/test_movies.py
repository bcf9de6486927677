from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.errors import DataError
from tests.training.conftest import MakeFilms
from training.movies import split_movies


def test_movies_without_rows_are_left_out_in_one_warning(
    make_films: MakeFilms, caplog: pytest.LogCaptureFixture
) -> None:
    features = make_films([3, 0, 5, 0]).features
    assert split_movies(features, "train", None).tolist() == [0, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "train: 2 movies without rows are left out: tt0000001, tt0000003"
    ]


def test_a_split_of_movies_without_rows_is_told(make_films: MakeFilms, tmp_path: Path) -> None:
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"val": ["tt0000001"]}))
    with pytest.raises(DataError, match="no movie of split 'val' has rows"):
        split_movies(make_films([3, 0]).features, "val", str(split))
