"""Baselines for every model: the class prior, and a linear model on the mean row.

Both are fitted on the movies that the model was trained on. On the published features the linear
model matches the best networks after one second of training, so it is a serious competitor. An
export contains them, so that it is compared with them on any other feature set.

M = movies, N = rows of a movie, D = feature size, G = genres
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import DataError, StateError
from configs.runtime.progress import progress
from sharding.features import FeatureSet, before_extension, open_features, read_rows
from training.row_check import damaged_rows

if TYPE_CHECKING:
    from configs.schema import StorageConfig
    from training.checkpoint import Trained

Positions = NDArray[np.int64]

MEAN_POOL_C = 0.75
"""Inverse strength of the L2 penalty, for means of mean squared length 1. Chosen by
cross-validation inside the train split of the published features, where the mAP is flat around it.
"""

_PRIOR_MOVIES = 1.0
"""Pseudo-count: one imagined movie that has half of each genre. Without it, a genre that is absent
from the train split would have a logit of -inf."""


@dataclass(frozen=True)
class ClassPrior:
    """Predictor that gives every movie the genre frequencies of the train split."""

    logits_G: NDArray[np.float64]

    @classmethod
    def fit(cls, labels_MG: NDArray[np.uint8]) -> ClassPrior:
        """Count the genres of the train movies, ``labels_MG`` uint8 0 or 1."""
        hits_G = labels_MG.sum(axis=0, dtype=np.float64) + _PRIOR_MOVIES / 2
        misses_G = len(labels_MG) + _PRIOR_MOVIES - hits_G
        return cls(np.log(hits_G / misses_G))

    def predict(self, n_movies: int) -> NDArray[np.float64]:
        """Return the same logits for each movie, float64 ``[M, G]``."""
        return np.tile(self.logits_G, (n_movies, 1))


@dataclass(frozen=True)
class MeanLinear:
    """Logistic regression per genre on a movie's mean row."""

    centre_D: NDArray[np.float64]
    scale: float
    weight_DG: NDArray[np.float64]
    bias_G: NDArray[np.float64]

    @classmethod
    def fit(
        cls, means_MD: NDArray[np.float32], labels_MG: NDArray[np.uint8], *, c: float = MEAN_POOL_C
    ) -> MeanLinear:
        """Fit each genre independently.

        The means are centred, then divided by one number for all dimensions so that their mean
        squared length is 1. One ``c`` therefore fits towers of any scale. A divisor per dimension
        costs accuracy. A genre that all or none of the train movies have gets its prior.

        Args:
            means_MD: ``mean_row`` of each train movie.
            labels_MG: Their genres, uint8 0 or 1.
            c: scikit-learn's C, the inverse strength of the penalty.
        """
        centre_D = means_MD.mean(axis=0, dtype=np.float64)
        centred_MD = means_MD - centre_D
        # Identical movies have scale 0.
        scale = float(np.sqrt((centred_MD**2).sum(axis=1).mean())) or 1.0
        weight_DG = np.zeros((means_MD.shape[1], labels_MG.shape[1]))
        bias_G = ClassPrior.fit(labels_MG).logits_G.copy()
        for genre, truth_M in enumerate(labels_MG.T):
            if truth_M.min() != truth_M.max():  # scikit-learn needs both classes
                fitted = _logistic(centred_MD / scale, truth_M, c)
                weight_DG[:, genre], bias_G[genre] = fitted.coef_[0], fitted.intercept_[0]
        return cls(centre_D, scale, weight_DG, bias_G)

    def predict(self, means_MD: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return logits, float64 ``[M, G]``."""
        logits_MG: NDArray[np.float64] = (means_MD - self.centre_D) / self.scale @ self.weight_DG
        return logits_MG + self.bias_G


@dataclass(frozen=True)
class Baselines:
    """Both baselines, fitted on the same movies."""

    prior: ClassPrior
    linear: MeanLinear
    support_G: NDArray[np.int64]
    """Movies of each genre that they were fitted on."""

    movies: int
    """Movies that they were fitted on."""

    @classmethod
    def fit(cls, features: FeatureSet, movies: Positions) -> Baselines:
        """Read the rows of ``movies``, positions in the index and at least one, and fit both."""
        labels_MG = features.labels.hot_MG[movies]
        return cls(
            prior=ClassPrior.fit(labels_MG),
            linear=MeanLinear.fit(read_means(features, movies), labels_MG),
            support_G=labels_MG.sum(axis=0, dtype=np.int64),
            movies=len(movies),
        )

    def to_tree(self) -> dict[str, Any]:
        """Return JSON-like data. Its floats are exact."""
        linear = self.linear
        return {
            "movies": self.movies,
            "support": self.support_G.tolist(),
            "prior": self.prior.logits_G.tolist(),
            "centre": linear.centre_D.tolist(),
            "scale": linear.scale,
            "weight": linear.weight_DG.tolist(),
            "bias": linear.bias_G.tolist(),
        }

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Baselines:
        """Read what ``to_tree`` returned."""
        arrays = {key: np.array(tree[key]) for key in ("prior", "centre", "weight", "bias")}
        return cls(
            prior=ClassPrior(arrays["prior"]),
            linear=MeanLinear(arrays["centre"], tree["scale"], arrays["weight"], arrays["bias"]),
            support_G=np.array(tree["support"], np.int64),
            movies=tree["movies"],
        )


def fit_recorded(trained: Trained, storage: StorageConfig | None = None) -> Baselines:
    """Fit the baselines on the movies of a model, in the feature set that it was trained on.

    Raises:
        MovieNetError: its location is not recorded or cannot be read, or contains other data now.
        OSError: the same.
    """
    if trained.features_url is None:
        raise StateError(f"{trained.where}: does not record where its features are")
    features = open_features(trained.features_url, storage)
    features = before_extension(features, trained.data) or features
    got, where = (features.digest, features.labels.digest), features.storage.location
    if got != (trained.data, trained.labels):
        raise DataError(
            f"{where}: got data {got[0][:12]}, labels {got[1][:12]}, {trained.where} was trained "
            f"on {trained.data[:12]}, {trained.labels[:12]}"
        )
    movies = usable_movies(features, trained.movies.ids)
    if not len(movies):
        raise DataError(f"{where}: contains no labelled movie with rows that it was trained on")
    return Baselines.fit(features, movies)


def usable_movies(features: FeatureSet, ids: Collection[str]) -> Positions:
    """Return the positions of those of these movies that have genres and rows, ascending."""
    is_one_M = np.fromiter(
        (movie in ids for movie in features.movie_ids), bool, len(features.movie_ids)
    )
    usable_M = is_one_M & features.labels.hot_MG.any(axis=1) & (features.index.rows > 0)
    return np.flatnonzero(usable_M).astype(np.int64)


def read_means(features: FeatureSet, movies: Positions) -> NDArray[np.float32]:
    """Read the rows of ``movies`` and return their ``mean_row``, float32 ``[M, D]``.

    Raises:
        DataError: rows are not finite; the message names the movie.
    """
    with progress(len(movies), label="baselines", unit="movies") as bar:

        def rows() -> Iterator[NDArray[np.float16]]:
            for movie in movies:
                rows_ND = read_rows(features, int(movie))
                if not np.isfinite(rows_ND).all():
                    raise damaged_rows(features, [int(movie)])
                yield rows_ND
                bar.advance()

        return mean_rows(rows())


def mean_row(rows_ND: NDArray[np.float16]) -> NDArray[np.float32]:
    """Return the mean of a movie's L2-normalised rows, float32 ``[D]``; zeros if it has no row.

    Zero rows are padding and are ignored. Consecutive equal rows count once.
    """
    rows_ND = rows_ND.astype(np.float32)  # squares overflow in float16
    # Published features repeat rows to fill a fixed length; repeats would outweigh real frames.
    differs_N = np.append(True, (rows_ND[1:] != rows_ND[:-1]).any(axis=1))[: len(rows_ND)]
    norm_N1 = np.linalg.norm(rows_ND, axis=1, keepdims=True)
    used_N = differs_N & (norm_N1[:, 0] > 0)
    if not used_N.any():
        return np.zeros(rows_ND.shape[1], np.float32)
    return np.asarray((rows_ND[used_N] / norm_N1[used_N]).mean(axis=0), dtype=np.float32)


def mean_rows(movies: Iterable[NDArray[np.float16]]) -> NDArray[np.float32]:
    """Return ``mean_row`` of each movie, float32 ``[M, D]``; one movie is in memory at a time."""
    return np.stack([mean_row(rows_ND) for rows_ND in movies])


def _logistic(inputs_MD: NDArray[np.float64], truth_M: NDArray[np.uint8], c: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        # A fit that stops slightly early ranks movies equally well.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=c, max_iter=300).fit(inputs_MD, truth_M)
