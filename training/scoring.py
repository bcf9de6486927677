"""Scores of the movies of a split, each scored once, by windows or complete, on any world size.

M = movies, K = windows of a movie, G = genres, B = windows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from configs.errors import ConfigError, DataError
from configs.runtime.hints import hint
from training.metrics import genre_aps, mean_of, micro_ap
from training.registry import fixed_frames
from training.stream.reader import never

if TYPE_CHECKING:
    from configs.runtime.launch import DistributedContext
    from sharding.features import FeatureSet
    from sharding.storage.base import RangeReader
    from training.stream.batch import Batch
    from training.stream.view import View


@dataclass(frozen=True)
class Scores:
    """Predictions of a model, with the labels of the same movies."""

    movie_id: tuple[str, ...]
    """Movies, in the order of the feature index."""

    genres: tuple[str, ...]
    """Names of the columns."""

    logits_MG: NDArray[np.float32]
    """Mean over the movie's windows."""

    labels_MG: NDArray[np.uint8]
    """0 or 1."""

    split: str
    """Split of the labels that contains all these movies; empty if they are in several."""

    @property
    def probabilities_MG(self) -> NDArray[np.float64]:  # noqa: N802  # axes, as in the fields
        """Sigmoid of the logits."""
        return 1 / (1 + np.exp(-self.logits_MG.astype(np.float64)))

    @cached_property
    def aps_G(self) -> tuple[float, ...]:  # noqa: N802
        """Average precision of each genre; nan if no movie has it."""
        return genre_aps(self.labels_MG, self.probabilities_MG)

    def summary(self) -> dict[str, float]:
        """Return ``map`` and ``micro_ap``."""
        return {
            "map": mean_of(self.aps_G),
            "micro_ap": micro_ap(self.labels_MG, self.probabilities_MG),
        }


def score_split(
    model: torch.nn.Module,
    features: FeatureSet,
    movies: NDArray[np.int64],
    view: View,
    *,
    batch_size: int,
    distributed: DistributedContext,
    source: RangeReader | None = None,
    give_up: Callable[[], bool] = never,
) -> Scores:
    """Score movies. All ranks call this function, and each receives all scores.

    Args:
        model: On ``distributed.device``. It is in evaluation mode during the call.
        features: Feature set.
        movies: int64 ``[M]``, positions in its index, each once.
        view: Windows that the model receives of each movie.
        batch_size: Windows per forward pass and rank. Batches of complete movies contain at most
            65,536 rows.
        distributed: The ranks.
        source: Reader of the rows; default: the storage of ``features``.
        give_up: Asked while a batch is late; True ends the wait with ``AbandonedError``.

    Returns:
        Scores with the mean of the logits over windows. Windows are summed in their order, so the
        world size affects scores only through the rounding of differently composed batches.

    Raises:
        ConfigError: the view has complete movies and the model accepts one window length only.
        DataError: logits are not finite; the message names the movies.
    """
    from training.stream.loader import score_batches

    _check_length(model, view)
    movies = np.sort(movies)  # scores have the order of the index, whatever order was passed
    sums = _WindowLogits(movies, view.windows, len(features.labels.genres))
    batches = score_batches(
        features,
        movies,
        view,
        batch_size=batch_size,
        world=distributed.world,
        source=source,
        give_up=give_up,
    )
    _add_logits(model, batches, sums, distributed)
    logits_MG = sums.mean()
    _check_finite(features, movies, logits_MG)
    splits = set(features.labels.split_M[movies].tolist())
    return Scores(
        movie_id=tuple(features.movie_ids[movie] for movie in movies),
        genres=tuple(features.labels.genres),
        logits_MG=logits_MG,
        labels_MG=features.labels.hot_MG[movies],
        split=splits.pop() if len(splits) == 1 else "",
    )


def _check_length(model: torch.nn.Module, view: View) -> None:
    only = fixed_frames(model)
    if view.frames is None and only is not None:
        name = type(model).__name__
        raise ConfigError(
            f"eval.windows: got complete movies, but {name} accepts windows of {only} rows only; "
            "want a number of windows"
        )


def _check_finite(
    features: FeatureSet, movies: NDArray[np.int64], logits_MG: NDArray[np.float32]
) -> None:
    bad = [features.movie_ids[movie] for movie in movies[~np.isfinite(logits_MG).all(axis=1)]]
    if bad:
        raise DataError(
            f"{features.storage.location}: {len(bad)} of {len(movies)} movies have logits that are "
            f"not finite ({', '.join(bad[:3])}{', …' if bad[3:] else ''}): their features contain "
            "nan or inf, or the model has diverged; run "
            f"{hint('movienet-encode verify')}, or lower training.lr"
        )


def _add_logits(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    sums: _WindowLogits,
    distributed: DistributedContext,
) -> None:
    """Run the model over this rank's batches and add the logits of all ranks to ``sums``."""
    was_training, device = model.training, distributed.device
    model.eval()
    with torch.no_grad():
        for batch in batches:
            logits_BG = model(batch.features.to(device).float(), batch.mask.to(device)).float()
            keys_B3 = torch.stack(
                [batch.movie, batch.window_index, (batch.weight > 0).long()], dim=1
            )
            sums.add(
                distributed.all_gather(logits_BG).cpu(),
                distributed.all_gather(keys_B3.to(device)).cpu(),
            )
    model.train(was_training)


class _WindowLogits:
    """One slot for the logits of each window, so that the mean does not depend on arrival order."""

    def __init__(self, movies: NDArray[np.int64], windows: int, n_genres: int) -> None:
        self._movies = movies
        self._logits_MKG = np.zeros((len(movies), windows, n_genres), np.float32)
        self._seen_MK = np.zeros((len(movies), windows), bool)

    def add(self, logits_BG: torch.Tensor, keys_B3: torch.Tensor) -> None:
        movie_B, index_B, real_B = keys_B3.numpy().T
        real_B = real_B.astype(bool)
        row = np.searchsorted(self._movies, movie_B[real_B])  # movies are sorted
        self._logits_MKG[row, index_B[real_B]] = logits_BG.numpy()[real_B]
        self._seen_MK[row, index_B[real_B]] = True

    def mean(self) -> NDArray[np.float32]:
        if not self._seen_MK.any(axis=1).all():
            raise AssertionError("a movie has no scored window")
        # Short movies have fewer windows than K; their unused slots are zero.
        n_windows_M1 = self._seen_MK.sum(axis=1, keepdims=True)
        mean_MG: NDArray[np.float32] = self._logits_MKG.sum(axis=1) / n_windows_M1
        return mean_MG.astype(np.float32)
