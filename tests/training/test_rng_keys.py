"""Random keys are the same on every machine and do not collide."""

from __future__ import annotations

import numpy as np

from training.rng_keys import mix, seed_of

KEY_0_1_2 = 3384391416029321617


def test_keys_with_equal_sums_of_parts_do_not_collide() -> None:
    keys = {
        seed_of(seed, epoch, movie) for seed in range(8) for epoch in range(8) for movie in range(8)
    }
    assert len(keys) == 512


def test_a_key_of_an_array_has_the_keys_of_its_elements() -> None:
    movies = np.arange(5)
    assert mix(1, 2, movies).tolist() == [int(mix(1, 2, int(movie))) for movie in movies]


def test_keys_never_change() -> None:
    assert seed_of(0, 1, 2) == KEY_0_1_2
