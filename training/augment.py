"""Noise, hidden rows, dropped features, mixup: the same for a window on whatever rank it lies.

B = windows, T = rows of a window, D = feature size, G = genres. Each window draws from generators
of its own, keyed by (seed, epoch, movie, visit). So the augmented global batch does not depend on
the number of ranks, and nothing has to be saved to resume. Its partner in mixup is planned by the
stream, by the same key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from training.rng_keys import mix

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from training.stream.batch import Batch

_MIXUP = 1
"""Keeps the key of the share apart from that of noise."""


@dataclass(frozen=True)
class Augment:
    """What is done to train windows."""

    seed: int

    noise: float = 0.0
    """Standard deviation of Gaussian noise, in units of the features."""

    hide_frames: float = 0.0
    """Chance of each real row to be hidden; where it would hit all, none is."""

    drop_features: float = 0.0
    """Chance of each feature to be replaced by its mean, in all rows of the window alike."""

    mean_D: Tensor | None = None
    """float32 ``[D]``: what dropped features become; needed with ``drop_features``."""

    mixup: float = 0.0
    """Both parameters of the Beta distribution of a window's share beside its partner; 0: none."""

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return features ``[B, T, D]`` in float32, mask ``[B, T]`` and labels ``[B, G]``."""
        features_BTD, labels_BG = batch.features.float(), batch.labels
        if self.mixup and batch.partner is not None:
            features_BTD, labels_BG = self._mix(batch, batch.partner)
        if not (self.noise or self.hide_frames or self.drop_features):
            return features_BTD, batch.mask, labels_BG
        return *self._disturb(features_BTD, batch.mask, self._keys(batch)), labels_BG

    def _keys(self, batch: Batch, *purpose: int) -> NDArray[np.uint64]:
        movie_B, visit_B = (each.cpu().numpy() for each in (batch.movie, batch.window_index))
        return mix(self.seed, batch.epoch, movie_B, visit_B, *purpose)

    def _disturb(
        self, features_BTD: Tensor, mask_BT: Tensor, keys_B: NDArray[np.uint64]
    ) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(features_BTD.device)
        noise_BTD = torch.empty_like(features_BTD) if self.noise else None
        chance_BT = torch.empty(mask_BT.shape, device=mask_BT.device)
        chance_BD = torch.empty_like(features_BTD[:, 0])
        for window, key in enumerate(keys_B):
            generator.manual_seed(int(key >> 1))
            chance_BT[window].uniform_(generator=generator)
            if noise_BTD is not None:
                noise_BTD[window].normal_(std=self.noise, generator=generator)
            chance_BD[window].uniform_(generator=generator)
        if noise_BTD is not None:
            features_BTD = features_BTD + noise_BTD
        if self.mean_D is not None and self.drop_features:
            dropped_B1D = (chance_BD < self.drop_features).unsqueeze(1)
            features_BTD = torch.where(dropped_B1D, self.mean_D.to(features_BTD), features_BTD)
        return features_BTD, _hide(mask_BT, chance_BT < self.hide_frames)

    def _mix(self, batch: Batch, partner: Batch) -> tuple[Tensor, Tensor]:
        """Mix features and labels of two windows; the partner is stretched to the window's rows."""
        share_B = torch.tensor(
            [
                np.random.Generator(np.random.PCG64(int(key))).beta(self.mixup, self.mixup)
                for key in self._keys(batch, _MIXUP)
            ],
            dtype=torch.float32,
            device=batch.labels.device,
        )
        place_T = torch.arange(batch.mask.shape[1], device=batch.mask.device)
        length_B1, other_B1 = (each.mask.sum(1, keepdim=True) for each in (batch, partner))
        row_BT = (place_T * other_B1 // length_B1).clamp_max(other_B1 - 1)
        other_BTD = partner.features.float().gather(
            1, row_BT.unsqueeze(-1).expand(-1, -1, partner.features.shape[-1])
        )
        mixed_BTD = torch.lerp(other_BTD, batch.features.float(), share_B[:, None, None])
        features_BTD = mixed_BTD * batch.mask.unsqueeze(-1)
        return features_BTD, torch.lerp(partner.labels, batch.labels, share_B[:, None])


def _hide(mask_BT: Tensor, hidden_BT: Tensor) -> Tensor:
    kept_BT = mask_BT & ~hidden_BT
    return torch.where(kept_BT.any(1, keepdim=True), kept_BT, mask_BT)
