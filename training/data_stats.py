"""Statistics of the data that a model is built from: sizes, class prior, moments of the rows.

They are measured once, at the start of a run, and stored in its checkpoints. A resumed or loaded
model is built from the same values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from training.models.rows import Moments, RowStatistics
from training.row_check import check_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sharding.features import FeatureSet

MOST_MOVIES = 4096
"""Upper limit of movies whose middle window is read; a larger set is sampled evenly."""


@dataclass(frozen=True)
class DataStats:
    """Arguments that a model's constructor may request by name."""

    dim: int
    """Feature size."""

    genres: int
    """Number of genres, and of outputs."""

    frames: int
    """Rows of a window."""

    prior: Tensor
    """float32 ``[G]``: share of train movies with each genre."""

    rows: RowStatistics
    """Statistics of the train movies' rows."""

    @classmethod
    def neutral(cls, *, dim: int, n_genres: int, frames: int) -> DataStats:
        """Return placeholders for building a model without data, for example to list it."""
        prior = torch.full((n_genres,), 0.5)
        return cls(dim, n_genres, frames, prior, RowStatistics.neutral(dim))

    def arguments(self) -> dict[str, Any]:
        """Return the fields by name."""
        return {name: getattr(self, name) for name in ("dim", "genres", "frames", "prior", "rows")}

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields as tensors, for a checkpoint."""
        raw, unit = self.rows.raw, self.rows.unit
        return {
            "frames": torch.tensor(self.frames),
            "prior": self.prior,
            "raw.mean": raw.mean_D,
            # float64: a float of Python survives the round trip bit by bit.
            "raw.scale": torch.tensor(raw.scale, dtype=torch.float64),
            "unit.mean": unit.mean_D,
            "unit.scale": torch.tensor(unit.scale, dtype=torch.float64),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> DataStats:
        """Return the statistics that ``tensors`` has serialized."""
        prior, mean_D = tensors["prior"], tensors["raw.mean"]
        raw = Moments(mean_D, tensors["raw.scale"].item())
        unit = Moments(tensors["unit.mean"], tensors["unit.scale"].item())
        frames = int(tensors["frames"].item())
        return cls(len(mean_D), len(prior), frames, prior, RowStatistics(raw, unit))


def measure(features: FeatureSet, movies: NDArray[np.int64], *, frames: int) -> DataStats:
    """Measure the train movies. Every rank reads the same windows and obtains the same values.

    Args:
        features: Feature set.
        movies: Positions of the train movies in its index.
        frames: Rows of a window.

    Raises:
        DataError: rows are not finite; the message names the movies.
    """
    from training.stream.loader import score_batches
    from training.stream.view import View

    sample = movies[np.linspace(0, len(movies) - 1, min(len(movies), MOST_MOVIES)).astype(np.int64)]
    raw, unit = _Sums(features.dim), _Sums(features.dim)
    for batch in score_batches(features, sample, View(frames), batch_size=64):
        check_rows(features, batch)
        # Neither padding rows nor the windows that fill up the last batch.
        real_BT = batch.mask & (batch.weight > 0).unsqueeze(1)
        rows_ND = batch.features[real_BT].double()
        raw.add(rows_ND)
        unit.add(torch.nn.functional.normalize(rows_ND, dim=-1, eps=1e-6))
    prior = torch.from_numpy(features.labels.hot_MG[movies].mean(0, dtype=np.float64)).float()
    rows = RowStatistics(raw.moments(), unit.moments())
    return DataStats(features.dim, len(prior), frames, prior, rows)


class _Sums:
    """Running sums in float64, from which the moments are computed."""

    def __init__(self, dim: int) -> None:
        self._n = 0
        self._sum_D = torch.zeros(dim, dtype=torch.float64)
        self._squares = 0.0

    def add(self, rows_ND: Tensor) -> None:
        self._n += len(rows_ND)
        self._sum_D += rows_ND.sum(0)
        self._squares += rows_ND.square().sum().item()

    def moments(self) -> Moments:
        mean_D = self._sum_D / max(1, self._n)
        # Total variance as E|x|² - |E x|²; the max below guards against rounding.
        square = self._squares / max(1, self._n) - mean_D.square().sum().item()
        scale = max(square / len(mean_D), 0.0) ** 0.5
        return Moments(mean_D.float(), scale or 1.0)
