"""Losses, and their sum, which does not depend on the division of a global batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import binary_cross_entropy_with_logits

from configs.errors import ConfigError
from training.loss import bce, make_loss, share_of_step

POSITIVES = torch.tensor([30.0, 10.0, 5.0])


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(4, 3), torch.randint(0, 2, (4, 3)).float()


def test_bce_is_the_mean_over_genres_of_each_window(
    pair: tuple[torch.Tensor, torch.Tensor],
) -> None:
    loss = make_loss("bce", POSITIVES, 60)(*pair)
    assert loss.shape == (4,)
    torch.testing.assert_close(loss.mean(), binary_cross_entropy_with_logits(*pair))


def test_weighted_bce_is_the_published_weighting_at_the_scale_of_bce(
    pair: tuple[torch.Tensor, torch.Tensor],
) -> None:
    loss = make_loss("weighted_bce", POSITIVES, 60)(*pair).mean()
    published = binary_cross_entropy_with_logits(*pair, weight=POSITIVES)
    torch.testing.assert_close(loss, published / 15)  # 15: the mean count


def test_balanced_bce_weights_positives_by_the_square_root_of_their_rarity(
    pair: tuple[torch.Tensor, torch.Tensor],
) -> None:
    loss = make_loss("balanced_bce", POSITIVES, 50)(*pair).mean()
    # Of 50 movies 30, 10 and 5 are positive; the weight of a common genre is at least 1.
    want = binary_cross_entropy_with_logits(*pair, pos_weight=torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(loss, want)


def test_the_balanced_loss_of_a_genre_without_movies_is_finite() -> None:
    loss = make_loss("balanced_bce", torch.tensor([0.0, 50.0]), 50)
    assert loss(torch.zeros(1, 2), torch.zeros(1, 2)).isfinite().all()


def test_a_custom_loss_is_named_by_its_path() -> None:
    assert make_loss("training.loss:bce", POSITIVES, 60) is bce


@pytest.mark.parametrize("name", ["bcee", "training.loss:nothing", "no.such.module:f"])
def test_an_unknown_loss_is_reported_in_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^training\.loss: .*"):
        make_loss(name, POSITIVES, 60)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return logits.mean()", r"returns \[\], want one value per window, \[2\]"),
        ("return (logits - labels) ** 2", r"returns \[2, 3\], want one value per window"),
        ("return None", "returns NoneType, want one value per window"),
        (
            "return ((logits > 0).float() - labels).abs().mean(1)",
            "gives the logits no gradient; use differentiable operations only",
        ),
        ("return logits.detach().sigmoid().mean(1)", "gives the logits no gradient"),
        (
            "return torch.zeros(2, requires_grad=True) + logits.detach().mean(1)",
            "gives the logits no gradient",
        ),
        ("return logits @ labels", r"fails on logits and labels \[2, 3\]: \S+custom.py:4: Runtime"),
    ],
)
def test_a_custom_loss_is_checked_before_training(tmp_path: Path, body: str, message: str) -> None:
    file = tmp_path / "custom.py"
    file.write_text(f"import torch\n\ndef loss(logits, labels):\n    {body}\n")
    with pytest.raises(ConfigError, match=rf"^training\.loss: .*custom.py:loss {message}"):
        make_loss(f"{file}:loss", POSITIVES, 60)


def test_a_custom_loss_may_change_its_logits_in_place(tmp_path: Path) -> None:
    file = tmp_path / "custom.py"
    file.write_text("def loss(logits, labels):\n    return logits.sub_(labels).square().mean(1)\n")
    loss = make_loss(f"{file}:loss", POSITIVES, 60)
    assert loss(torch.ones(1, 3), torch.zeros(1, 3)).tolist() == [1.0]


@given(
    world=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    weights=st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=12),
)
def test_ranks_and_micro_batches_sum_to_the_weighted_mean(
    world: int, accumulation: int, weights: list[float]
) -> None:
    slices = world * accumulation
    weights = [1.0, *weights]
    weights += [0.0] * (-len(weights) % slices)
    weight = torch.tensor(weights, dtype=torch.float64)
    loss = torch.arange(len(weights), dtype=torch.float64)
    total = weight.sum().item()
    losses = [
        share_of_step(a, w, global_weight=total, world_size=world, accumulation=accumulation)
        for a, w in zip(loss.chunk(slices), weight.chunk(slices), strict=False)
    ]
    # DDP averages over ranks, Accelerate divides by the accumulation steps.
    step = torch.stack(losses).sum() / slices
    torch.testing.assert_close(step, (loss * weight).sum() / total)
