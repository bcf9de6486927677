"""Noise on rows, and rows hidden from the model: the same for a window on whatever rank it lies.

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
        if not self.noise and not self.hide_frames:
            return features_BTD, mask_BT
        keys_B = mix(self.seed, epoch, movie_B.cpu().numpy(), visit_B.cpu().numpy())
        generator = torch.Generator(features_BTD.device)
        noise_BTD = torch.empty_like(features_BTD)
        chance_BT = torch.empty(mask_BT.shape, device=mask_BT.device)
        for window, key in enumerate(keys_B):
            generator.manual_seed(int(key >> 1))
            chance_BT[window].uniform_(generator=generator)
            if self.noise:
                noise_BTD[window].normal_(std=self.noise, generator=generator)
        if self.noise:
            features_BTD = features_BTD + noise_BTD
        return features_BTD, _hide(mask_BT, chance_BT < self.hide_frames)


def _hide(mask_BT: Tensor, hidden_BT: Tensor) -> Tensor:
    kept_BT = mask_BT & ~hidden_BT
    return torch.where(kept_BT.any(1, keepdim=True), kept_BT, mask_BT)
