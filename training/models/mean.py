"""Models of the mean row, which ignore the order of frames.

B = windows, T = rows of a window, D = feature size, H = hidden units, G = genres.
"""

from __future__ import annotations

from torch import Tensor, nn

from training.models.rows import GenreHead, RowNormalizer, RowStatistics, start_at_prior


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
            dropout: Dropout probability of the values of the mean row.
            unit_rows: Scale each row to length 1 before centering.
        """
        super().__init__()
        self.rows = RowNormalizer(rows, unit_rows=unit_rows)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(dim, genres)
        start_at_prior(self.head, prior)

    def forward(self, features_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Return logits ``[B, G]``, independent of masked rows."""
        logits_BG: Tensor = self.head(self.dropout(self.rows(features_BTD).mean(mask_BT)))
        return logits_BG


class MeanMLP(nn.Module):
    """One hidden layer on the mean of the real rows, added to a linear path."""

    def __init__(
        self,
        *,
        dim: int,
        prior: Tensor,
        rows: RowStatistics,
        hidden: int = 128,
        dropout: float = 0.5,
        input_dropout: float = 0.3,
        unit_rows: bool = True,
        skip: bool = True,
    ) -> None:
        """Start at the class prior.

        Args:
            dim: Feature size.
            prior: Share of train movies with each genre, ``[G]``.
            rows: Statistics of the train movies' rows.
            hidden: Hidden units.
            dropout: Dropout probability of hidden values.
            input_dropout: Dropout probability of the values of the mean row.
            unit_rows: Scale each row to length 1 before centering.
            skip: Add the linear path from the mean row.
        """
        super().__init__()
        self.rows = RowNormalizer(rows, unit_rows=unit_rows)
        self.hidden = nn.Sequential(nn.Dropout(input_dropout), nn.Linear(dim, hidden), nn.GELU())
        self.head = GenreHead(
            hidden, dim, prior, skip=skip, dropout=dropout, input_dropout=input_dropout
        )

    def forward(self, features_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Return logits ``[B, G]``, independent of masked rows."""
        mean_BD = self.rows(features_BTD).mean(mask_BT)
        logits_BG: Tensor = self.head(self.hidden(mean_BD), mean_BD)
        return logits_BG
