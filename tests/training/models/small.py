"""Small models and batches for the tests of every model."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from training.models.attention import GatedAttention
from training.models.lstm import MaskedLSTM
from training.models.mean import MeanLinear, MeanMLP
from training.models.rows import Moments, RowStatistics
from training.models.transformer import Transformer

M = TypeVar("M", bound=nn.Module)
DIM, GENRES, FRAMES = 6, 3, 8
PRIOR = torch.tensor([0.1, 0.5, 0.9])
SMALL: dict[type[nn.Module], dict[str, object]] = {
    MeanLinear: {"genres": GENRES},
    MeanMLP: {"hidden": 5},
    GatedAttention: {"hidden": 5, "attention": 4},
    MaskedLSTM: {"hidden": 5, "width": 4},
    Transformer: {"frames": FRAMES, "width": 8, "heads": 2},
}
"""Every model that uses the mask, with options that make it small."""


def statistics() -> RowStatistics:
    return RowStatistics(
        Moments(torch.linspace(-1, 1, DIM), 2.0), Moments(torch.linspace(0, 0.1, DIM), 0.3)
    )


def small(cls: type[M], **options: object) -> M:
    """Return a small model in evaluation mode with a nonzero head."""
    torch.manual_seed(0)
    return randomize(cls(dim=DIM, prior=PRIOR, rows=statistics(), **{**SMALL[cls], **options}))


def randomize(model: M) -> M:
    """Replace the zeros of head, skip and token: otherwise the output would be constant."""
    for name, parameter in model.named_parameters():
        if name.startswith(("head", "token")):
            nn.init.normal_(parameter)
    return model.eval()


def batch(*lengths: int, frames: int = FRAMES) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    mask = torch.arange(frames) < torch.tensor(lengths)[:, None]
    return torch.randn(len(lengths), frames, DIM) * mask.unsqueeze(-1), mask


def normalized(features: Tensor) -> Tensor:
    """Return rows normalized by definition: of length 1, centered, divided by one scale."""
    moments = statistics().unit
    return (normalize(features, dim=-1, eps=1e-6) - moments.mean_D) / moments.scale
