"""Rows as a model wants them: of unit length, centred, of about unit variance; and their way out.

B = windows, T = rows of a window, D = feature size, W = projected size, S = steps, G = genres.

The statistics are of the train movies and travel as buffers, so every checkpoint has them. One
scale serves all dimensions: dividing each by its own loses accuracy on the real features.
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


class RowNormalizer(nn.Module):
    """Makes rows ``(row / |row| - mean) / scale``, or without the division by length."""

    mean_row: Tensor
    scale: Tensor

    def __init__(self, rows: RowStatistics, *, unit_rows: bool) -> None:
        super().__init__()
        moments = rows.unit if unit_rows else rows.raw
        self.unit_rows = unit_rows
        self.register_buffer("mean_row", moments.mean_D.clone())
        self.register_buffer("scale", torch.tensor(moments.scale))

    def forward(self, features_BTD: Tensor) -> NormalizedRows:
        """Return the prepared rows; a row of zeros has length 1e-6.

        Args:
            features_BTD: float ``[B, T, D]``, rows as they are read.
        """
        if self.unit_rows:
            length_BT = torch.linalg.vector_norm(features_BTD, dim=-1).clamp_min(1e-6)
            factor_BT = 1 / (length_BT * self.scale)
        else:
            factor_BT = (1 / self.scale).expand(features_BTD.shape[:2])
        return NormalizedRows(features_BTD, factor_BT, self.mean_row / self.scale)


@dataclass(frozen=True)
class NormalizedRows:
    """Rows ``raw * factor - centre`` of some windows.

    They are never written out: a window of 256 rows has 131,072 values, and each pass over them
    costs as much as a small model. Their mean and their projections are linear in the raw rows.
    """

    raw_BTD: Tensor
    """float ``[B, T, D]``."""

    factor_BT: Tensor
    """float ``[B, T]``."""

    centre_D: Tensor
    """float ``[D]``."""

    def mean(self, mask_BT: Tensor) -> Tensor:
        """Return the mean ``[B, D]`` of the real rows; zeros for a window without any.

        Args:
            mask_BT: bool ``[B, T]``, True for a real row.
        """
        weight_BT = mask_BT / mask_BT.sum(1, keepdim=True).clamp_min(1)
        factor_BT = weight_BT.to(self.raw_BTD.dtype) * self.factor_BT
        sum_BD = torch.bmm(factor_BT.unsqueeze(1), self.raw_BTD).squeeze(1)
        return sum_BD - weight_BT.sum(1, keepdim=True) * self.centre_D

    def project(self, linear: nn.Linear) -> Tensor:
        """Return ``linear``, of weight ``[W, D]``, applied to each row: ``[B, T, W]``."""
        weighted_BTW = nn.functional.linear(self.raw_BTD, linear.weight)
        bias_W = linear.bias - nn.functional.linear(self.centre_D, linear.weight)
        return weighted_BTW * self.factor_BT.unsqueeze(-1) + bias_W


class Steps(nn.Module):
    """Real rows in their order, projected, and folded: so many neighbours make one step.

    A sequence model then takes a fold-th of the steps, each ``fold * width`` wide; what order its
    rows had is still seen. Rows outside the mask are cut out, wherever they are.
    """

    def __init__(self, dim: int, *, width: int, fold: int) -> None:
        super().__init__()
        self.fold = fold
        self.size = width * fold
        self.linear = nn.Linear(dim, width)

    def forward(self, rows: NormalizedRows, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return steps ``[B, S, fold * W]`` and which are real, bool ``[B, S]``: the first ones.

        Args:
            rows: Rows of the windows, ``[B, T, D]``.
            mask_BT: bool ``[B, T]``, True for a real row, in any place.

        Returns:
            S is T / fold, rounded up. Values of a step beyond the last real row are zero.
        """
        # Stable: real rows move to the front and keep their order.
        real_BT, order_BT = mask_BT.sort(dim=1, descending=True, stable=True)
        projected_BTW = take_rows(rows.project(self.linear), order_BT)
        projected_BTW = projected_BTW * real_BT.unsqueeze(-1)
        missing = -projected_BTW.shape[1] % self.fold
        if missing:
            projected_BTW = nn.functional.pad(projected_BTW, (0, 0, 0, missing))
            real_BT = nn.functional.pad(real_BT, (0, missing))
        # [B, S * fold, W] -> [B, S, fold * W]; a step is real if its first row is
        return projected_BTW.reshape(len(real_BT), -1, self.size), real_BT[:, :: self.fold]


class GenreHead(nn.Module):
    """Logits from what a model has pooled, plus a linear path from the mean row.

    Both start at zero and the bias at the class prior: training begins at the best constant answer,
    and the linear path carries what needs no model.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        prior: Tensor,
        *,
        skip: bool,
        dropout: float,
        input_dropout: float,
    ) -> None:
        """Start at the class prior.

        Args:
            size: Size of the pooled values.
            dim: Feature size, D.
            prior: float32 ``[G]``, share of train movies with each genre.
            skip: Add the linear path from the mean row.
            dropout: Chance that a pooled value is dropped in training.
            input_dropout: Chance that a value of the mean row is dropped in training.
        """
        super().__init__()
        self.dropout, self.input_dropout = nn.Dropout(dropout), nn.Dropout(input_dropout)
        self.linear = nn.Linear(size, len(prior))
        start_at_prior(self.linear, prior)
        self.skip = nn.Linear(dim, len(prior), bias=False) if skip else None
        if self.skip is not None:
            nn.init.zeros_(self.skip.weight)

    def forward(self, pooled_BS: Tensor, mean_BD: Tensor) -> Tensor:
        """Return logits ``[B, G]`` of pooled values ``[B, S]`` and prepared mean row ``[B, D]``."""
        logits_BG: Tensor = self.linear(self.dropout(pooled_BS))
        if self.skip is not None:
            logits_BG = logits_BG + self.skip(self.input_dropout(mean_BD))
        return logits_BG


def masked_mean(values_BTS: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the mean over the real steps; zeros for a window without any.

    Args:
        values_BTS: float ``[B, T, S]``; here S is the size of a value.
        mask_BT: bool ``[B, T]``, True for a real step.

    Returns:
        float ``[B, S]``.
    """
    weight_BT1 = mask_BT.unsqueeze(-1).to(values_BTS.dtype)
    return (values_BTS * weight_BT1).sum(1) / weight_BT1.sum(1).clamp_min(1)


def take_rows(rows_BTW: Tensor, place_BT: Tensor) -> Tensor:
    """Return the rows at ``place`` of each window.

    Complete rows are copied, by their place among the rows of all windows. ``gather`` would look up
    each value.

    Args:
        rows_BTW: float ``[B, T, W]``.
        place_BT: int64 ``[B, P]``, rows of each window, 0 to T - 1.

    Returns:
        float ``[B, P, W]``.
    """
    n_windows, n_rows, size = rows_BTW.shape
    first_B1 = n_rows * torch.arange(n_windows, device=place_BT.device).unsqueeze(1)
    taken_NW = rows_BTW.reshape(-1, size).index_select(0, (first_B1 + place_BT).flatten())
    return taken_NW.reshape(*place_BT.shape, size)


def start_at_prior(head: nn.Linear, prior: Tensor) -> None:
    """Zero a head's weights and set its bias to the logit of the class prior.

    Args:
        head: Linear layer with G outputs.
        prior: float ``[G]``, 0 to 1.
    """
    nn.init.zeros_(head.weight)
    with torch.no_grad():
        head.bias.copy_(torch.logit(prior.clamp(1e-3, 1 - 1e-3)))
