"""The published LSTM, and an LSTM with masking.

B = windows, T = rows of a window, D = feature size, S = steps, H = hidden units per direction,
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
    """The published network: BiLSTM over a layer-normalized window, last step, max pooling.

    Only the last step is used. At that step the forward direction has read the complete window
    and the backward direction a single row, so the backward direction is computed for that row
    alone: the same function at half the cost. The original applied a sigmoid and a BCE on
    probabilities; this class returns logits. Like the original it does not use the mask: shorter
    movies are padded with zero rows at the end.

    Source: github.com/veveve10/MovieNetPrediction.
    """

    def __init__(
        self, *, dim: int, genres: int, frames: int, hidden: int = 128, pooling: int = 4
    ) -> None:
        """Build for windows of exactly ``frames`` rows.

        Args:
            dim: Feature size.
            genres: Number of genres.
            frames: Rows of a window (T). The layer norm has a weight per row.
            hidden: Units of each direction.
            pooling: Neighboring units per max pooling; a divisor of ``2 * hidden``.
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
        """Return logits ``[B, G]``; masked rows are replaced by zeros."""
        rows_BTD = self.norm(features_BTD * mask_BT.unsqueeze(-1))
        ahead_BH = self.ahead(rows_BTD)[0][:, -1]
        back_BH = self.back(rows_BTD[:, -1:])[0][:, 0]
        logits_BG: Tensor = self.head(self.pool(torch.cat([ahead_BH, back_BH], dim=1)))
        return logits_BG


class MaskedLSTM(nn.Module):
    """BiLSTM over the real rows, with mean and max pooling of its states and a linear path.

    Rows are projected and folded first. By default the LSTM then takes a quarter of the steps,
    each a quarter of the size of a row. Recurrence dominates the cost.
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
            width: Size of a projected row.
            fold: Neighboring rows per step of the LSTM.
            hidden: Units of each direction.
            dropout: Dropout probability of pooled values.
            input_dropout: Dropout probability of the values of a step and of the mean row.
            unit_rows: Scale each row to length 1 before centering.
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
        """Return logits ``[B, G]``, independent of masked rows at any position."""
        rows = self.rows(features_BTD)
        steps_BSF, real_BS = self.steps(rows, mask_BT)  # F = fold * W
        states = self._states(self.input_dropout(steps_BSF), real_BS)
        missing_BS1 = ~real_BS.unsqueeze(-1)
        means = [masked_mean(states_BSH, real_BS) for states_BSH in states]
        # States are outputs of tanh, so -1 is never the maximum.
        maxima = [states_BSH.masked_fill(missing_BS1, -1.0).amax(1) for states_BSH in states]
        pooled_BH = torch.cat([*means, *maxima], dim=1)
        logits_BG: Tensor = self.head(pooled_BH, rows.mean(mask_BT))
        return logits_BG

    def _states(self, steps_BSF: Tensor, real_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Run both directions over the real steps, which come first in each.

        The backward direction reads the real steps in reverse. Its states keep that order, since
        mean and max pooling do not depend on it. Steps after the real ones are computed and
        ignored: a state depends only on earlier steps. Unlike packed sequences, this needs no
        lengths on the host.
        """
        index_S = torch.arange(real_BS.shape[1], device=real_BS.device)
        last_B1 = real_BS.sum(1, keepdim=True) - 1
        mirror_BS = torch.where(real_BS, last_B1 - index_S, index_S)
        return self.ahead(steps_BSF)[0], self.back(take_rows(steps_BSF, mirror_BS))[0]
