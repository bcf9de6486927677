"""Guarantees of the built-in models: masks, padding, order of rows, initial output, sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.training.models.small import DIM, PRIOR, SMALL, batch, small, statistics
from training.models.attention import GatedAttention
from training.models.lstm import MaskedLSTM
from training.models.mean import MeanLinear, MeanMLP
from training.models.rows import RowStatistics
from training.models.transformer import Transformer

BLIND = (MeanLinear, MeanMLP, GatedAttention)
"""Models that ignore the order of rows."""
MASKED = [
    *(pytest.param(small(cls), id=cls.__name__) for cls in SMALL),
    *(pytest.param(small(cls, unit_rows=False), id=f"{cls.__name__}-raw") for cls in SMALL),
    pytest.param(small(MeanMLP, skip=False), id="MeanMLP-alone"),
    pytest.param(small(MaskedLSTM, skip=False, fold=1), id="MaskedLSTM-unfolded"),
    pytest.param(small(MaskedLSTM, fold=3), id="MaskedLSTM-threes"),
    pytest.param(small(Transformer, fold=1, layers=2), id="Transformer-unfolded"),
    pytest.param(small(Transformer, positions="learned", fold=3), id="Transformer-learned"),
    pytest.param(small(Transformer, pooling="token"), id="Transformer-token"),
]


@pytest.mark.parametrize("model", MASKED)
def test_masked_rows_do_not_change_the_output(model: nn.Module) -> None:
    features, mask = batch(3, 8, 1)
    noisy = features.masked_fill(~mask.unsqueeze(-1), 1e3)
    torch.testing.assert_close(model(noisy, mask), model(features, mask), rtol=0, atol=0)


@pytest.mark.parametrize("model", MASKED)
def test_a_movie_scores_the_same_alone_and_padded_in_a_batch(model: nn.Module) -> None:
    features, mask = batch(3, 8, 1)
    alone = model(features[:1, :3], mask[:1, :3])
    torch.testing.assert_close(alone, model(features, mask)[:1])


@pytest.mark.parametrize("model", MASKED)
def test_rows_masked_in_the_middle_count_as_removed(model: nn.Module) -> None:
    features, mask = batch(6)
    mask[0, [0, 2, 3]] = False
    remaining = features[:, [1, 4, 5]]
    torch.testing.assert_close(
        model(features, mask), model(remaining, torch.ones(1, 3, dtype=torch.bool))
    )


@pytest.mark.parametrize("cls", SMALL)
def test_only_sequence_models_depend_on_the_order_of_frames(cls: type[nn.Module]) -> None:
    features, mask = batch(8)
    model = small(cls)
    same = torch.allclose(model(features, mask), model(features.flip(1), mask), atol=1e-4)
    assert same == (cls in BLIND)


@pytest.mark.parametrize("cls", SMALL)
def test_training_starts_at_the_class_prior(cls: type[nn.Module]) -> None:
    model = cls(dim=DIM, prior=PRIOR, rows=statistics(), **SMALL[cls]).eval()
    torch.testing.assert_close(model(*batch(3, 8)).sigmoid(), PRIOR.expand(2, -1))


@pytest.mark.parametrize("model", MASKED)
def test_every_parameter_and_no_masked_row_receives_a_gradient(model: nn.Module) -> None:
    features, mask = batch(3, 8)
    features.requires_grad_()
    model.zero_grad()
    (model(features, mask) * torch.tensor([1.0, 2.0, -3.0])).sum().backward()
    assert all(value.grad is not None and value.grad.any() for value in model.parameters())
    assert features.grad is not None
    assert not features.grad[0, 3:].any()
    assert features.grad[0, :3].any()


@pytest.mark.parametrize(
    ("cls", "parameters"),
    [
        (MeanLinear, 512 * 21 + 21),
        (MeanMLP, 512 * 128 + 128 + 128 * 21 + 21 + 512 * 21),
        (GatedAttention, 512 * 128 + 128 + 2 * (128 * 64 + 64) + 64 + 128 * 21 + 21 + 512 * 21),
        (MaskedLSTM, 512 * 32 + 32 + 2 * 4 * 64 * (128 + 64 + 2) + 256 * 21 + 21 + 512 * 21),
        (
            Transformer,  # rows, inlet; attention, feed-forward and two norms; norm, head, skip
            (512 * 64 + 64 + 256 * 64 + 64)
            + (64 * 192 + 192 + 64 * 64 + 64 + 64 * 128 + 128 + 128 * 64 + 64 + 4 * 64)
            + (2 * 64 + 64 * 21 + 21 + 512 * 21),
        ),
    ],
)
def test_a_model_has_the_parameters_of_its_layers(cls: type[nn.Module], parameters: int) -> None:
    sizes = {"genres": 21, "frames": 256}
    extra = {name: sizes[name] for name in sizes if name in SMALL[cls]}
    model = cls(dim=512, prior=torch.full((21,), 0.5), rows=RowStatistics.neutral(512), **extra)
    assert sum(value.numel() for value in model.parameters()) == parameters
