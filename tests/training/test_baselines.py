from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from configs.errors import DataError
from tests.training.conftest import MakeFilms
from training.baselines import ClassPrior, MeanLinear, mean_row, mean_rows, read_means
from training.metrics import mean_ap, micro_ap

pytestmark = pytest.mark.slow


def test_the_class_prior_gives_every_movie_the_genre_frequencies_of_train() -> None:
    labels = np.array([[1, 1, 0], [0, 1, 0], [0, 1, 0]], np.uint8)
    logits = ClassPrior.fit(labels).predict(2)
    assert logits.shape == (2, 3)
    assert (logits[0] == logits[1]).all()
    assert np.isfinite(logits).all()
    # The pseudo-count is one movie with half of each genre: (1 + 1/2) of (3 + 1).
    assert 1 / (1 + np.exp(-logits[0])) == pytest.approx([1.5 / 4, 3.5 / 4, 0.5 / 4])


def test_the_mean_row_counts_repeats_once_and_ignores_zero_rows_and_norms() -> None:
    rows = np.array([[3, 0], [3, 0], [3, 0], [0, 0], [0, 0.5]], np.float16)
    assert mean_row(rows).tolist() == [0.5, 0.5]
    assert mean_row(rows * 4).tolist() == [0.5, 0.5]


def test_a_movie_without_rows_or_with_zero_rows_only_has_a_mean_of_zeros() -> None:
    assert mean_row(np.zeros((3, 2), np.float16)).tolist() == [0, 0]
    assert mean_row(np.zeros((0, 2), np.float16)).tolist() == [0, 0]


def test_the_linear_model_learns_a_linear_genre_at_any_scale_of_the_rows() -> None:
    rng = np.random.default_rng(0)
    means = rng.normal(size=(200, 5)).astype(np.float32)
    labels = (means[:, :2] > 0.3).astype(np.uint8)
    fitted = MeanLinear.fit(means[:100], labels[:100])
    scores = fitted.predict(means[100:])
    assert mean_ap(labels[100:], scores) > 0.9
    similar = means * 1e-4 + 7  # a tower whose rows are nearly equal
    rescaled = MeanLinear.fit(similar[:100], labels[:100]).predict(similar[100:])
    assert rescaled == pytest.approx(scores, abs=0.05)


def test_a_genre_of_no_train_movie_or_of_all_gets_its_prior() -> None:
    means = np.eye(4, 3, dtype=np.float32)
    labels = np.array([[0, 1], [0, 1], [0, 1], [0, 1]], np.uint8)
    logits = MeanLinear.fit(means, labels).predict(means)
    assert logits == pytest.approx(ClassPrior.fit(labels).predict(4))


def test_identical_movies_cause_no_division_by_zero() -> None:
    means = np.ones((4, 3), np.float32)
    labels = np.array([[0], [1], [0], [1]], np.uint8)
    assert np.isfinite(MeanLinear.fit(means, labels).predict(means)).all()


@pytest.mark.real
def test_on_the_real_movies_both_baselines_reproduce_the_figures_of_an_independent_study(
    real_features: Path,
) -> None:
    split = json.loads((real_features / "movie1K.split.v1.json").read_text())
    arrays = {path.stem: path for path in (real_features / "ProcessedTensor").glob("*.npy")}
    hot = _multi_hot(real_features)
    means, labels = {}, {}
    for name in ("train", "val"):
        movies = [movie for movie in split[name] if movie in arrays]
        means[name] = mean_rows(np.load(arrays[movie]).astype(np.float16) for movie in movies)
        labels[name] = np.array([hot[movie] for movie in movies], np.uint8)
    pooled = MeanLinear.fit(means["train"], labels["train"]).predict(means["val"])
    prior = ClassPrior.fit(labels["train"]).predict(len(means["val"]))
    # An independent study of these movies: 0.323 / 0.504 and 0.155 / 0.394.
    assert mean_ap(labels["val"], pooled) == pytest.approx(0.323, abs=0.005)
    assert micro_ap(labels["val"], pooled) == pytest.approx(0.504, abs=0.005)
    assert mean_ap(labels["val"], prior) == pytest.approx(0.155, abs=0.001)
    assert micro_ap(labels["val"], prior) == pytest.approx(0.394, abs=0.001)


def _multi_hot(folder: Path) -> dict[str, list[int]]:
    from sharding.format.plain_pickle import load_pickle

    path = folder / "movie_map.pkl"
    labels: dict[str, list[int]] = load_pickle(path.read_bytes(), str(path))
    return labels


def test_damaged_rows_are_named_not_averaged(make_films: MakeFilms, tmp_path: Path) -> None:
    films = make_films([4, 5], folder=tmp_path)
    (shard,) = tmp_path.glob("*.tar")
    good = films.rows[1].tobytes()
    shard.write_bytes(shard.read_bytes().replace(good, b"\xff" * len(good)))
    with pytest.raises(DataError, match=r"NaN or infinite numbers in the rows of tt0000001; run "):
        read_means(films.features, films.movies)
