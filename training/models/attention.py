"""Gated attention pooling: the model learns the weight of each row and ignores their order.

B = windows, T = rows of a window, D = feature size, H = hidden units, G = genres.
"""

from __future__ import annotations

from torch import Tensor, nn

from training.models.rows import GenreHead, RowNormalizer, RowStatistics


class GatedAttention(nn.Module):
    """Multiple-instance learning: a movie is a bag of rows, pooled by weights computed from them.

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
            hidden: Size of a projected row.
            attention: Hidden units of the attention scores.
            dropout: Dropout probability of hidden and pooled values.
            input_dropout: Dropout probability of the values of the mean row.
            unit_rows: Scale each row to length 1 before centering.
            skip: Add the linear path from the mean row.
        """
        super().__init__()
        self.rows = RowNormalizer(rows, unit_rows=unit_rows)
        self.project = nn.Linear(dim, hidden)
        self.hidden = nn.Sequential(nn.GELU(), nn.Dropout(dropout))
        self.value = nn.Sequential(nn.Linear(hidden, attention), nn.Tanh())
        self.gate = nn.Sequential(nn.Linear(hidden, attention), nn.Sigmoid())
        self.score = nn.Linear(attention, 1, bias=False)
        self.head = GenreHead(
            hidden, dim, prior, skip=skip, dropout=dropout, input_dropout=input_dropout
        )

    def forward(self, features_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Return logits ``[B, G]``, independent of masked rows and of the order of rows."""
        rows = self.rows(features_BTD)
        hidden_BTH = self.hidden(rows.project(self.project))
        score_BT = self.score(self.value(hidden_BTH) * self.gate(hidden_BTH)).squeeze(-1)
        # Masked before the softmax: padding gets weight 0 and the real rows sum to 1.
        weight_BT = score_BT.masked_fill(~mask_BT, float("-inf")).softmax(1)
        pooled_BH = (hidden_BTH * weight_BT.unsqueeze(-1)).sum(1)
        logits_BG: Tensor = self.head(pooled_BH, rows.mean(mask_BT))
        return logits_BG
