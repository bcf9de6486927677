"""Gated attention pooling: which rows count is learnt, their order is not seen.

B = windows, T = rows of a window, D = feature size, H = hidden units, G = genres.
"""

from __future__ import annotations

from torch import Tensor, nn

from training.models.rows import GenreHead, RowNormalizer, RowStatistics


class GatedAttention(nn.Module):
    """Multiple-instance learning: a film is a bag of rows, pooled by what they say themselves.

    Source: Ilse, Tomczak and Welling 2018, "Attention-based deep multiple instance learning",
    arXiv 1802.04712, equation 9.
    """

    def __init__(
        self,
        *,
        dim: int,
        prior: Tensor,
        rows: RowStatistics,
        hidden: int = 128,
        attention: int = 64,
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
            hidden: Size of a row once projected.
            attention: Hidden units of the scores.
            dropout: Chance that a hidden or pooled value is dropped in training.
            input_dropout: Chance that a value of the mean row is dropped in training.
            unit_rows: Scale each row to length 1 before centring.
            skip: Add the linear path from the mean row.
        """
        super().__init__()
        self.rows = RowNormalizer(rows, unit_rows=unit_rows)
        self.project = nn.Linear(dim, hidden)
        self.hidden = nn.Sequential(nn.GELU(), nn.Dropout(dropout))
        self.tell = nn.Sequential(nn.Linear(hidden, attention), nn.Tanh())
        self.gate = nn.Sequential(nn.Linear(hidden, attention), nn.Sigmoid())
        self.score = nn.Linear(attention, 1, bias=False)
        self.head = GenreHead(
            hidden, dim, prior, skip=skip, dropout=dropout, input_dropout=input_dropout
        )

    def forward(self, features_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Return logits ``[B, G]``; rows outside the mask have no influence, nor has order."""
        rows = self.rows(features_BTD)
        hidden_BTH = self.hidden(rows.project(self.project))
        score_BT = self.score(self.tell(hidden_BTH) * self.gate(hidden_BTH)).squeeze(-1)
        share_BT = score_BT.masked_fill(~mask_BT, float("-inf")).softmax(1)
        pooled_BH = (hidden_BTH * share_BT.unsqueeze(-1)).sum(1)
        logits_BG: Tensor = self.head(pooled_BH, rows.mean(mask_BT))
        return logits_BG
