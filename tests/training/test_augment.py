"""Augmentation belongs to a window, not to the rank or batch in which it lies."""

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
    """Windows of different movies, every third of them two rows long."""
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


def some(batch: Batch, chosen: list[int]) -> Batch:
    """The windows of these numbers, partners included."""
    index = torch.tensor(chosen)
    names = ("features", "mask", "labels", "weight", "movie", "start", "window_index")
    parts = {name: getattr(batch, name)[index] for name in names}
    partner = some(batch.partner, chosen) if batch.partner else None
    return replace(batch, partner=partner, **parts)


def paired(n: int, **keys: int) -> Batch:
    """Windows, and beside each one of the movie before."""
    batch = windows(n, **keys)
    return replace(batch, partner=some(batch, [(number - 1) % n for number in range(n)]))


@given(st.permutations(range(9)), st.integers(1, 8))
def test_a_window_is_augmented_alike_wherever_it_lies(order: list[int], cut: int) -> None:
    augment = Augment(
        seed=3, noise=0.5, hide_frames=0.4, drop_features=0.2, mean_D=torch.zeros(DIM), mixup=0.4
    )
    batch = paired(9, epoch=2)
    whole = augment(batch)
    for chosen in (order[:cut], order[cut:]):
        for got, want in zip(augment(some(batch, chosen)), whole, strict=True):
            assert torch.equal(got, want[torch.tensor(chosen)])


def test_seed_epoch_movie_and_visit_each_change_it() -> None:
    batch = windows(1)
    seen = [
        augment(changed)[0]
        for augment in (Augment(0, noise=1.0), Augment(1, noise=1.0))
        for changed in (
            batch,
            replace(batch, epoch=1),
            replace(batch, movie=batch.movie + 1),
            replace(batch, window_index=batch.window_index + 1),
        )
    ]
    assert len({tensor.sum().item() for tensor in seen}) == 8


def test_noise_has_the_standard_deviation_asked_for() -> None:
    batch = windows(200)
    noise = Augment(seed=0, noise=0.25)(batch)[0] - batch.features
    assert abs(noise.mean().item()) < 0.01
    assert abs(noise.std().item() - 0.25) < 0.01


@given(st.floats(0, 1), st.integers(0, 50))
def test_a_movie_always_keeps_a_real_frame_and_gains_none(chance: float, epoch: int) -> None:
    batch = windows(9, epoch=epoch)
    _, kept, _ = Augment(seed=0, hide_frames=chance)(batch)
    assert kept.any(1).all()
    assert not (kept & ~batch.mask).any()


def test_about_the_wanted_share_of_frames_is_hidden() -> None:
    batch = windows(2000)
    _, kept, _ = Augment(seed=0, hide_frames=0.3)(batch)
    long = batch.mask.all(1)
    assert abs(kept[long].float().mean().item() - 0.7) < 0.02


def test_about_the_wanted_share_of_features_becomes_the_mean_in_all_rows() -> None:
    batch, mean = windows(200), torch.linspace(5, 6, DIM)
    dropped, kept, _ = Augment(seed=0, drop_features=0.3, mean_D=mean)(batch)
    replaced = dropped == mean
    assert (replaced.all(1) == replaced.any(1)).all()
    assert abs(replaced.float().mean().item() - 0.3) < 0.02
    assert torch.equal(dropped[~replaced], batch.features[~replaced])
    assert torch.equal(kept, batch.mask)


def test_mixup_mixes_rows_and_labels_by_one_share() -> None:
    batch = paired(300)
    features, mask, labels = Augment(seed=0, mixup=0.4)(batch)
    partner = batch.partner
    assert partner is not None
    assert mask is batch.mask
    share = labels.gather(1, batch.labels.argmax(1, keepdim=True))[:, 0]
    for window in (1, 2, 4):  # five rows each; the partners' are five, five and two
        other = partner.features[window][stretched(partner.mask[window])]
        want = share[window] * batch.features[window] + (1 - share[window]) * other
        torch.testing.assert_close(features[window], want)
    assert torch.allclose(labels.sum(1), torch.ones(300))
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2a + 1)).
    assert share.mean().item() == pytest.approx(0.5, abs=0.06)
    assert share.var().item() == pytest.approx(1 / (4 * 1.8), abs=0.03)


def test_a_short_window_stays_short_when_it_is_mixed_with_a_long_one() -> None:
    batch = paired(9)
    features, mask, _ = Augment(seed=0, mixup=1.0)(batch)
    assert mask[3].tolist() == [True, True, False, False, False]
    assert not features[3, 2:].any()


def stretched(mask: Tensor) -> list[int]:
    """Rows of a partner beside five rows of a window."""
    length = int(mask.sum())
    return [row * length // FRAMES for row in range(FRAMES)]


def test_without_augmentation_nothing_is_copied() -> None:
    batch = windows(2)
    features, mask, labels = Augment(seed=0)(batch)
    assert features is batch.features
    assert mask is batch.mask
    assert labels is batch.labels
