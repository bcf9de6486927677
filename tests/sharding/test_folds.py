from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError, DataError
from sharding.labels import Fold, fold_split, parse_fold


def ids(n: int) -> list[str]:
    return [f"tt{k:04d}" for k in range(n)]


@pytest.mark.parametrize("text", ["fold:0/2", "fold:4/5", "fold:09/10"])
def test_a_fold_is_parsed_from_its_text(text: str) -> None:
    number, of = text.removeprefix("fold:").split("/")
    assert parse_fold(text) == Fold(int(number), int(of))
    assert parse_fold("folds/split.json") is None


@pytest.mark.parametrize(
    "text", ["fold:5/5", "fold:0/1", "fold:-1/5", "fold:", "fold:1", "fold:a/b"]
)
def test_an_invalid_fold_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"want fold:K/N with N from 2 and K from 0 to N-1"):
        parse_fold(text)


@pytest.mark.slow
@given(st.integers(2, 7), st.integers(0, 2**32), st.randoms(use_true_random=False))
def test_every_labelled_movie_is_val_in_exactly_one_fold_in_any_order(
    of: int, seed: int, chance: object
) -> None:
    hot_MG = (np.random.default_rng(seed).random((60, 4)) < 0.5).astype(np.uint8)
    labelled = {m for m, hot in zip(ids(60), hot_MG, strict=True) if hot.any()}
    order = list(range(60))
    chance.shuffle(order)  # type: ignore[attr-defined]
    shuffled = [ids(60)[k] for k in order]
    seen: Counter[str] = Counter()
    for number in range(of):
        split = fold_split(ids(60), hot_MG, Fold(number, of))
        assert split == fold_split(shuffled, hot_MG[order], Fold(number, of))
        assert set(split) == labelled
        assert set(split.values()) == {"train", "val"}
        seen.update(movie for movie, name in split.items() if name == "val")
    assert seen == Counter(labelled)


@pytest.mark.slow
@settings(max_examples=20)
@given(st.integers(0, 2**32), st.integers(2, 10))
def test_folds_have_equal_fractions_of_genres_and_movies(seed: int, of: int) -> None:
    generator = np.random.default_rng(seed)
    hot_MG = (generator.random((600, 12)) < generator.uniform(0.02, 0.3, 12)).astype(np.uint8)
    labelled = int(hot_MG.any(axis=1).sum())
    for number in range(of):
        split = fold_split(ids(600), hot_MG, Fold(number, of))
        val = np.array([split.get(movie) == "val" for movie in ids(600)])
        assert abs(val.sum() - labelled / of) <= 0.05 * 600
        assert np.abs(hot_MG[val].sum(axis=0) - hot_MG.sum(axis=0) / of).max() <= 0.05 * 600


def test_folds_are_as_balanced_as_those_of_iterative_stratification() -> None:
    library = pytest.importorskip("iterstrat.ml_stratifiers", reason="no iterative-stratification")
    ours, theirs = [], []
    for seed in range(8):
        generator = np.random.default_rng(seed)
        hot_MG = (generator.random((500, 15)) < generator.uniform(0.01, 0.3, 15)).astype(np.uint8)
        hot_MG = hot_MG[hot_MG.any(axis=1)]
        movies = ids(len(hot_MG))
        for number in range(5):
            split = fold_split(movies, hot_MG, Fold(number, 5))
            ours.append(imbalance(hot_MG, [split[movie] == "val" for movie in movies]))
        folds = library.MultilabelStratifiedKFold(5, shuffle=True, random_state=seed)
        for _, val in folds.split(movies, hot_MG):
            theirs.append(imbalance(hot_MG, np.isin(np.arange(len(movies)), val)))
    assert np.mean(ours) <= 1.2 * np.mean(theirs)


def imbalance(hot_MG: np.ndarray, val: object) -> float:
    """Return the mean deviation of a genre in one of five folds from a fifth, in movies."""
    return float(np.abs(hot_MG[np.array(val)].sum(axis=0) - hot_MG.sum(axis=0) / 5).mean())


def test_folds_are_stable_across_releases() -> None:
    hot_MG = np.eye(3, dtype=np.uint8)[np.arange(12) % 3]
    val = [
        sorted(m for m, name in fold_split(ids(12), hot_MG, Fold(k, 3)).items() if name == "val")
        for k in range(3)
    ]
    assert val == [
        ["tt0002", "tt0003", "tt0004", "tt0009"],
        ["tt0001", "tt0006", "tt0010", "tt0011"],
        ["tt0000", "tt0005", "tt0007", "tt0008"],
    ]


def test_more_folds_than_labelled_movies_are_refused() -> None:
    hot_MG = np.array([[1], [1], [0]], np.uint8)
    with pytest.raises(DataError, match="fold:0/3: got 2 labelled movies, want at least 3"):
        fold_split(ids(3), hot_MG, Fold(0, 3))
