"""The order signal of the mini dump survives an untrained image tower with a large margin.

B = movies, T = frames, D = feature size, G = genres.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from eval.intervals import Interval, bootstrap, draw_weights, interval
from sharding.demo import (
    LOOK_GENRES,
    N_MOVIES,
    ORDER_GENRES,
    SPLIT_CYCLE,
    DemoMovie,
    make_movie,
)
from training.models.lstm import MaskedLSTM
from training.models.rows import Moments, RowStatistics

TOWER = Path(__file__).parents[2] / "configs" / "towers" / "demo.json"
GENRES = LOOK_GENRES + ORDER_GENRES
EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY, NOISE = 30, 32, 3e-3, 0.3, 0.2


@dataclass(frozen=True)
class Encoded:
    """Features of all movies of the mini dump."""

    rows: tuple[np.ndarray, ...]
    """float32 ``[T, D]`` per movie; each row has unit length."""

    labels_MG: np.ndarray
    split_M: np.ndarray

    def at(self, split: str) -> np.ndarray:
        return np.flatnonzero(self.split_M == split)

    def shuffled(self) -> Encoded:
        key = np.random.default_rng(7)
        rows = tuple(key.permutation(rows_TD) for rows_TD in self.rows)
        return Encoded(rows, self.labels_MG, self.split_M)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: for tensors of this size more threads are slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def encoded() -> Encoded:
    from open_clip import CLIP

    torch.manual_seed(0)
    tower = CLIP(**json.loads(TOWER.read_text())).eval()
    movies = [make_movie(number) for number in range(N_MOVIES)]
    with torch.inference_mode():
        rows = [nn.functional.normalize(tower.encode_image(pixels(movie))) for movie in movies]
    return Encoded(
        rows=tuple(rows_TD.half().float().numpy() for rows_TD in rows),
        labels_MG=np.array([[genre in movie.genres for genre in GENRES] for movie in movies]),
        split_M=np.array([SPLIT_CYCLE[number % len(SPLIT_CYCLE)] for number in range(N_MOVIES)]),
    )


def pixels(movie: DemoMovie) -> Tensor:
    """Decode, crop the middle square, resize to 32 and normalise, as OpenCLIP does."""
    frames = np.stack([simplejpeg.decode_jpeg(jpeg) for jpeg in movie.jpegs.values()])
    square = torch.from_numpy(frames).permute(0, 3, 1, 2).float()[..., 8:56] / 255
    small = nn.functional.interpolate(square, (32, 32), mode="bicubic", antialias=True)
    mean, std = torch.tensor([[0.481, 0.458, 0.408], [0.269, 0.261, 0.276]])[..., None, None]
    normal: Tensor = (small.clamp(0, 1) - mean) / std
    return normal


def mean_ap(labels_MG: np.ndarray, scores_MG: np.ndarray) -> float:
    pairs = zip(labels_MG.T, scores_MG.T, strict=True)
    return float(np.mean([average_precision_score(labels, scores) for labels, scores in pairs]))


def lead(labels_MG: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> tuple[float, Interval]:
    """Return the difference in mAP and its paired interval over movies."""
    weights = draw_weights(len(labels_MG), 1000, seed=0)
    draws = bootstrap(labels_MG, ours, weights).mean_ap_R
    draws = draws - bootstrap(labels_MG, theirs, weights).mean_ap_R
    difference = mean_ap(labels_MG, ours) - mean_ap(labels_MG, theirs)
    bounds = interval(difference, draws, movies=len(labels_MG), bounded=False)
    assert bounds
    return difference, bounds


def mean_pool_scores(encoded: Encoded) -> np.ndarray:
    """Return the scores of a logistic regression on centred mean rows with one global scale."""
    mean_MD = np.stack([rows_TD.mean(0) for rows_TD in encoded.rows])
    train = encoded.at("train")
    all_rows = np.concatenate([encoded.rows[i] for i in train])
    scaled_MD = (mean_MD - all_rows.mean(0)) / (all_rows - all_rows.mean(0)).std()
    columns = [
        LogisticRegression(C=1.0, max_iter=5000)
        .fit(scaled_MD[train], labels_M[train])
        .decision_function(scaled_MD[encoded.at("val")])
        for labels_M in encoded.labels_MG.T
    ]
    return np.stack(columns, axis=1)


def lstm_scores(encoded: Encoded, *, seed: int = 0) -> np.ndarray:
    """Train the demo's model on train; return its logits on val."""
    torch.manual_seed(seed)
    train = encoded.at("train")
    features_MTD, mask_MT = padded(encoded.rows)
    labels_MG = torch.from_numpy(encoded.labels_MG).float()
    real = features_MTD[train][mask_MT[train]]
    moments = Moments(real.mean(0), float((real - real.mean(0)).square().mean().sqrt()))
    model = MaskedLSTM(
        dim=real.shape[1],
        prior=labels_MG[train].mean(0),
        rows=RowStatistics(moments, moments),
        dropout=0.3,
        input_dropout=0.1,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for _ in range(EPOCHS):
        order = train[torch.randperm(len(train)).numpy()]
        for first in range(0, len(train), BATCH):
            batch = order[first : first + BATCH]
            noise = NOISE * moments.scale * torch.randn_like(features_MTD[batch])
            logits = model(features_MTD[batch] + noise, mask_MT[batch])
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels_MG[batch])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    model.eval()
    val = encoded.at("val")
    with torch.inference_mode():
        scores: np.ndarray = model(features_MTD[val], mask_MT[val]).numpy()
    return scores


def padded(rows: tuple[np.ndarray, ...]) -> tuple[Tensor, Tensor]:
    """Return ``[M, T, D]`` and its mask ``[M, T]``."""
    tensors = [torch.from_numpy(rows_TD) for rows_TD in rows]
    features_MTD = nn.utils.rnn.pad_sequence(tensors, batch_first=True)
    lengths_M1 = torch.tensor([[len(rows_TD)] for rows_TD in rows])
    return features_MTD, torch.arange(features_MTD.shape[1]) < lengths_M1


@pytest.mark.slow
def test_the_mean_frame_predicts_look_genres_but_not_order_genres(encoded: Encoded) -> None:
    labels_MG, scores_MG = encoded.labels_MG[encoded.at("val")], mean_pool_scores(encoded)
    n_looks = len(LOOK_GENRES)
    prior = labels_MG[:, n_looks:].mean()
    assert mean_ap(labels_MG[:, :n_looks], scores_MG[:, :n_looks]) > 0.97
    assert mean_ap(labels_MG[:, n_looks:], scores_MG[:, n_looks:]) < prior + 0.08


@pytest.mark.slow
def test_a_sequence_model_leads_by_a_large_margin(encoded: Encoded) -> None:
    labels_MG, scores_MG = encoded.labels_MG[encoded.at("val")], lstm_scores(encoded)
    difference, bounds = lead(labels_MG, scores_MG, mean_pool_scores(encoded))
    assert difference > 0.15
    assert bounds.low > 0.05
    assert mean_ap(labels_MG, scores_MG) > labels_MG.mean() + 0.35


@pytest.mark.slow
def test_a_sequence_model_on_shuffled_frames_has_no_lead(encoded: Encoded) -> None:
    labels_MG, shuffled = encoded.labels_MG[encoded.at("val")], encoded.shuffled()
    difference, bounds = lead(labels_MG, lstm_scores(shuffled), mean_pool_scores(shuffled))
    assert difference < 0.02 or bounds.low < 0
    assert difference < 0.05
