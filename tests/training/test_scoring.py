"""Each movie is scored once, by the mean over its evenly spaced windows."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from configs.errors import ConfigError, DataError
from configs.runtime.launch import DistributedContext, start
from training.metrics import genre_aps, mean_ap, micro_ap
from training.models.lstm import MaskedLSTM, OriginalLSTM
from training.models.rows import RowStatistics
from training.models.transformer import Transformer
from training.scoring import score_split
from training.stream.view import View


class Sums(nn.Module):
    """Model with simple logits: sums of the first three features over the real rows."""

    def forward(self, features_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        assert not self.training
        return (features_BTD * mask_BT.unsqueeze(-1)).sum(1)[:, :3]


@pytest.fixture
def distributed() -> Iterator[DistributedContext]:
    distributed = start(device="cpu", precision="fp32", accumulation=1, expected_world_size=1)
    yield distributed
    distributed.close()


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_scores_are_means_over_windows_from_first_to_last_row(
    make_films: Callable[..., object], distributed: DistributedContext, batch_size: int
) -> None:
    films = make_films([3, 10, 5, 4])
    scores = score_split(
        Sums().train(),
        films.features,  # type: ignore[attr-defined]
        np.array([3, 0, 1]),
        View(frames=4, windows=3),
        batch_size=batch_size,
        distributed=distributed,
    )
    assert scores.movie_id == ("tt0000000", "tt0000001", "tt0000003")
    rows = [movie.astype(np.float32)[:, :3] for movie in films.rows]  # type: ignore[attr-defined]
    long = np.mean([rows[1][start : start + 4].sum(0) for start in (0, 3, 6)], axis=0)
    want = np.stack([rows[0].sum(0), long, rows[3].sum(0)])
    np.testing.assert_allclose(scores.logits_MG, want, rtol=1e-5, atol=1e-5)
    assert scores.labels_MG.tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0]]
    assert scores.split == "train"


class Logarithms(nn.Module):
    """Model whose logits are nan for a movie with a negative sum, like those of a diverged run."""

    def forward(self, features_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        return (features_BTD * mask_BT.unsqueeze(-1)).sum(1)[:, :3].sum(1, keepdim=True).log()


def test_scores_that_are_not_finite_are_one_line_with_the_movies(
    make_films: Callable[..., object], distributed: DistributedContext
) -> None:
    films = make_films([3, 10, 5, 4])
    sums = [float(rows.astype(np.float32)[:, :3].sum()) for rows in films.rows]  # type: ignore[attr-defined]
    bad = [f"tt{number:07d}" for number, value in enumerate(sums) if value < 0]
    assert 0 < len(bad) < 4
    with pytest.raises(
        DataError, match=rf"{len(bad)} of 4 movies have logits that are not finite \({bad[0]}"
    ):
        score_split(
            Logarithms(),
            films.features,  # type: ignore[attr-defined]
            np.arange(4),
            View(frames=None),
            batch_size=2,
            distributed=distributed,
        )


def test_scoring_restores_training_mode(
    make_films: Callable[..., object], distributed: DistributedContext
) -> None:
    films, model = make_films([3]), Sums().train()
    score_split(
        model,
        films.features,  # type: ignore[attr-defined]
        np.array([0]),
        View(frames=4),
        batch_size=1,
        distributed=distributed,
    )
    assert model.training


def test_the_summary_has_the_metrics_of_the_probabilities(
    make_films: Callable[..., object], distributed: DistributedContext
) -> None:
    scores = score_split(
        Sums(),
        make_films([3, 10, 5, 4, 7, 2]).features,  # type: ignore[attr-defined]
        np.arange(5),
        View(frames=4, windows=2),
        batch_size=4,
        distributed=distributed,
    )
    truth = (scores.labels_MG, scores.probabilities_MG)
    assert scores.summary() == {"map": mean_ap(*truth), "micro_ap": micro_ap(*truth)}
    assert scores.aps_G == genre_aps(*truth)


def test_complete_movies_are_scored_from_the_first_row_to_the_last(
    make_films: Callable[..., object], distributed: DistributedContext
) -> None:
    films = make_films([3, 10, 5, 40])
    arguments = {"batch_size": 2, "distributed": distributed}
    complete = score_split(Sums(), films.features, np.arange(4), View(frames=None), **arguments)  # type: ignore[attr-defined, arg-type]
    rows = [movie.astype(np.float32)[:, :3].sum(0) for movie in films.rows]  # type: ignore[attr-defined]
    np.testing.assert_allclose(complete.logits_MG, rows, rtol=1e-4, atol=1e-4)
    halves = View(frames=None, windows=2, stride=2)  # every frame, in one of the two phases
    strided = score_split(Sums(), films.features, np.arange(4), halves, **arguments)  # type: ignore[attr-defined, arg-type]
    np.testing.assert_allclose(2 * strided.logits_MG, rows, rtol=1e-4, atol=1e-4)


def test_complete_movies_are_refused_for_a_model_of_fixed_length(
    make_films: Callable[..., object], distributed: DistributedContext
) -> None:
    model = OriginalLSTM(dim=8, genres=3, frames=4, hidden=4)
    with pytest.raises(ConfigError, match="OriginalLSTM accepts windows of 4 rows only"):
        score_split(
            model,
            make_films([9]).features,  # type: ignore[attr-defined]
            np.arange(1),
            View(frames=None),
            batch_size=1,
            distributed=distributed,
        )


@pytest.mark.slow
@pytest.mark.parametrize("cls", [MaskedLSTM, Transformer])
def test_a_complete_movie_of_12000_frames_is_scored_in_little_memory(
    make_films: Callable[..., object], distributed: DistributedContext, cls: type[nn.Module]
) -> None:
    films = make_films([12_000, 7])
    extra = {"frames": 256} if cls is Transformer else {}
    model = cls(dim=8, prior=torch.full((3,), 0.5), rows=RowStatistics.neutral(8), **extra)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scores = score_split(
        model,
        films.features,  # type: ignore[attr-defined]
        np.arange(2),
        View(frames=None),
        batch_size=64,
        distributed=distributed,
    )
    assert np.isfinite(scores.logits_MG).all()
    # One [3000, 3000] matrix of attention for each of four heads would be 144 MB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
