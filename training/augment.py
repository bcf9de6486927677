"""Augmentation of train windows: noise, frame dropout, feature dropout and mixup.

B = windows, T = rows of a window, D = feature size, G = genres. Each window has its own random
generators, keyed by (seed, epoch, movie, window index). The augmented global batch therefore does
not depend on the world size, and no generator state is saved for resuming. The stream plans the
mixup partner of a window from the same key.
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
"""Separates the key of the mixup weight from that of noise and dropout."""


@dataclass(frozen=True)
class Augment:
    """Settings of the augmentation, applied by calling the object on a batch."""

    seed: int

    noise: float = 0.0
    """Standard deviation of Gaussian noise, in units of the features."""

    frame_dropout: float = 0.0
    """Probability of masking each real row. If that would mask every row, none is masked."""

    feature_dropout: float = 0.0
    """Probability of replacing each feature by its mean, in all rows of the window."""

    mean_D: Tensor | None = None
    """float32 ``[D]``: values of dropped features; required for ``feature_dropout``."""

    mixup: float = 0.0
    """Both parameters of the Beta distribution of the mixup weight; 0 disables mixup."""

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return features ``[B, T, D]`` in float32, mask ``[B, T]`` and labels ``[B, G]``."""
        features_BTD, labels_BG = batch.features.float(), batch.labels
        if self.mixup and batch.partner is not None:
            features_BTD, labels_BG = self._mix(batch, batch.partner)
        if not (self.noise or self.frame_dropout or self.feature_dropout):
            return features_BTD, batch.mask, labels_BG
        return *self._perturb(features_BTD, batch.mask, self._keys(batch)), labels_BG

    def _keys(self, batch: Batch, *purpose: int) -> NDArray[np.uint64]:
        movie_B, index_B = (each.cpu().numpy() for each in (batch.movie, batch.window_index))
        return mix(self.seed, batch.epoch, movie_B, index_B, *purpose)

    def _perturb(
        self, features_BTD: Tensor, mask_BT: Tensor, keys_B: NDArray[np.uint64]
    ) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(features_BTD.device)
        noise_BTD = torch.empty_like(features_BTD) if self.noise else None
        draw_BT = torch.empty(mask_BT.shape, device=mask_BT.device)
        draw_BD = torch.empty_like(features_BTD[:, 0])
        for window, key in enumerate(keys_B):
            generator.manual_seed(int(key >> 1))  # torch takes a signed 64-bit seed
            # Frames are drawn even without frame dropout: the noise of a window must not depend
            # on which other augmentations are enabled.
            draw_BT[window].uniform_(generator=generator)
            if noise_BTD is not None:
                noise_BTD[window].normal_(std=self.noise, generator=generator)
            draw_BD[window].uniform_(generator=generator)
        if noise_BTD is not None:
            features_BTD = features_BTD + noise_BTD
        if self.mean_D is not None and self.feature_dropout:
            dropped_B1D = (draw_BD < self.feature_dropout).unsqueeze(1)
            features_BTD = torch.where(dropped_B1D, self.mean_D.to(features_BTD), features_BTD)
        return features_BTD, _drop_rows(mask_BT, draw_BT < self.frame_dropout)

    def _mix(self, batch: Batch, partner: Batch) -> tuple[Tensor, Tensor]:
        """Mix features and labels with those of the partner, resampled to the window's rows."""
        weight_B = torch.tensor(
            [
                np.random.Generator(np.random.PCG64(int(key))).beta(self.mixup, self.mixup)
                for key in self._keys(batch, _MIXUP)
            ],
            dtype=torch.float32,
            device=batch.labels.device,
        )
        index_T = torch.arange(batch.mask.shape[1], device=batch.mask.device)
        length_B1, partner_length_B1 = (each.mask.sum(1, keepdim=True) for each in (batch, partner))
        # Nearest-neighbor resampling: a short partner covers every row, a long one loses none
        # of its duration.
        row_BT = (index_T * partner_length_B1 // length_B1).clamp_max(partner_length_B1 - 1)
        partner_BTD = partner.features.float().gather(
            1, row_BT.unsqueeze(-1).expand(-1, -1, partner.features.shape[-1])
        )
        mixed_BTD = torch.lerp(partner_BTD, batch.features.float(), weight_B[:, None, None])
        features_BTD = mixed_BTD * batch.mask.unsqueeze(-1)  # padding stays zero
        return features_BTD, torch.lerp(partner.labels, batch.labels, weight_B[:, None])


def _drop_rows(mask_BT: Tensor, dropped_BT: Tensor) -> Tensor:
    remaining_BT = mask_BT & ~dropped_BT
    return torch.where(remaining_BT.any(1, keepdim=True), remaining_BT, mask_BT)
