"""Mean-pool and linear: what a genre model reaches without looking at the order of frames.

B = windows, T = rows of a window, D = feature size, G = genres.
"""

from __future__ import annotations

from torch import Tensor, nn

from training.models.rows import PreparedRows, RowStatistics, mean_row, start_at_prior


class MeanLinear(nn.Module):
    """One linear layer on the mean of the real rows."""

    def __init__(
        self,
        *,
        dim: int,
        genres: int,
        prior: Tensor,
        rows: RowStatistics,
        dropout: float = 0.3,
        unit_rows: bool = True,
    ) -> None:
        """Start at the class prior.

        Args:
            dim: Feature size.
            genres: Number of genres.
            prior: Share of train movies with each genre, ``[G]``.
            rows: Statistics of the train movies' rows.
            dropout: Chance that an input value is dropped in training.
            unit_rows: Scale each row to length 1 before centring.
        """
        super().__init__()
        self.rows = PreparedRows(rows, unit_rows=unit_rows)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(dim, genres)
        start_at_prior(self.head, prior)

    def forward(self, features_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Return logits ``[B, G]``; rows outside the mask have no influence."""
        rows_BTD = self.dropout(self.rows(features_BTD))
        logits_BG: Tensor = self.head(mean_row(rows_BTD, mask_BT))
        return logits_BG
