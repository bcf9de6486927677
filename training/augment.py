"""Noise, hidden rows and dropped features: the same for a window on whatever rank it lies.

B = windows, T = rows of a window, D = feature size. Each window draws from a generator of its
own, keyed by (seed, epoch, movie, visit). So the augmented global batch does not depend on the
number of ranks, and nothing has to be saved to resume.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.keys import mix


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

    def __call__(
        self,
        features_BTD: Tensor,
        mask_BT: Tensor,
        *,
        epoch: int,
        movie_B: Tensor,
        visit_B: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return augmented features and mask; the arguments are left as they are."""
        if not (self.noise or self.hide_frames or self.drop_features):
            return features_BTD, mask_BT
        keys_B = mix(self.seed, epoch, movie_B.cpu().numpy(), visit_B.cpu().numpy())
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


def _hide(mask_BT: Tensor, hidden_BT: Tensor) -> Tensor:
    kept_BT = mask_BT & ~hidden_BT
    return torch.where(kept_BT.any(1, keepdim=True), kept_BT, mask_BT)
