"""The original's LSTM, and one that knows which frames are real.

B = windows, T = rows of a window, D = feature size, S = steps, H = hidden units a direction,
G = genres.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.models.rows import (
    GenreHead,
    RowNormalizer,
    RowStatistics,
    Steps,
    masked_mean,
    take_rows,
)


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
    """BiLSTM over the real rows, mean and max of its states, beside a linear path.

    Rows are projected and folded first, so that it takes a quarter of the steps at a quarter of
    the size: recurrence is what costs.
    """

    def __init__(
        self,
        *,
        dim: int,
        prior: Tensor,
        rows: RowStatistics,
        width: int = 32,
        fold: int = 4,
        hidden: int = 64,
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
            width: Size of a row once projected.
            fold: Neighbouring rows that make one step of the LSTM.
            hidden: Units of each direction.
            dropout: Chance that a pooled value is dropped in training.
            input_dropout: Chance that a value of a step or of the mean row is dropped in training.
            unit_rows: Scale each row to length 1 before centring.
            skip: Add the linear path from the mean row.
        """
        super().__init__()
        self.rows = RowNormalizer(rows, unit_rows=unit_rows)
        self.steps = Steps(dim, width=width, fold=fold)
        self.input_dropout = nn.Dropout(input_dropout)
        self.ahead = nn.LSTM(self.steps.size, hidden, batch_first=True)
        self.back = nn.LSTM(self.steps.size, hidden, batch_first=True)
        self.head = GenreHead(
            4 * hidden, dim, prior, skip=skip, dropout=dropout, input_dropout=input_dropout
        )

    def forward(self, features_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Return logits ``[B, G]``; rows outside the mask have no influence, wherever they are."""
        rows = self.rows(features_BTD)
        steps_BSF, real_BS = self.steps(rows, mask_BT)  # F = fold * W
        states = self._states(self.input_dropout(steps_BSF), real_BS)
        missing_BS1 = ~real_BS.unsqueeze(-1)
        means = [masked_mean(states_BSH, real_BS) for states_BSH in states]
        # tanh is above -1
        most = [states_BSH.masked_fill(missing_BS1, -1.0).amax(1) for states_BSH in states]
        pooled_BH = torch.cat([*means, *most], dim=1)
        logits_BG: Tensor = self.head(pooled_BH, rows.mean(mask_BT))
        return logits_BG

    def _states(self, steps_BSF: Tensor, real_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Run each direction over the real steps, which come first for both.

        The second reads them from the last to the first, and its states stay in that order: mean
        and max ask for none. What stands behind the real steps is computed and ignored: a state
        depends on what was read before it. Lengths stay on the device, unlike with packed
        sequences.
        """
        place_S = torch.arange(real_BS.shape[1], device=real_BS.device)
        last_B1 = real_BS.sum(1, keepdim=True) - 1
        mirror_BS = torch.where(real_BS, last_B1 - place_S, place_S)
        return self.ahead(steps_BSF)[0], self.back(take_rows(steps_BSF, mirror_BS))[0]
