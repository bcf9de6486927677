"""Building blocks shared by the models: row normalization, folding into steps, the genre head.

B = windows, T = rows of a window, D = feature size, W = projected size, S = steps, G = genres.

Normalized rows have unit length, are centered, and have about unit variance. The statistics come
from the train movies and are registered as buffers, so every checkpoint contains them. One scale
is used for all dimensions: a scale per dimension loses accuracy on the real features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Moments:
    """Mean row, and one standard deviation over all rows and dimensions."""

    mean_D: Tensor
    """float32 ``[D]``."""

    scale: float
    """Root mean square of the centered values; above 0."""


@dataclass(frozen=True)
class RowStatistics:
    """Moments of the train movies' rows, unscaled and after scaling each row to length 1."""

    raw: Moments
    unit: Moments

    @classmethod
    def neutral(cls, dim: int) -> RowStatistics:
        """Return the statistics of the identity: mean 0, scale 1."""
        moments = Moments(torch.zeros(dim), 1.0)
        return cls(moments, moments)


class RowNormalizer(nn.Module):
    """Normalization to ``(row / |row| - mean) / scale``, optionally without dividing by length."""

    mean_row: Tensor
    scale: Tensor

    def __init__(self, rows: RowStatistics, *, unit_rows: bool) -> None:
        super().__init__()
        moments = rows.unit if unit_rows else rows.raw
        self.unit_rows = unit_rows
        self.register_buffer("mean_row", moments.mean_D.clone())
        self.register_buffer("scale", torch.tensor(moments.scale))

    def forward(self, features_BTD: Tensor) -> NormalizedRows:
        """Return the normalized rows; the length of a zero row counts as 1e-6.

        Args:
            features_BTD: float ``[B, T, D]``, rows as stored.
        """
        if self.unit_rows:
            length_BT = torch.linalg.vector_norm(features_BTD, dim=-1).clamp_min(1e-6)
            factor_BT = 1 / (length_BT * self.scale)
        else:
            factor_BT = (1 / self.scale).expand(features_BTD.shape[:2])
        return NormalizedRows(features_BTD, factor_BT, self.mean_row / self.scale)


@dataclass(frozen=True)
class NormalizedRows:
    """Lazily normalized rows ``raw * factor - center`` of a batch of windows.

    They are never materialized: a window of 256 rows has 131,072 values, and each pass over them
    costs as much as a small model. Mean and projection are linear in the raw rows, so both are
    computed from these.
    """

    raw_BTD: Tensor
    """float ``[B, T, D]``."""

    factor_BT: Tensor
    """float ``[B, T]``."""

    center_D: Tensor
    """float ``[D]``."""

    def mean(self, mask_BT: Tensor) -> Tensor:
        """Return the mean ``[B, D]`` of the real rows; zeros for a window without real rows.

        Args:
            mask_BT: bool ``[B, T]``, True for a real row.
        """
        weight_BT = mask_BT / mask_BT.sum(1, keepdim=True).clamp_min(1)
        factor_BT = weight_BT.to(self.raw_BTD.dtype) * self.factor_BT
        sum_BD = torch.bmm(factor_BT.unsqueeze(1), self.raw_BTD).squeeze(1)
        return sum_BD - weight_BT.sum(1, keepdim=True) * self.center_D

    def project(self, linear: nn.Linear) -> Tensor:
        """Return ``linear``, with weight ``[W, D]``, applied to each row: ``[B, T, W]``."""
        # The centering moves into the bias: W values change instead of T * D.
        weighted_BTW = nn.functional.linear(self.raw_BTD, linear.weight)
        bias_W = linear.bias - nn.functional.linear(self.center_D, linear.weight)
        return weighted_BTW * self.factor_BT.unsqueeze(-1) + bias_W


class Steps(nn.Module):
    """Projection of the real rows, folded so that ``fold`` neighboring rows make one step.

    A sequence model then takes ``1 / fold`` of the steps, each ``fold * width`` wide, and still
    sees the order of rows. Masked rows are removed at any position.
    """

    def __init__(self, dim: int, *, width: int, fold: int) -> None:
        super().__init__()
        self.fold = fold
        self.size = width * fold
        self.linear = nn.Linear(dim, width)

    def forward(self, rows: NormalizedRows, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return steps ``[B, S, fold * W]`` and their mask, bool ``[B, S]``.

        Args:
            rows: Rows of the windows, ``[B, T, D]``.
            mask_BT: bool ``[B, T]``, True for a real row, at any position.

        Returns:
            Real steps come first. S is T / fold, rounded up. Values after the last real row are
            zero.
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
    """Linear layer on pooled values, plus a linear path from the mean row.

    Both start at zero and the bias at the class prior: training starts at the best constant
    prediction, and the linear path learns what needs no sequence model.
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
            dropout: Dropout probability of pooled values.
            input_dropout: Dropout probability of the values of the mean row.
        """
        super().__init__()
        self.dropout, self.input_dropout = nn.Dropout(dropout), nn.Dropout(input_dropout)
        self.linear = nn.Linear(size, len(prior))
        start_at_prior(self.linear, prior)
        self.skip = nn.Linear(dim, len(prior), bias=False) if skip else None
        if self.skip is not None:
            nn.init.zeros_(self.skip.weight)

    def forward(self, pooled_BS: Tensor, mean_BD: Tensor) -> Tensor:
        """Return logits ``[B, G]`` from pooled values ``[B, S]`` and normalized mean ``[B, D]``."""
        logits_BG: Tensor = self.linear(self.dropout(pooled_BS))
        if self.skip is not None:
            logits_BG = logits_BG + self.skip(self.input_dropout(mean_BD))
        return logits_BG


def masked_mean(values_BTS: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the mean over the real steps; zeros for a window without real steps.

    Args:
        values_BTS: float ``[B, T, S]``; S is the size of a value in this function.
        mask_BT: bool ``[B, T]``, True for a real step.

    Returns:
        float ``[B, S]``.
    """
    weight_BT1 = mask_BT.unsqueeze(-1).to(values_BTS.dtype)
    return (values_BTS * weight_BT1).sum(1) / weight_BT1.sum(1).clamp_min(1)


def take_rows(rows_BTW: Tensor, index_BP: Tensor) -> Tensor:
    """Return the rows of each window at the given positions.

    Rows are copied as a block, by their position among the rows of all windows: ``gather`` would
    look up each value.

    Args:
        rows_BTW: float ``[B, T, W]``.
        index_BP: int64 ``[B, P]``, positions in each window, 0 to T - 1.

    Returns:
        float ``[B, P, W]``.
    """
    n_windows, n_rows, size = rows_BTW.shape
    first_B1 = n_rows * torch.arange(n_windows, device=index_BP.device).unsqueeze(1)
    taken_NW = rows_BTW.reshape(-1, size).index_select(0, (first_B1 + index_BP).flatten())
    return taken_NW.reshape(*index_BP.shape, size)


def start_at_prior(head: nn.Linear, prior: Tensor) -> None:
    """Zero a head's weights and set its bias to the logit of the class prior.

    Args:
        head: Linear layer with G outputs.
        prior: float ``[G]``, 0 to 1.
    """
    nn.init.zeros_(head.weight)
    with torch.no_grad():
        # Clamped: the logit of a genre without movies, or of every movie, is infinite.
        head.bias.copy_(torch.logit(prior.clamp(1e-3, 1 - 1e-3)))
