"""The original's LSTM, and one that knows which frames are real.

B = windows, T = rows of a window, D = feature size, H = hidden units a direction, G = genres.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.models.rows import PreparedRows, RowStatistics, mean_row, start_at_prior


class OriginalLSTM(nn.Module):
    """The published network: BiLSTM over a layer-normalised window, last step, max over fours.

    Only the last step is read. The forward half has seen the whole window there, the backward
    half one frame: so the backward half is computed as that one step, the same function at half
    the cost. The original ended in a sigmoid under a BCE on probabilities; here the logits leave.
    Like the original it knows no mask: shorter movies are zero rows at the end.

    Source: github.com/veveve10/MovieNetPrediction.
    """

    def __init__(
        self, *, dim: int, genres: int, frames: int, hidden: int = 128, pooling: int = 4
    ) -> None:
        """Build for windows of exactly ``frames`` rows.

        Args:
            dim: Feature size.
            genres: Number of genres.
            frames: Rows of a window (T); the layer norm has a weight for each.
            hidden: Units of each direction.
            pooling: Neighbouring units of which the largest is kept; divides ``2 · hidden``.
        """
        super().__init__()
        if 2 * hidden % pooling:
            raise ValueError(f"pooling: got {pooling}, want a divisor of {2 * hidden}")
        self.fixed_frames = frames
        self.norm = nn.LayerNorm([frames, dim])
        self.ahead = nn.LSTM(dim, hidden, batch_first=True)
        self.back = nn.LSTM(dim, hidden, batch_first=True)
        self.pool = nn.MaxPool1d(pooling)
        self.head = nn.Linear(2 * hidden // pooling, genres)

    def forward(self, features_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Return logits ``[B, G]``; rows outside the mask are read as zeros."""
        rows_BTD = self.norm(features_BTD * mask_BT.unsqueeze(-1))
        ahead_BH = self.ahead(rows_BTD)[0][:, -1]
        back_BH = self.back(rows_BTD[:, -1:])[0][:, 0]
        logits_BG: Tensor = self.head(self.pool(torch.cat([ahead_BH, back_BH], dim=1)))
        return logits_BG


class MaskedLSTM(nn.Module):
    """BiLSTM, mean and max over the real frames, beside a linear path from the mean row.

    Head and linear path start at zero and the bias at the class prior, so training begins at the
    best constant answer and the linear path alone carries what order does not.
    """

    def __init__(
        self,
        *,
        dim: int,
        genres: int,
        prior: Tensor,
        rows: RowStatistics,
        hidden: int = 64,
        dropout: float = 0.5,
        input_dropout: float = 0.3,
        unit_rows: bool = True,
        skip: bool = True,
    ) -> None:
        """Start at the class prior.

        Args:
            dim: Feature size.
            genres: Number of genres.
            prior: Share of train movies with each genre, ``[G]``.
            rows: Statistics of the train movies' rows.
            hidden: Units of each direction.
            dropout: Chance that a pooled value is dropped in training.
            input_dropout: Chance that an input value is dropped in training.
            unit_rows: Scale each row to length 1 before centring.
            skip: Add the linear path from the mean row.
        """
        super().__init__()
        self.rows = PreparedRows(rows, unit_rows=unit_rows)
        self.input_dropout, self.dropout = nn.Dropout(input_dropout), nn.Dropout(dropout)
        self.ahead = nn.LSTM(dim, hidden, batch_first=True)
        self.back = nn.LSTM(dim, hidden, batch_first=True)
        self.head = nn.Linear(4 * hidden, genres)
        start_at_prior(self.head, prior)
        self.skip = nn.Linear(dim, genres, bias=False) if skip else None
        if self.skip is not None:
            nn.init.zeros_(self.skip.weight)

    def forward(self, features_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Return logits ``[B, G]``; rows outside the mask have no influence, wherever they are."""
        rows_BTD = self.input_dropout(self.rows(features_BTD))
        states_BTS, real_BT = self._states(rows_BTD, mask_BT)  # S = 2H
        most_BS = states_BTS.masked_fill(~real_BT.unsqueeze(-1), -1.0).amax(1)  # tanh is above -1
        pooled_BS = torch.cat([mean_row(states_BTS, real_BT), most_BS], dim=1)
        logits_BG: Tensor = self.head(self.dropout(pooled_BS))
        if self.skip is not None:
            logits_BG = logits_BG + self.skip(mean_row(rows_BTD, mask_BT))
        return logits_BG

    def _states(self, rows_BTD: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Run both directions over the real rows alone, moved to the front in their order.

        What stands behind the real rows is computed and ignored: a state depends on what was
        read before it. Lengths stay on the device, unlike with packed sequences.
        """
        real_BT, order_BT = mask_BT.sort(dim=1, descending=True, stable=True)
        length_B1 = mask_BT.sum(1, keepdim=True)
        place_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
        mirror_BT = torch.where(real_BT, length_B1 - 1 - place_T, place_T)  # its own inverse
        front_BTD = _take(rows_BTD, order_BT)
        ahead_BTH = self.ahead(front_BTD)[0]
        back_BTH = _take(self.back(_take(front_BTD, mirror_BT))[0], mirror_BT)
        return torch.cat([ahead_BTH, back_BTH], dim=-1), real_BT


def _take(rows_BTD: Tensor, place_BT: Tensor) -> Tensor:
    """Return the rows at ``place`` of each window."""
    return rows_BTD.gather(1, place_BT.unsqueeze(-1).expand(-1, -1, rows_BTD.shape[-1]))
