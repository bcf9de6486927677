"""Augmentation belongs to a window, not to the rank or batch in which it lies."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from training.augment import Augment
from training.keys import mix, seed_of

FRAMES, DIM = 5, 64
KEY_0_1_2 = 3384391416029321617


def windows(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    mask = torch.ones(n, FRAMES, dtype=torch.bool)
    mask[::3, 2:] = False
    return torch.randn(n, FRAMES, DIM), mask, torch.arange(n) * 7, torch.arange(n) % 2


@given(st.permutations(range(9)), st.integers(1, 8))
def test_a_window_is_augmented_alike_wherever_it_lies(order: list[int], cut: int) -> None:
    augment = Augment(
        seed=3, noise=0.5, hide_frames=0.4, drop_features=0.2, mean_D=torch.zeros(DIM)
    )
    features, mask, movie, visit = windows(9)
    whole = augment(features, mask, epoch=2, movie_B=movie, visit_B=visit)
    for some in (torch.tensor(order[:cut]), torch.tensor(order[cut:])):
        got = augment(features[some], mask[some], epoch=2, movie_B=movie[some], visit_B=visit[some])
        torch.testing.assert_close(got[0], whole[0][some], rtol=0, atol=0)
        assert (got[1] == whole[1][some]).all()


def test_seed_epoch_movie_and_visit_each_change_it() -> None:
    features, mask, movie, visit = windows(1)
    seen = [
        Augment(seed, noise=1.0)(features, mask, epoch=epoch, movie_B=movie + m, visit_B=visit + k)[
            0
        ]
        for seed, epoch, m, k in [
            (0, 0, 0, 0),
            (1, 0, 0, 0),
            (0, 1, 0, 0),
            (0, 0, 1, 0),
            (0, 0, 0, 1),
        ]
    ]
    assert len({tensor.sum().item() for tensor in seen}) == 5


def test_noise_has_the_standard_deviation_asked_for() -> None:
    features, mask, movie, visit = windows(200)
    noisy, _ = Augment(seed=0, noise=0.25)(features, mask, epoch=0, movie_B=movie, visit_B=visit)
    noise = noisy - features
    assert abs(noise.mean().item()) < 0.01
    assert abs(noise.std().item() - 0.25) < 0.01


@given(st.floats(0, 1), st.integers(0, 50))
def test_a_movie_always_keeps_a_real_frame_and_gains_none(chance: float, epoch: int) -> None:
    features, mask, movie, visit = windows(9)
    _, kept = Augment(seed=0, hide_frames=chance)(
        features, mask, epoch=epoch, movie_B=movie, visit_B=visit
    )
    assert kept.any(1).all()
    assert not (kept & ~mask).any()


def test_about_the_wanted_share_of_frames_is_hidden() -> None:
    mask = torch.ones(2000, FRAMES, dtype=torch.bool)
    number = torch.arange(2000)
    _, kept = Augment(seed=0, hide_frames=0.3)(
        torch.zeros(2000, FRAMES, 1), mask, epoch=0, movie_B=number, visit_B=number * 0
    )
    assert abs(kept.float().mean().item() - 0.7) < 0.02


def test_about_the_wanted_share_of_features_becomes_the_mean_in_all_rows() -> None:
    features, mask, movie, visit = windows(200)
    mean = torch.linspace(5, 6, DIM)
    dropped, kept = Augment(seed=0, drop_features=0.3, mean_D=mean)(
        features, mask, epoch=0, movie_B=movie, visit_B=visit
    )
    replaced = dropped == mean
    assert (replaced.all(1) == replaced.any(1)).all()
    assert abs(replaced.float().mean().item() - 0.3) < 0.02
    torch.testing.assert_close(dropped[~replaced], features[~replaced], rtol=0, atol=0)
    assert kept is mask or (kept == mask).all()


def test_without_augmentation_nothing_is_copied() -> None:
    features, mask, movie, visit = windows(2)
    got = Augment(seed=0)(features, mask, epoch=0, movie_B=movie, visit_B=visit)
    assert got[0] is features
    assert got[1] is mask


def test_keys_do_not_meet_where_their_sums_do() -> None:
    keys = {
        seed_of(seed, epoch, movie) for seed in range(8) for epoch in range(8) for movie in range(8)
    }
    assert len(keys) == 512


def test_a_key_of_arrays_is_that_of_each_element() -> None:
    movies = torch.arange(5).numpy()
    assert mix(1, 2, movies).tolist() == [int(mix(1, 2, int(movie))) for movie in movies]


def test_keys_never_change() -> None:
    assert seed_of(0, 1, 2) == KEY_0_1_2
