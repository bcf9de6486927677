"""Rows as a model wants them: of unit length, centred, of about unit variance.

D = feature size. The statistics are of the train movies and travel as buffers, so they lie in
every checkpoint. One scale serves all dimensions: dividing each by its own loses accuracy on the
real features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Moments:
    """Mean row and one standard deviation about it, over all rows and dimensions."""

    mean_D: Tensor
    """float32 ``[D]``."""

    scale: float
    """Root mean square of the centred values; above 0."""


@dataclass(frozen=True)
class RowStatistics:
    """Moments of the train movies' rows as they are, and after scaling each to length 1."""

    raw: Moments
    unit: Moments

    @classmethod
    def neutral(cls, dim: int) -> RowStatistics:
        """Return statistics that change nothing: mean 0, scale 1."""
        moments = Moments(torch.zeros(dim), 1.0)
        return cls(moments, moments)


class PreparedRows(nn.Module):
    """``(row / |row| - mean) / scale``, or without the division by length."""

    mean: Tensor
    scale: Tensor

    def __init__(self, rows: RowStatistics, *, unit_rows: bool) -> None:
        super().__init__()
        moments = rows.unit if unit_rows else rows.raw
        self.unit_rows = unit_rows
        self.register_buffer("mean", moments.mean_D.clone())
        self.register_buffer("scale", torch.tensor(moments.scale))

    def forward(self, features_BTD: Tensor) -> Tensor:
        """Return prepared rows of the same shape; a row of zeros is divided by 1e-6, not by 0."""
        if self.unit_rows:
            features_BTD = nn.functional.normalize(features_BTD, dim=-1, eps=1e-6)
        prepared_BTD: Tensor = (features_BTD - self.mean) / self.scale
        return prepared_BTD


def mean_row(rows_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the mean ``[B, D]`` over the real rows; zeros for a window without any."""
    weight_BT1 = mask_BT.unsqueeze(-1).to(rows_BTD.dtype)
    return (rows_BTD * weight_BT1).sum(1) / weight_BT1.sum(1).clamp_min(1)


def start_at_prior(head: nn.Linear, prior: Tensor) -> None:
    """Zero a head's weights and let its bias say the class prior ``[G]``."""
    nn.init.zeros_(head.weight)
    with torch.no_grad():
        head.bias.copy_(torch.logit(prior.clamp(1e-3, 1 - 1e-3)))
