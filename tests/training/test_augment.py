"""Augmentation depends on the window, not on its rank or batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from training.augment import Augment
from training.stream.batch import Batch

FRAMES, DIM = 5, 64


def windows(n: int, *, epoch: int = 0, frames: int = FRAMES) -> Batch:
    """Return windows of different movies; every third one has two rows."""
    torch.manual_seed(0)
    mask = torch.ones(n, frames, dtype=torch.bool)
    mask[::3, 2:] = False
    return Batch(
        features=torch.randn(n, frames, DIM) * mask.unsqueeze(-1),
        mask=mask,
        labels=torch.eye(3)[torch.arange(n) % 3],
        weight=torch.ones(n),
        movie=torch.arange(n) * 7,
        start=torch.zeros(n, dtype=torch.int64),
        window_index=torch.arange(n) % 2,
        epoch=epoch,
        step=0,
        micro=0,
        last_micro=True,
        global_weight=float(n),
    )


def select(batch: Batch, chosen: list[int]) -> Batch:
    """Return the windows at these positions, with their partners."""
    index = torch.tensor(chosen)
    names = ("features", "mask", "labels", "weight", "movie", "start", "window_index")
    tensors = {name: getattr(batch, name)[index] for name in names}
    partner = select(batch.partner, chosen) if batch.partner else None
    return replace(batch, partner=partner, **tensors)


def paired(n: int, **keys: int) -> Batch:
    """Return windows whose mixup partners are the windows of the previous movies."""
    batch = windows(n, **keys)
    return replace(batch, partner=select(batch, [(number - 1) % n for number in range(n)]))


@given(st.permutations(range(9)), st.integers(1, 8))
def test_augmentation_of_a_window_does_not_depend_on_its_batch(
    order: list[int], split: int
) -> None:
    augment = Augment(
        seed=3,
        noise=0.5,
        frame_dropout=0.4,
        feature_dropout=0.2,
        mean_D=torch.zeros(DIM),
        mixup=0.4,
    )
    batch = paired(9, epoch=2)
    together = augment(batch)
    for chosen in (order[:split], order[split:]):
        for got, want in zip(augment(select(batch, chosen)), together, strict=True):
            assert torch.equal(got, want[torch.tensor(chosen)])


def test_augmentation_depends_on_seed_epoch_movie_and_window_index() -> None:
    batch = windows(1)
    outputs = [
        augment(changed)[0]
        for augment in (Augment(0, noise=1.0), Augment(1, noise=1.0))
        for changed in (
            batch,
            replace(batch, epoch=1),
            replace(batch, movie=batch.movie + 1),
            replace(batch, window_index=batch.window_index + 1),
        )
    ]
    assert len({tensor.sum().item() for tensor in outputs}) == 8


def test_noise_has_the_configured_standard_deviation() -> None:
    batch = windows(200)
    noise = Augment(seed=0, noise=0.25)(batch)[0] - batch.features
    assert abs(noise.mean().item()) < 0.01
    assert abs(noise.std().item() - 0.25) < 0.01


@given(st.floats(0, 1), st.integers(0, 50))
def test_frame_dropout_keeps_at_least_one_real_frame_and_adds_none(
    probability: float, epoch: int
) -> None:
    batch = windows(9, epoch=epoch)
    _, mask, _ = Augment(seed=0, frame_dropout=probability)(batch)
    assert mask.any(1).all()
    assert not (mask & ~batch.mask).any()


def test_frame_dropout_masks_about_the_configured_share_of_frames() -> None:
    batch = windows(2000)
    _, mask, _ = Augment(seed=0, frame_dropout=0.3)(batch)
    long = batch.mask.all(1)
    assert abs(mask[long].float().mean().item() - 0.7) < 0.02


def test_feature_dropout_replaces_about_the_configured_share_by_the_mean_in_all_rows() -> None:
    batch, mean = windows(200), torch.linspace(5, 6, DIM)
    features, mask, _ = Augment(seed=0, feature_dropout=0.3, mean_D=mean)(batch)
    replaced = features == mean
    assert (replaced.all(1) == replaced.any(1)).all()
    assert abs(replaced.float().mean().item() - 0.3) < 0.02
    assert torch.equal(features[~replaced], batch.features[~replaced])
    assert torch.equal(mask, batch.mask)


def test_mixup_mixes_rows_and_labels_with_the_same_weight() -> None:
    batch = paired(300)
    features, mask, labels = Augment(seed=0, mixup=0.4)(batch)
    partner = batch.partner
    assert partner is not None
    assert mask is batch.mask
    weight = labels.gather(1, batch.labels.argmax(1, keepdim=True))[:, 0]
    for window in (1, 2, 4):  # five rows each; the partners have two, five and two
        other = partner.features[window][resampled_rows(partner.mask[window])]
        want = weight[window] * batch.features[window] + (1 - weight[window]) * other
        torch.testing.assert_close(features[window], want)
    assert torch.allclose(labels.sum(1), torch.ones(300))
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2a + 1)).
    assert weight.mean().item() == pytest.approx(0.5, abs=0.06)
    assert weight.var().item() == pytest.approx(1 / (4 * 1.8), abs=0.03)


def test_mixup_with_a_long_window_does_not_lengthen_a_short_one() -> None:
    batch = paired(9)
    features, mask, _ = Augment(seed=0, mixup=1.0)(batch)
    assert mask[3].tolist() == [True, True, False, False, False]
    assert not features[3, 2:].any()


def resampled_rows(mask: Tensor) -> list[int]:
    """Return the rows of a partner that are mixed with the five rows of a window."""
    length = int(mask.sum())
    return [row * length // FRAMES for row in range(FRAMES)]


def test_without_augmentation_tensors_are_not_copied() -> None:
    batch = windows(2)
    features, mask, labels = Augment(seed=0)(batch)
    assert features is batch.features
    assert mask is batch.mask
    assert labels is batch.labels
